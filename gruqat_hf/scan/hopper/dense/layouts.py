"""Which thread of a dense cluster's program holds what.

A program owns 32 channels of a block; the cluster's programs together own all of it. Its eight warps share a step's product
``[32 channels, BLOCK inputs] x [BLOCK inputs, 8 rows]`` as 2 halves of the channels times 4 quarters of the inputs, or as eighths
of the inputs; the parts' sums go through shared memory, from where each thread takes one channel of one row.

The state comes from the exchange, to which each program sends its 32 channels of 8 rows as chunks of 8 channels, 16 bytes:

    [program][row][chunk of the program's 4]

with the rows alone that a tile takes, which are fewer where a batch is small.

Of a product's right side, lane ``4 * i + j`` holds column ``i``, which is a row of the batch, and 4 of each 16 inputs. Which
inputs these are is a matter of naming, as long as the weights' columns have the same names: lane ``4 * i + j`` takes chunk ``j``
of row ``i`` from each program of its warp's part. So 32 lanes read 512 bytes in a row, 16 a lane, if a tile takes 8 rows,
and hold what the product wants.
"""

from __future__ import annotations

from ..gluon import constexpr_function, gl, jit

#: Channels of a program, rows of the batch of a tile, and warps.
CHANNELS, ROWS, WARPS = 32, 8, 8
_CHANNELS, _ROWS = gl.constexpr(CHANNELS), gl.constexpr(ROWS)


@constexpr_function
def parts_of(BLOCK):
    """Parts that the inputs of a product with blocks of so many channels, with padding, are split in."""
    return 4 if BLOCK <= 512 else 8


@constexpr_function
def product_layout(PARTS):
    """Of a product's result ``[PARTS, CHANNELS, ROWS]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[PARTS, WARPS // PARTS, 1], instr_shape=[1, 16, 8])


@constexpr_function
def sum_memory():
    """Of the same in shared memory; read by :func:`sum_layout` and written without two lanes in a bank."""
    return gl.SwizzledSharedLayout(4, 4, 2, [2, 1, 0])


@constexpr_function
def sum_layout(PARTS):
    """Of the same when it is summed: each thread all parts of one channel of one row; neighbouring lanes have neighbouring
    channels."""
    return gl.BlockedLayout([PARTS, 1, 1], [1, 8, 4], [1, 4, 2], [1, 2, 0])


@jit
def load_weights(weight, BLOCK: gl.constexpr):
    """A program's part of a gate's weights ``[PARTS, CHANNELS, inputs of a part]`` into registers, as a product's left side."""
    PARTS: gl.constexpr = parts_of(BLOCK)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(PARTS), 2)
    DEPTH: gl.constexpr = BLOCK // PARTS
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    out = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    into = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    return gl.load(weight + (part * _CHANNELS + out) * DEPTH + into)


@jit
def operand_place(BLOCK: gl.constexpr, TAKEN: gl.constexpr = _ROWS):
    """Where in the state that all programs send, in bytes, the first chunk of a thread's part of a product's right side lies.
    TAKEN: the rows that programs send; others get one of these."""
    PARTS: gl.constexpr = parts_of(BLOCK)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(PARTS), 2)
    DEPTH: gl.constexpr = BLOCK // PARTS
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    k = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    return part * (DEPTH * TAKEN * 2) + row % TAKEN * (_CHANNELS * 2) + ((k >> 1) & 3) * 16


@constexpr_function
def send_layout(PROGRAMS):
    """Of ``[PROGRAMS, ROWS, CHANNELS]``, a slice of the state for each program: a chunk is a thread's, for one or two."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4]] + ([[8, 0, 0]] if PROGRAMS == 16 else [])
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0, 0], [2, 0, 0], [4, 0, 0]], [], [PROGRAMS, 8, 32])


# Of the backward scan. A program multiplies its own 32 channels' gate gradients with its rows of the weights, which gives its
# part of the gradient of all channels, and sends to each program what that one owns; that one sums the parts. A part is, for each
# lane ``4 * i + j``, a chunk of the channels 4 * i and on, in columns 2 * j and 2 * j + 1: what that lane has of the product, if
# the product's rows are named so.


@constexpr_function
def part_layout():
    """Of a product's result ``[BLOCK, ROWS]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1], instr_shape=[16, 8])


@constexpr_function
def parts_layout(PROGRAMS):
    """Of all programs' parts ``[PROGRAMS, CHANNELS, ROWS]`` when they are summed: a thread has those of one channel and row."""
    return gl.BlockedLayout([PROGRAMS, 1, 1], [1, 8, 4], [1, 4, 2], [1, 2, 0])
