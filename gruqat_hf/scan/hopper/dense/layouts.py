"""Which thread of a dense cluster's program holds what.

A program owns 32 channels of a block; the cluster's programs together own all of it. Its eight warps share a step's product
``[32 channels, BLOCK inputs] x [BLOCK inputs, 8 rows]`` as 2 halves of the channels times 4 quarters of the inputs; the quarters'
sums go through shared memory, from where each thread takes one channel of one row.

The state comes from the exchange, to which each program sends its 32 channels of 8 rows as chunks of 8 channels, 16 bytes:

    [program][row][chunk of the program's 4]

Of a product's right side, lane ``4 * i + j`` holds column ``i``, which is a row of the batch, and 4 of each 16 inputs. Which
inputs these are is a matter of naming, as long as the weights' columns have the same names: lane ``4 * i + j`` takes chunk ``j``
of row ``i`` from each program of its warp's quarter. So 32 lanes read 512 bytes in a row, 16 a lane, and hold what the product
wants.
"""

from __future__ import annotations

from ..gluon import constexpr_function, gl

#: Channels of a program, rows of the batch of a cluster, parts that a product's inputs are split in, and warps.
CHANNELS, ROWS, SPLITS, WARPS = 32, 8, 4, 8


@constexpr_function
def product_layout():
    """Of a product's result ``[SPLITS, CHANNELS, ROWS]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 2, 1], instr_shape=[1, 16, 8])


@constexpr_function
def sum_memory():
    """Of the same in shared memory; read by :func:`sum_layout` and written without two lanes in a bank."""
    return gl.SwizzledSharedLayout(4, 4, 2, [2, 1, 0])


@constexpr_function
def sum_layout():
    """Of the same when it is summed: each thread all parts of one channel of one row."""
    return gl.BlockedLayout([4, 1, 1], [1, 8, 4], [1, 4, 2], [1, 2, 0])


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
