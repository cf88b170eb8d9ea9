"""Forward scan of a diagonal operand."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..exchange_plan import cdiv
from ..family import KernelCall
from ..math import codes, count, gru_gates, load_gate_grids, load_grid, shifted_codes, unshifted
from .weights import DiagonalWeights, hidden_product, load_gate, prepare

__all__ = ["call", "forward", "prepare"]


@triton.jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, values, scale, bias, h_grid, state_grid, gates_grid, T, B,
    H: tl.constexpr, SCALES: tl.constexpr, INTEGER: tl.constexpr, STATE_N: tl.constexpr, GATES_SHAPE: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, EVEN_STEPS: tl.constexpr, REVERSE: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Program (c, b): channels of tile c of row b. ``gates`` is not used: the backward kernel computes them again."""
    # One axis: of the others a GPU takes 65,535 programs at most.
    tiles: tl.constexpr = (H + BLOCK - 1) // BLOCK
    b = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = c < H
    w_r = load_gate(values, scale, bias, h_grid, 0, c, inside, H, SCALES, INTEGER, PORTABLE)
    w_z = load_gate(values, scale, bias, h_grid, 1, c, inside, H, SCALES, INTEGER, PORTABLE)
    w_n = load_gate(values, scale, bias, h_grid, 2, c, inside, H, SCALES, INTEGER, PORTABLE)
    if h_grid is not None:
        h_scale, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, tl.minimum(c, H - 1), STATE_N)
    gate_grids = None
    if gates_grid is not None:
        gate_grids = load_gate_grids(gates_grid, tl.minimum(c, H - 1), GATES_SHAPE)

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
                x = shifted_codes(h, h_inv, h_low, h_high)
                if not INTEGER:
                    x = unshifted(x) * h_scale
            _, _, _, _, new = gru_gates(
                loaded[3 * u].to(tl.float32),
                loaded[3 * u + 1].to(tl.float32),
                loaded[3 * u + 2].to(tl.float32),
                hidden_product(x, w_r, INTEGER),
                hidden_product(x, w_z, INTEGER),
                hidden_product(x, w_n, INTEGER),
                h,
                PORTABLE,
                gate_grids,
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
    constants = weights.tiling(block, unroll=8, stages=stages, steps=steps, reverse=reverse, portable=weights.quantized)
    return KernelCall(
        kernel=_forward,
        grid=(cdiv(hidden, constants["BLOCK"]) * rows, 1, 1),
        io=(gi, h0, mask, states, None),
        static=(*weights.static, steps, rows),
        constants=constants,
        warps=warps,
        portable=weights.quantized,
    )


def forward(
    weights: DiagonalWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``."""
    call(weights, gi, h0, mask, reverse, states, gates).run()
