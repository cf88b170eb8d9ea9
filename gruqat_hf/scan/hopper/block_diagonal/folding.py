"""Products of narrow tiles, of which no column is computed twice.

An instruction takes 8 columns, a tile has 4 rows. Its channels are folded: beside the column with one half of a row's channels
lies that with the other half, and each half has weights of its own:

    columns                  row 0, first half | row 0, second half | row 1, first half | ...
    first half's weights:      part of row 0   |      nonsense      |   part of row 1   | ...
    second half's weights:       nonsense      |   part of row 0    |     nonsense      | ...

As many instructions as with each row in two columns, but half of the operand to write and read. A thread has both columns of its
row, so that the parts are one addition away from their sum. Halves are runs of 8 channels in turn: what a warp writes then lies
in different banks.

With a tile of 2 rows everything is there twice: a row's sums of 2 channels are in 2 lanes, of which each keeps one. As many
instructions as for 4 rows, but a thread has gates of 1 element to compute:

    lane 0: c0 of row 0 | lane 1: c1 of row 0 | lane 2: c0 of row 1 | lane 3: c1 of row 1 | lane 4: c2 of row 0 | ...
"""

from __future__ import annotations

from ..gluon import constexpr_function, gl, jit, mma_v2
from ..layouts import channel_of_row, gate_layout, load_weights, product_layout, ring_memory, to_columns, to_gates


@constexpr_function
def is_folded(BLOCK, ROWS):
    """Half of the channels must fill an instruction's 16. Tiles of 2 rows are always folded."""
    return ROWS <= 4 and BLOCK >= 32


@constexpr_function
def tile_layout(BLOCK, ROWS):
    """Of a tile of gates, of 2 rows too."""
    if ROWS > 2:
        return gate_layout(BLOCK, ROWS)
    above = [[channel, 0] for channel in (16, 32, 64) if channel < BLOCK]
    return gl.DistributedLinearLayout([], [[1, 0], [0, 1], [2, 0], [4, 0], [8, 0]], above, [], [BLOCK, 2])


@constexpr_function
def tile_memory(BLOCK, ROWS, BYTES):
    """As ``ring_memory``; a warp reads 64 bytes of each of 2 rows, which are shifted against each other by that."""
    if ROWS > 2:
        return ring_memory(BLOCK, ROWS, BYTES)
    line = max(1, 128 // (BLOCK * BYTES))
    return gl.SwizzledSharedLayout(64 // BYTES, line, max(1, 2 // line), [1, 0])


@constexpr_function
def _pair_layout(BLOCK):
    """Of sums of 2 rows, one of a pair of channels in each lane."""
    above = [[pair, 0] for pair in (8, 16, 32) if pair < BLOCK // 2]
    return gl.DistributedLinearLayout([], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], above, [], [BLOCK // 2, 4])


@jit
def load_sides(weight, BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """A block of weights as left sides of :func:`multiply`: of both halves, or twice the whole."""
    if is_folded(BLOCK, ROWS):
        LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(BLOCK), 2)
        out = channel_of_row(gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LEFT)))
        line = gl.arange(0, BLOCK // 2, layout=gl.SliceLayout(0, LEFT))
        first = weight + out[:, None] * BLOCK + (line // 8 * 16 + line % 8)[None, :]
        return gl.load(first), gl.load(first + 8)
    else:
        whole = load_weights(weight, BLOCK)
        return whole, whole


@jit
def to_right(x):
    """A tile ``[BLOCK, ROWS]`` as right side of :func:`multiply`."""
    BLOCK: gl.constexpr = x.shape[0]
    if is_folded(BLOCK, x.shape[1]):
        if x.shape[1] == 2:
            x = gl.join(x, x).reshape([BLOCK, 4])
        return x.reshape([BLOCK // 16, 2, 8, 4]).permute([0, 2, 3, 1]).reshape([BLOCK // 2, 8])
    else:
        return to_columns(x)


@jit
def _column(product, SECOND: gl.constexpr):
    """Of each pair of a product's columns one, as a tile of gates; moves nothing."""
    BLOCK: gl.constexpr = product.shape[0]
    pairs = product.reshape([BLOCK // 16, 2, 8, 8]).permute([0, 2, 1, 3]).reshape([BLOCK, 4, 2])
    first, second = pairs.split()
    return gl.convert_layout(second if SECOND else first, gate_layout(BLOCK, 4), assert_trivial=True)


@jit
def _own(sums):
    """Sums ``[BLOCK, 4]`` of 2 rows, each in two lanes, as a tile of gates; moves nothing."""
    BLOCK: gl.constexpr = sums.shape[0]
    PAIRS: gl.constexpr = _pair_layout(BLOCK)
    even, odd = sums.reshape([BLOCK // 2, 2, 4]).permute([0, 2, 1]).split()
    is_even = gl.arange(0, 4, layout=gl.SliceLayout(0, PAIRS)) % 2 == 0
    even = gl.convert_layout(even, PAIRS, assert_trivial=True)
    x = gl.where(is_even[None, :], even, gl.convert_layout(odd, PAIRS, assert_trivial=True))
    x = x.reshape([BLOCK // 2, 2, 2]).permute([0, 2, 1]).reshape([BLOCK, 2])
    return gl.convert_layout(x, tile_layout(BLOCK, 2), assert_trivial=True)


@jit
def multiply(sides, right, ROWS: gl.constexpr, start=None):
    """Weights of :func:`load_sides` times a tile of :func:`to_right`, as a tile of gates. Added to the product
    ``start``, if given."""
    BLOCK: gl.constexpr = sides[0].shape[0]
    zeros = gl.full([BLOCK, 8], 0.0, gl.float32, layout=product_layout(BLOCK))
    first = mma_v2(sides[0], right, zeros if start is None else start)
    if ROWS == 2:
        return _own(_column(first, False) + _column(mma_v2(sides[1], right, zeros), True))
    elif is_folded(BLOCK, ROWS):
        return _column(first, False) + _column(mma_v2(sides[1], right, zeros), True)
    else:
        return to_gates(first, ROWS)


@jit
def multiply_two(sides, right, more_sides, more_right, ROWS: gl.constexpr):
    """The sum of two such products. Of folded tiles the second is added to the first: they are short enough to come one after the
    other, beside a third."""
    if is_folded(sides[0].shape[0], ROWS):
        zeros = gl.full([sides[0].shape[0], 8], 0.0, gl.float32, layout=product_layout(sides[0].shape[0]))
        first = mma_v2(more_sides[0], more_right, mma_v2(sides[0], right, zeros))
        second = mma_v2(more_sides[1], more_right, mma_v2(sides[1], right, zeros))
        return _column(first, False) + _column(second, True)
    else:
        return multiply(sides, right, ROWS) + multiply(more_sides, more_right, ROWS)
