"""Of a step of the backward scan: what comes from global memory, and the second factor's product, on a program's own channels."""

from __future__ import annotations

from ..gluon import constexpr_function, gl, jit
from ..layouts import product_layout
from .memory import commit_step, copy_pairs, meet, put_pairs, take_pairs
from .product import multiply, take_right


@jit
def fetch_step(saved_at, state_at, saved_p, grad_p, state_p, i, end, PLANE: gl.constexpr):
    """Set out for saved gates and the gradient of step ``i``, and for the state before it, of which there is one less."""
    copy_pairs(saved_at, saved_p, i < end)
    copy_pairs(state_at, grad_p, i < end)
    copy_pairs(state_at + PLANE, state_p, i + 1 < end)
    commit_step()


@jit
def take_step(saved_at, state_at, DTYPE: gl.constexpr, PLANE: gl.constexpr):
    """The three that :func:`fetch_step` brought."""
    h = take_pairs(state_at + PLANE, DTYPE).to(gl.float32)
    d = take_pairs(state_at, DTYPE).to(gl.float32)
    return take_pairs(saved_at, gl.int64), d, h


@constexpr_function
def _bit_text(BIT):
    return f"bfe.s32 $0, $1, {BIT}, 1;"


@jit
def _everywhere(bits, BIT: gl.constexpr):
    """A bit in all places of an integer: an instruction that the compiler does not take for a comparison. Of those it has few
    results at a time, and would take one gate after the other."""
    TEXT: gl.constexpr = _bit_text(BIT)
    return gl.inline_asm_elementwise(TEXT, "=r,r", [bits.to(gl.int32)], dtype=gl.int32, is_pure=True, pack=1)


@jit
def mid_gradients(weights, scaled, c_r, c_z, c_hn, put_at, get_at, passing, FIRST_GATES: gl.constexpr):
    """Gradients of a step's mid values, each gate's or their sum, from the scaled one of its state and what multiplies that.

    Through memory at ``put_at``, which is free: all warps have met since they read it.
    """
    BLOCK: gl.constexpr = scaled.shape[0]
    SLOT: gl.constexpr = 2 * BLOCK * scaled.shape[1]
    put_pairs(put_at, (scaled * c_r).to(gl.float16))
    put_pairs(put_at + SLOT, (scaled * c_z).to(gl.float16))
    put_pairs(put_at + 2 * SLOT, (scaled * c_hn).to(gl.float16))
    meet()
    right = take_right(get_at, BLOCK), take_right(get_at + SLOT, BLOCK), take_right(get_at + 2 * SLOT, BLOCK)
    nothing = gl.full([BLOCK, 8], 0.0, gl.float32, layout=product_layout(BLOCK))
    mids = ()
    for g in gl.static_range(3):
        mids = mids + (multiply(weights[g], right[g], nothing),)
    if FIRST_GATES == 1:
        mids = ((mids[0] + mids[1]) + mids[2],)
    if passing is not None:
        passed = ()
        for g in gl.static_range(FIRST_GATES):
            passed = passed + ((mids[g].to(gl.int32, bitcast=True) & _everywhere(passing, g)).to(gl.float32, bitcast=True),)
        mids = passed
    return mids
