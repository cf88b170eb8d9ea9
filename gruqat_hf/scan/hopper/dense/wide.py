"""Which thread holds what where a block of more than 512 channels is shared by 32 programs of a grid, more than a cluster has.

A program owns 32 channels of a block and 8 rows of the batch. Its eight warps share a step's product ``[32 channels, 1024
inputs] x [1024 inputs, 8 rows]``, an eighth of the inputs each; the parts' sums go through shared memory, from where each thread
takes one channel of one row. Of a program's 192 KB of weights, a third stays in shared memory, the others in registers.

What programs hand each other comes through a mailbox (:mod:`..mailbox`): for each step, tile of rows and block

    [program][row][chunk of the program's 4]

in chunks of 8 channels, 16 bytes, of which lane ``4 * i + j`` takes chunk ``j`` of row ``i`` from each of its warp's 4 programs:
column ``i`` of a product's right side, and the 4 of each 16 inputs that the weights' columns name so, as in :mod:`.layouts`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...triton.device import device_facts
from ...triton.exchange_plan import cdiv
from ..gluon import constexpr_function, gl, jit
from ..mailbox import hear_chunks, hear_three
from .layouts import CHANNELS, ROWS, sum_memory

#: Programs that share a block, its channels with padding, parts that a product's inputs are split in, and inputs of a part.
PROGRAMS, BLOCK, PARTS, DEPTH = 32, 1024, 8, 128
#: Steps of a launch at most, even: a mailbox has words for each of them.
_MOST_STEPS = 512
#: Bytes of a program's values, one for each channel and row, and int32 words of all programs' ones.
SLICE_BYTES = CHANNELS * ROWS * 2
WORDS = PROGRAMS * SLICE_BYTES // 4
_CHANNELS, _ROWS, _PARTS, _DEPTH = gl.constexpr(CHANNELS), gl.constexpr(ROWS), gl.constexpr(PARTS), gl.constexpr(DEPTH)
_SLICE_BYTES, _WORDS = gl.constexpr(SLICE_BYTES), gl.constexpr(WORDS)


def waves(rows: int, blocks: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """The first tile and the number of tiles of each launch that a batch takes, with no more programs than processors.

    Raises:
        RuntimeError: one tile has more, in a program that was exported on a larger GPU.
    """
    tiles, processors = cdiv(rows, ROWS), device_facts(device).processors
    at_once = processors // (PROGRAMS * blocks)
    if at_once == 0:
        raise RuntimeError(
            f"hopper_dense was chosen for {blocks} blocks, which need {PROGRAMS * blocks} programs at once, but {device} has "
            f"{processors} processors; run or export the layer on this GPU with backend 'triton' or 'auto'"
        )
    for first in range(0, tiles, at_once):
        yield first, min(at_once, tiles - first)


def patience_of(one: int, doubling: int, rows: int, tiles: int) -> int:
    """Cycles that programs of a launch of so many tiles wait before their first look: ``one`` at one row, and so much more for
    each ``doubling`` of the rows that look."""
    return one + doubling * (min(rows, tiles * ROWS) - 1).bit_length()


def pieces(steps: int, reverse: bool) -> list[slice]:
    """Where the steps of each launch lie in a sequence, in the order of the scan."""
    runs = [(begin, min(begin + _MOST_STEPS, steps)) for begin in range(0, steps, _MOST_STEPS)]
    return [slice(steps - end, steps - begin) if reverse else slice(begin, end) for begin, end in runs]


@constexpr_function
def product_layout():
    """Of a product's result ``[PARTS, CHANNELS, ROWS]``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1, 1], instr_shape=[1, 16, 8])


@constexpr_function
def sum_layout():
    """Of the same when it is summed: each thread all parts of one channel of one row; neighbouring lanes have neighbouring
    channels."""
    return gl.BlockedLayout([8, 1, 1], [1, 8, 4], [1, 4, 2], [1, 2, 0])


@constexpr_function
def weight_memory():
    """Of a gate's weights ``[PARTS, CHANNELS, DEPTH]`` in shared memory: what a lane needs for an instruction is 16 bytes."""
    lane = [[0, 0, 1], [0, 8, 0], [0, 0, 8]]
    warp = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    deeper = [[0, 0, 16], [0, 0, 32], [0, 0, 64], [0, 16, 0]]
    return gl.SharedLinearLayout(lane + warp + deeper + [[1, 0, 0], [2, 0, 0], [4, 0, 0]])


@jit
def load_weights(weight):
    """A program's part of a gate's weights into registers, as a product's left side."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(), 2)
    part = gl.arange(0, _PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    out = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    into = gl.arange(0, _DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    return gl.load(weight + (part * _CHANNELS + out) * _DEPTH + into)


@jit
def hold_weights(weight):
    """The same into shared memory."""
    memory = gl.allocate_shared_memory(gl.float16, [_PARTS, _CHANNELS, _DEPTH], weight_memory())
    memory.store(load_weights(weight))
    return memory


@jit
def held_weights(memory):
    """A product's left side from there."""
    return memory.load(gl.DotOperandLayout(0, product_layout(), 2))


@jit
def parts_memory():
    """Room for a product's result."""
    return gl.allocate_shared_memory(gl.float32, [_PARTS, _CHANNELS, _ROWS], sum_memory())


@jit
def no_product():
    """Zeros for a product to be added to, ``[PARTS, CHANNELS, ROWS]`` fp32."""
    return gl.full([_PARTS, _CHANNELS, _ROWS], 0.0, gl.float32, layout=product_layout())


@jit
def operand_place():
    """Where in a step's values, in bytes, the first chunk of a thread's part of a product's right side lies."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(), 2)
    part = gl.arange(0, _PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    k = gl.arange(0, _DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    return part * (_DEPTH * _ROWS * 2) + row * (_CHANNELS * 2) + ((k >> 1) & 3) * 16


@jit
def own_place(part, GATES: gl.constexpr):
    """Where program ``part`` posts a tile of its own values, in bytes."""
    s = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(1, GATES))[:, None]
    n = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))[None, :]
    return part * _SLICE_BYTES + n * (_CHANNELS * 2) + s * 2


@jit
def hear_operand(at, patience):
    """A product's right side, when all of it is there."""
    return hear_chunks(at, patience, _DEPTH // 32, _SLICE_BYTES)


@jit
def hear_operands(at, patience):
    """Those of three products."""
    return hear_three(at, patience, _DEPTH // 32, _SLICE_BYTES, _WORDS * 4)
