"""Which thread of a dense cluster's program holds what, where products are of 8-bit codes.

A program owns 64 or 32 channels of a block. Its eight warps share a step's product ``[channels, inputs] x [inputs, 8 rows]``:
each has 16 of the channels, and of the inputs a half or a quarter. The parts' sums go through shared memory, from where each
thread takes one channel of one row, or two neighbours, and each warp a row.

Inputs come in pieces of 512, each with a barrier of its own. Of 1024, the 8 programs of either piece send to one another first: a
program's first piece is its own one, which is multiplied while the other is on its way. The exchange holds the state as

    [piece][program of the piece][row][chunk of 16 channels]

with the rows alone that a tile takes, which are fewer where a batch is small; and lane ``4 * i + j`` takes, of each 64 inputs
of its warp, chunk ``j`` of row ``i``: of a product's right side it then holds column ``i``, and 8 of each 32 inputs, which are
those that the weights' columns name so.

Row ``i`` of each 16 of a product is channel ``2 * i``, row ``i + 8`` channel ``2 * i + 1``, as in the block-diagonal kernels.
"""

from __future__ import annotations

from ..gluon import constexpr_function, gl, jit

#: Rows of the batch of a tile, warps, and inputs of a piece.
ROWS, WARPS, PIECE = 8, 8, 512
_ROWS = gl.constexpr(ROWS)
_PIECE = gl.constexpr(PIECE)


@constexpr_function
def splits(CHANNELS):
    """Parts that a piece's inputs are split in."""
    return WARPS // (CHANNELS // 16)


@constexpr_function
def product_layout(CHANNELS):
    """Of a product's result ``[splits, CHANNELS, ROWS]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[splits(CHANNELS), CHANNELS // 16, 1], instr_shape=[1, 16, 8])


@constexpr_function
def weight_memory(CHANNELS):
    """Of a piece of weights ``[splits, CHANNELS, inputs]`` in shared memory: what a lane needs for an instruction is 16 bytes."""
    parts = splits(CHANNELS)
    lane = [[0, 0, 1], [0, 0, 2], [0, 8, 0], [0, 0, 16]]
    warp = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    deeper = [[0, 0, 1 << bit] for bit in range(5, (PIECE // parts).bit_length() - 1)]
    wider = [[0, 1 << bit, 0] for bit in range(4, CHANNELS.bit_length() - 1)]
    return gl.SharedLinearLayout(lane + warp + deeper + wider + [[1 << bit, 0, 0] for bit in range(parts.bit_length() - 1)])


@constexpr_function
def sum_memory():
    """Of a product's result in shared memory, channels in a row; written without two lanes in a bank."""
    return gl.SwizzledSharedLayout(8, 2, 4, [1, 2, 0])


@constexpr_function
def sum_layout(CHANNELS):
    """Of the same when it is summed: each thread all parts of one or two channels of one row."""
    return gl.BlockedLayout([splits(CHANNELS), CHANNELS // 32, 1], [1, 32, 1], [1, 1, 8], [1, 2, 0])


@constexpr_function
def send_layout(PROGRAMS, CHANNELS):
    """Of ``[PROGRAMS, ROWS, CHANNELS]``, a slice of the state for each program: a chunk is a thread's, for one program or two."""
    chunk, rows = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]], [[0, 1, 0], [0, 2, 0], [0, 4, 0]]
    chunks = [[0, 0, first] for first in (16, 32) if first < CHANNELS]
    programs = [[1 << bit, 0, 0] for bit in range(PROGRAMS.bit_length() - 1)]
    lanes, others = (chunks + rows + programs)[:5], (chunks + rows + programs)[5:]
    return gl.DistributedLinearLayout(chunk + others[3:], lanes, others[:3], [], [PROGRAMS, 8, CHANNELS])


@jit
def by_channels(product):
    """A product's result with its rows in the order of channels; moves nothing."""
    PARTS: gl.constexpr = product.shape[0]
    CHANNELS: gl.constexpr = product.shape[1]
    ROWS: gl.constexpr = product.shape[2]
    x = product.reshape([PARTS, CHANNELS // 16, 2, 8, ROWS]).permute([0, 1, 3, 2, 4])
    return x.reshape([PARTS, CHANNELS, ROWS])


@jit
def operand_at(CHANNELS: gl.constexpr, TAKEN: gl.constexpr):
    """Where in a piece the first chunk of a thread's part of a product's right side lies. TAKEN: the rows that programs send;
    others get one of these."""
    PARTS: gl.constexpr = splits(CHANNELS)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(CHANNELS), 4)
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    k = gl.arange(0, _PIECE // PARTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    channel = ((k >> 2) & 3) * 16
    first = part * (_PIECE // PARTS * TAKEN) + channel // CHANNELS * (CHANNELS * TAKEN)
    return first + row % TAKEN * CHANNELS + channel % CHANNELS


@jit
def load_weights(weight, CHANNELS: gl.constexpr):
    """A piece of a program's part of a gate's weights into registers, as a product's left side."""
    PARTS: gl.constexpr = splits(CHANNELS)
    DEPTH: gl.constexpr = _PIECE // PARTS
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(CHANNELS), 4)
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    out = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    into = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    return gl.load(weight + (part * CHANNELS + out) * DEPTH + into)
