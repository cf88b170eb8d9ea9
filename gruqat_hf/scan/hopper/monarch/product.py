"""Products of a block of weights with values that have arrived, and where in a slot of the exchange these lie.

An instruction takes 8 columns, a tile has 4 rows. As in :mod:`..block_diagonal.folding`, a row has two columns, each with half of
its channels, and either half has weights of its own: a thread reads half as much as if it read each row for both columns, and all
warps of a program read at once, through one pipe. Where a row is too short for that, both columns hold all of it.
"""

from __future__ import annotations

from ..exchange import read_chunks
from ..gluon import constexpr_function, gl, jit, mma_v2
from ..layouts import channel_of_row, gate_layout, product_layout, to_gates
from . import TILE_ROWS
from .memory import take_chunks

_ROWS = gl.constexpr(TILE_ROWS)


@constexpr_function
def is_folded(BLOCK):
    """Each half of a line must fill chunks of 16 bytes, which hold what a lane gets of 32 channels."""
    return BLOCK > 32


@constexpr_function
def line_of(BLOCK):
    """Channels of a row that lie together."""
    return min(BLOCK, 64)


@constexpr_function
def inputs_of(BLOCK):
    """Inputs in a column of a product."""
    return BLOCK // 2 if is_folded(BLOCK) else BLOCK


@jit
def place_in_slot(number, row, BLOCK: gl.constexpr):
    """Where in a slot, in bytes, the channel that is ``number`` in order of arrival lies.

    Chunks of a line are shifted from row to row, so that a warp's 16 channels of all rows are in different banks.
    """
    LINE: gl.constexpr = line_of(BLOCK)
    shift = row // (64 // LINE) * 32
    return (number // LINE * _ROWS + row) * (LINE * 2) + ((number % LINE * 2) ^ shift)


@jit
def chunks_at(BLOCK: gl.constexpr):
    """Where in a slot a thread's first chunk of a product's right side lies."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(BLOCK), 2)
    k = gl.arange(0, inputs_of(BLOCK), layout=gl.SliceLayout(1, RIGHT))[:, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))[None, :]
    half = column % 2 * (32 if is_folded(BLOCK) else 0)
    return place_in_slot(half + ((k >> 1) & 3) * 8, column // 2, BLOCK)


@constexpr_function
def chunks_of(BLOCK):
    """How many chunks a thread has of a product's right side, and how far apart they are."""
    return inputs_of(BLOCK) // 32, TILE_ROWS * line_of(BLOCK) * 2


@jit
def read_right(at, SLOT: gl.constexpr, AREA: gl.constexpr, BLOCK: gl.constexpr):
    """What has arrived in a slot, or at a place in it that is added to ``at``, as a product's right side."""
    COUNT: gl.constexpr = chunks_of(BLOCK)
    return read_chunks(at, SLOT, AREA, COUNT[0], COUNT[1])


@jit
def take_right(at, BLOCK: gl.constexpr):
    """The same of a program's own values, which lie as in a slot."""
    COUNT: gl.constexpr = chunks_of(BLOCK)
    return take_chunks(at, COUNT[0], COUNT[1])


@jit
def load_sides(weight, BLOCK: gl.constexpr):
    """A block of weights ``[BLOCK, BLOCK]`` (out, in) into registers, a left side for each half of its inputs."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(BLOCK), 2)
    out = channel_of_row(gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LEFT)))
    into = gl.arange(0, inputs_of(BLOCK), layout=gl.SliceLayout(0, LEFT))
    if is_folded(BLOCK):
        first = weight + out[:, None] * BLOCK + (into // 32 * 64 + into % 32)[None, :]
        return gl.load(first), gl.load(first + 32)
    else:
        return (gl.load(weight + out[:, None] * BLOCK + into[None, :]),)


@jit
def _column(product, SECOND: gl.constexpr):
    """Of each row's two columns one, as a tile of gates; moves nothing."""
    BLOCK: gl.constexpr = product.shape[0]
    columns = product.reshape([BLOCK // 16, 2, 8, 8]).permute([0, 2, 1, 3]).reshape([BLOCK, _ROWS, 2])
    first, second = columns.split()
    return gl.convert_layout(second if SECOND else first, gate_layout(BLOCK, _ROWS), assert_trivial=True)


@jit
def multiply(sides, right, start):
    """The product, added to ``start``, as a tile of gates: along two chains of matrix instructions, each of which waits for the
    one before it, some 30 cycles."""
    first = mma_v2(sides[0], right, start)
    if len(sides) > 1:
        zeros = gl.full(start.shape, 0.0, gl.float32, layout=start.type.layout)
        return _column(first, False) + _column(mma_v2(sides[1], right, zeros), True)
    else:
        return to_gates(first, _ROWS)
