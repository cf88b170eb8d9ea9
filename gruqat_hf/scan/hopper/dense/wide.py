"""Which thread holds what where a block of more than 512 channels is shared by 32 programs of a grid, more than a cluster has.

A program owns 32 channels of a block, and tiles of 8 rows of the batch. Its eight warps share a tile's product ``[32 channels,
1024 inputs] x [1024 inputs, 8 rows]``, an eighth of the inputs each; the parts' sums go through shared memory, from where each
thread takes one channel of one row. Of a program's 192 KB of weights, a third stays in shared memory, the others in registers.

What programs hand each other comes through a mailbox (:mod:`..mailbox`): for each step, tile of rows and block

    [program][row][chunk of the program's 4]

in chunks of 8 channels, 16 bytes, of which lane ``4 * i + j`` takes chunk ``j`` of row ``i`` from each of its warp's 4 programs:
column ``i`` of a product's right side, and the 4 of each 16 inputs that the weights' columns name so, as in :mod:`.layouts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...triton.device import device_facts
from ...triton.exchange_plan import cdiv
from ..gluon import constexpr_function, gl, jit
from ..mailbox import hear_chunks, hear_rest, hear_three, look
from .layouts import CHANNELS, ROWS, load_weights, parts_of, product_layout, sum_memory

#: Programs that share a block, its channels with padding, and parts that a product's inputs are split in.
PROGRAMS, BLOCK = 32, 1024
PARTS = parts_of(BLOCK)
#: Bytes of a program's values, one for each channel and row, and int32 words of all programs' ones.
SLICE_BYTES = CHANNELS * ROWS * 2
WORDS = PROGRAMS * SLICE_BYTES // 4
#: Steps of a launch at most, even: a mailbox has words for each of them.
_MOST_STEPS = 512
_CHANNELS, _ROWS, _BLOCK, _PARTS = gl.constexpr(CHANNELS), gl.constexpr(ROWS), gl.constexpr(BLOCK), gl.constexpr(PARTS)
_SLICE_BYTES, _WORDS = gl.constexpr(SLICE_BYTES), gl.constexpr(WORDS)


class Wave(NamedTuple):
    """The tiles of rows of a launch: from ``first`` on, ``turns`` for each of ``groups`` that have the programs of all blocks."""

    first: int
    groups: int
    turns: int


def waves(rows: int, blocks: int, device: torch.device, most_turns: int = 1) -> Iterator[Wave]:
    """The launches that a batch takes, with no more programs than processors: as few as can be, each with as few turns.

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
    launches = cdiv(tiles, at_once * most_turns)
    most = at_once * cdiv(tiles, at_once * launches)
    for first in range(0, tiles, most):
        own = min(most, tiles - first)
        turns = cdiv(own, at_once)
        yield Wave(first, cdiv(own, turns), turns)


def patience_of(one: int, doubling: int, rows: int, tiles: int) -> int:
    """Cycles that programs of a launch of so many tiles wait before their first look: ``one`` at one row, and so much more for
    each ``doubling`` of the rows that look."""
    return one + doubling * (min(rows, tiles * ROWS) - 1).bit_length()


def pieces(steps: int, reverse: bool) -> list[slice]:
    """Where the steps of each launch lie in a sequence, in the order of the scan."""
    runs = [(begin, min(begin + _MOST_STEPS, steps)) for begin in range(0, steps, _MOST_STEPS)]
    return [slice(steps - end, steps - begin) if reverse else slice(begin, end) for begin, end in runs]


@constexpr_function
def weight_memory():
    """Of a gate's weights ``[PARTS, CHANNELS, inputs of a part]`` in shared memory: a lane's for an instruction are 16 bytes."""
    lane = [[0, 0, 1], [0, 8, 0], [0, 0, 8]]
    warp = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    deeper = [[0, 0, 16], [0, 0, 32], [0, 0, 64], [0, 16, 0]]
    return gl.SharedLinearLayout(lane + warp + deeper + [[1, 0, 0], [2, 0, 0], [4, 0, 0]])


@jit
def hold_weights(weight):
    """A program's part of a gate's weights into shared memory."""
    memory = gl.allocate_shared_memory(gl.float16, [_PARTS, _CHANNELS, _BLOCK // _PARTS], weight_memory())
    memory.store(load_weights(weight, _BLOCK))
    return memory


@jit
def held_weights(memory):
    """A product's left side from there."""
    return memory.load(gl.DotOperandLayout(0, product_layout(_PARTS), 2))


@jit
def parts_memory():
    """Room for a product's result."""
    return gl.allocate_shared_memory(gl.float32, [_PARTS, _CHANNELS, _ROWS], sum_memory())


@jit
def no_product():
    """Zeros for a product to be added to, ``[PARTS, CHANNELS, ROWS]`` fp32."""
    return gl.full([_PARTS, _CHANNELS, _ROWS], 0.0, gl.float32, layout=product_layout(_PARTS))


@jit
def own_place(part, GATES: gl.constexpr):
    """Where program ``part`` posts a tile of its own values, in bytes."""
    s = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(1, GATES))[:, None]
    n = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))[None, :]
    return part * _SLICE_BYTES + n * (_CHANNELS * 2) + s * 2


@jit
def hear_operand(at, patience):
    """A product's right side, when all of it is there."""
    return hear_chunks(at, patience, at.shape[1] // 32, _SLICE_BYTES)


@jit
def look_for_operand(at):
    """What is there of it by now."""
    return look(at, at.shape[1] // 32, _SLICE_BYTES)


@jit
def hear_rest_of_operand(at, seen):
    """All of it, after a look."""
    return hear_rest(at, seen, at.shape[1] // 32, _SLICE_BYTES)


@jit
def hear_operands(at, patience):
    """Those of three products."""
    return hear_three(at, patience, at.shape[1] // 32, _SLICE_BYTES, _WORDS * 4)
