"""Products of a block of weights with values that have arrived, along two chains of matrix instructions side by side.

Each of these waits for the one before it, some 30 cycles, and a step has all of a product's on its way: half as many in a chain
are worth an addition.
"""

from __future__ import annotations

from ..exchange import read_chunks
from ..gluon import constexpr_function, gl, jit, mma_v2
from ..layouts import channel_of_row, product_layout, to_gates


@constexpr_function
def parts_of(BLOCK):
    """Into how many chains a product over BLOCK inputs is cut; a chunk of what arrives holds 32 of them."""
    return 2 if BLOCK > 32 else 1


@jit
def load_parts(weight, BLOCK: gl.constexpr):
    """A block of weights ``[BLOCK, BLOCK]`` (out, in) into registers, cut along its inputs: a product's left sides."""
    PARTS: gl.constexpr = parts_of(BLOCK)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(BLOCK), 2)
    out = channel_of_row(gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LEFT)))
    into = gl.arange(0, BLOCK // PARTS, layout=gl.SliceLayout(0, LEFT))
    weights = ()
    for i in gl.static_range(PARTS):
        weights = weights + (gl.load(weight + out[:, None] * BLOCK + (into + i * (BLOCK // PARTS))[None, :]),)
    return weights


@jit
def chunks_at(BLOCK: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr):
    """Where in a slot a thread's first chunk of a product's right side, or of one of PARTS of it, lies."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(BLOCK), 2)
    k = gl.arange(0, BLOCK // PARTS, layout=gl.SliceLayout(1, RIGHT))[:, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))[None, :]
    return column * ROWS // 8 * 64 + ((k >> 1) & 3) * 16


@jit
def read_parts(at, SLOT: gl.constexpr, AREA: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """What has arrived in a slot, or at a place in it that is added to ``at``, as a product's right sides."""
    PARTS: gl.constexpr = parts_of(BLOCK)
    COUNT: gl.constexpr = BLOCK // 32 // PARTS
    right = ()
    for i in gl.static_range(PARTS):
        right = right + (read_chunks(at + i * (COUNT * ROWS * 64), SLOT, AREA, COUNT, ROWS * 64),)
    return right


@jit
def multiply(weights, right, start, ROWS: gl.constexpr):
    """The product, added to ``start``, as a tile of gates."""
    result = to_gates(mma_v2(weights[0], right[0], start), ROWS)
    for i in gl.static_range(1, len(weights)):
        zeros = gl.full(start.shape, 0.0, gl.float32, layout=start.type.layout)
        result += to_gates(mma_v2(weights[i], right[i], zeros), ROWS)
    return result
