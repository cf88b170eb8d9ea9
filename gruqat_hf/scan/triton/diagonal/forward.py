"""Forward scan of a diagonal operand."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..family import KernelCall
from ..math import codes, count, gru_gates, load_grid
from .weights import DiagonalWeights, prepare

__all__ = ["call", "forward", "prepare"]


@triton.jit
def hidden_product(h, weight, scale, bias, INTEGER: tl.constexpr):
    """One gate's product of h, or of its codes, plus bias."""
    product = h * weight
    if INTEGER:
        product = product * scale
    return product + bias


@triton.jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: tl.constexpr, STATE_N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    EVEN_STEPS: tl.constexpr, REVERSE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Program (c, b): channels of tile c of row b. ``gates`` is not used: the backward kernel computes them again."""
    b = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < H
    INTEGER: tl.constexpr = scale is not None
    w_r = tl.load(weight + c, mask=inside)
    w_z = tl.load(weight + H + c, mask=inside)
    w_n = tl.load(weight + 2 * H + c, mask=inside)
    b_r = tl.load(bias + c, mask=inside)
    b_z = tl.load(bias + H + c, mask=inside)
    b_n = tl.load(bias + 2 * H + c, mask=inside)
    s_r, s_z, s_n = w_r, w_z, w_n
    if INTEGER:
        s_r = tl.load(scale + c, mask=inside)
        s_z = tl.load(scale + H + c, mask=inside)
        s_n = tl.load(scale + 2 * H + c, mask=inside)
    if h_grid is not None:
        h_scale, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, tl.minimum(c, H - 1), STATE_N)

    row = tl.cast(B, tl.int64) * H
    start = tl.cast(0, tl.int64)
    sign = 1
    if REVERSE:
        start = tl.cast(T - 1, tl.int64)
        sign = -1
    h = tl.load(h0 + b * H + c, mask=inside, other=0.0).to(tl.float32)
    gi_p = gi + (start * row + b * H) * 3 + c
    out_p = states + start * row + b * H + c
    if mask is not None:
        mask_p = mask + start * B + b
    step = row * sign
    for t in tl.range(0, count(T), UNROLL, num_stages=STAGES):
        loaded = ()
        for u in tl.static_range(UNROLL):
            here = inside
            if not EVEN_STEPS:
                here = inside & (t + u < T)
            p = gi_p + u * step * 3
            loaded = loaded + (tl.load(p, mask=here), tl.load(p + H, mask=here), tl.load(p + 2 * H, mask=here))
        for u in tl.static_range(UNROLL):
            x = h
            if h_grid is not None:
                x = codes(h, h_inv, h_low, h_high)
                if not INTEGER:
                    x = x * h_scale
            _, _, _, _, new = gru_gates(
                loaded[3 * u].to(tl.float32),
                loaded[3 * u + 1].to(tl.float32),
                loaded[3 * u + 2].to(tl.float32),
                hidden_product(x, w_r, s_r, b_r, INTEGER),
                hidden_product(x, w_z, s_z, b_z, INTEGER),
                hidden_product(x, w_n, s_n, b_n, INTEGER),
                h,
                PORTABLE,
            )
            if state_grid is not None:
                new = codes(new, state_inv, state_low, state_high) * state_scale
            here = inside
            if not EVEN_STEPS:
                here = inside & (t + u < T)
            if mask is not None:
                real = tl.load(mask_p + u * sign * B, mask=t + u < T, other=0)
                new = tl.where(real != 0, new, h)
            h = new
            tl.store(out_p + u * step, h, mask=here)
        gi_p += UNROLL * step * 3
        out_p += UNROLL * step
        if mask is not None:
            mask_p += UNROLL * sign * B


def call(
    weights: DiagonalWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> KernelCall:
    """The launch that fills ``states``."""
    steps, rows, _, hidden = gi.shape
    # The longer chain of the portable gates wants one channel to a thread.
    warps, block, stages = (1, 32, 4) if weights.quantized else (2, 64, 5)
    constants = weights.tiling(block, unroll=8, stages=stages, steps=steps, reverse=reverse)
    return KernelCall(
        kernel=_forward,
        grid=(triton.cdiv(hidden, constants["BLOCK"]), rows, 1),
        io=(gi, h0, mask, states, None),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants=constants,
        warps=warps,
        portable=weights.quantized,
    )


def forward(
    weights: DiagonalWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``."""
    call(weights, gi, h0, mask, reverse, states, gates).run()
