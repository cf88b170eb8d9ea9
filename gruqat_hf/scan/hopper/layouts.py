"""Which thread holds what. Tiles of gates are ``[channels, rows of the batch]``, the transpose of how tensors lie in memory.

A product of a block's weights with a tile of states is made of ``mma.m16n8`` instructions: the weights come first, so that the
short batch is on the side of 8 columns. Warp ``w`` owns 16 channels, and its lane ``4 * i + j`` gets of the 16 x 8 result

    rows i and i + 8, columns 2 * j and 2 * j + 1.

Two changes of names, which cost nothing, make that what the gates want:

* Row ``i`` of a warp's weights is channel ``2 * i``, row ``i + 8`` channel ``2 * i + 1`` (:func:`channel_of_row`). A thread then
  owns two adjacent channels, and reads and writes them in one access.
* With a tile of 4 rows of the batch, columns ``2 * j`` and ``2 * j + 1`` hold the same row ``j``: rows are spread over twice as
  many processors, and a thread has gates of 2 elements to compute instead of 4. Half of the product is computed twice, unless
  each column holds half of the channels (``block_diagonal/folding.py``, ``monarch/product.py``).

      16 channels of a warp, 4 rows            16 channels, 8 rows
      lane  0: c0 c1 of row 0                  lane  0: c0 c1 of rows 0 and 1
      lane  1: c0 c1 of row 1                  lane  1: c0 c1 of rows 2 and 3
      lane  4: c2 c3 of row 0                  lane  4: c2 c3 of rows 0 and 1
      lane 31: c14 c15 of row 3                lane 31: c14 c15 of rows 6 and 7
"""

from __future__ import annotations

from .gluon import constexpr_function, gl, jit


@constexpr_function
def gate_layout(BLOCK, ROWS):
    """Of a tile of gates ``[BLOCK, ROWS]``, as pictured above."""
    if ROWS == 4:
        registers, lanes = [[1, 0]], [[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]]
    else:
        registers, lanes = [[1, 0], [0, 1]], [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    above = [[channel, 0] for channel in (16, 32, 64) if channel < BLOCK]
    return gl.DistributedLinearLayout(registers, lanes, above, [], [BLOCK, ROWS])


@constexpr_function
def product_layout(BLOCK):
    """Of a product's result ``[BLOCK, 8]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[BLOCK // 16, 1], instr_shape=[16, 8])


@constexpr_function
def operand_memory(BLOCK):
    """Of a product's right side ``[BLOCK, 8]`` of fp16 in shared memory: columns contiguous, and no two lanes meet in a bank."""
    columns_in_a_line = max(1, 64 // BLOCK)
    return gl.SwizzledSharedLayout(8, columns_in_a_line, 8 // columns_in_a_line, [0, 1])


@constexpr_function
def ring_memory(BLOCK, ROWS, BYTES):
    """Of a tile ``[n * ROWS, BLOCK]`` of elements of BYTES as it comes from global memory, which is read in ``gate_layout``.

    That has neighbouring lanes in different rows: rows are shifted against each other by 32 bytes.
    """
    line = max(1, 128 // (BLOCK * BYTES))
    phases = max(1, 4 // line)
    return gl.SwizzledSharedLayout(32 // BYTES, max(line, ROWS // 4), phases, [1, 0])


@constexpr_function
def copy_layout(BLOCK, BYTES, WARPS):
    """Of the same tile while it is copied, 16 bytes a thread."""
    vector = 16 // BYTES
    across = BLOCK // vector
    lanes = min(32, across)
    warps = max(1, across // 32)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [WARPS // warps, warps], [1, 0])


@jit
def channel_of_row(row):
    """Which channel of its block a row of the product is."""
    return (row & ~15) | ((row & 7) << 1) | ((row >> 3) & 1)


@jit
def to_columns(x):
    """A tile ``[BLOCK, ROWS]`` as the 8 columns of a product's right side."""
    BLOCK: gl.constexpr = x.shape[0]
    if x.shape[1] == 4:
        return gl.join(x, x).reshape([BLOCK, 8])
    else:
        return x


@jit
def to_gates(product, ROWS: gl.constexpr):
    """A product's result ``[BLOCK, 8]``, rows as the instruction has them, as a tile ``[BLOCK, ROWS]``; moves nothing."""
    BLOCK: gl.constexpr = product.shape[0]
    x = product.reshape([BLOCK // 16, 2, 8, 8]).permute([0, 2, 1, 3]).reshape([BLOCK, 8])
    if ROWS == 4:
        x, _ = x.reshape([BLOCK, 4, 2]).split()
    return gl.convert_layout(x, gate_layout(BLOCK, ROWS), assert_trivial=True)


@jit
def to_product(x):
    """The inverse of :func:`to_gates`: a tile as a sum that a product is added to."""
    BLOCK: gl.constexpr = x.shape[0]
    x = to_columns(x).reshape([BLOCK // 16, 8, 2, 8]).permute([0, 2, 1, 3]).reshape([BLOCK, 8])
    return gl.convert_layout(x, product_layout(BLOCK), assert_trivial=True)


@jit
def load_weights(weight, BLOCK: gl.constexpr):
    """A block of weights ``[BLOCK, BLOCK]`` (out, in) into registers, as a product's left side with channels renamed."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(BLOCK), 2)
    out = channel_of_row(gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LEFT)))
    into = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LEFT))
    return gl.load(weight + out[:, None] * BLOCK + into[None, :])
