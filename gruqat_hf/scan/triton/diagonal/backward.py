"""Backward scan of a diagonal operand: gates are computed again from the saved states, off the recurrence's critical path."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ScanSpec, is_integer
from ..family import KernelCall, ScanGradients
from ..math import codes, count, gate_factors, gru_gates, gru_gradients, in_range, load_grid
from .forward import hidden_product
from .weights import DiagonalWeights
from .weights import prepare as prepare_forward

#: Rows of the sums that a program leaves for its channels: weights and biases of r, z, n.
_SUMS = 6


@triton.jit(do_not_specialize=["T", "B"])
def _backward(
    gi, h0, mask, states, dstates, dlast, dgi, dh0, adjoint, sums, float_weight, weight, scale, bias, h_grid, state_grid, T, B,
    H: tl.constexpr, STATE_N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    EVEN_STEPS: tl.constexpr, REVERSE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Program (c, b): channels of tile c of row b, from the last step of the scan to the first.

    The gradient of the state is a linear recurrence, ``carry = (dstates + carry) * slope``; slopes need no carry.
    """
    b = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < H
    INTEGER: tl.constexpr = scale is not None
    w_r = tl.load(weight + c, mask=inside)
    w_z = tl.load(weight + H + c, mask=inside)
    w_n = tl.load(weight + 2 * H + c, mask=inside)
    f_r = tl.load(float_weight + c, mask=inside)
    f_z = tl.load(float_weight + H + c, mask=inside)
    f_n = tl.load(float_weight + 2 * H + c, mask=inside)
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
        _, state_inv, state_low, state_high = load_grid(state_grid, tl.minimum(c, H - 1), STATE_N)

    row = tl.cast(B, tl.int64) * H
    # Steps that round the number up to whole groups come first, where the carry is left as it is.
    first = tl.cdiv(T, UNROLL) * UNROLL - 1
    start = tl.cast(first, tl.int64)
    sign = 1
    if REVERSE:
        start = tl.cast(T - 1 - first, tl.int64)
        sign = -1
    step = row * sign
    initial = tl.load(h0 + b * H + c, mask=inside, other=0.0).to(tl.float32)
    carry = tl.load(dlast + b * H + c, mask=inside, other=0.0).to(tl.float32)
    gi_p = gi + (start * row + b * H) * 3 + c
    dgi_p = dgi + (start * row + b * H) * 3 + c
    at = start * row + b * H + c
    dw_r = tl.zeros((BLOCK,), tl.float32)
    dw_z, dw_n, db_r, db_z, db_n = dw_r, dw_r, dw_r, dw_r, dw_r
    for i in tl.range(0, count(T), UNROLL, num_stages=STAGES):
        loaded = ()
        for u in tl.static_range(UNROLL):
            s = first - i - u
            here = inside
            if not EVEN_STEPS:
                here = inside & (s < T)
            p = gi_p - u * step * 3
            loaded = loaded + (
                tl.load(p, mask=here, other=0.0),
                tl.load(p + H, mask=here, other=0.0),
                tl.load(p + 2 * H, mask=here, other=0.0),
                tl.load(states + (at - (u + 1) * step), mask=here & (s > 0), other=0.0),
                tl.load(dstates + (at - u * step), mask=here, other=0.0),
            )
        for u in tl.static_range(UNROLL):
            s = first - i - u
            h = tl.where(s == 0, initial, loaded[5 * u + 3].to(tl.float32))
            x = h
            clip = 1.0
            if h_grid is not None:
                x = codes(h, h_inv, h_low, h_high)
                clip = tl.where(in_range(h, h_inv, h_low, h_high), 1.0, 0.0)
                if not INTEGER:
                    x = x * h_scale
            r, z, n, hn, new = gru_gates(
                loaded[5 * u].to(tl.float32),
                loaded[5 * u + 1].to(tl.float32),
                loaded[5 * u + 2].to(tl.float32),
                hidden_product(x, w_r, s_r, b_r, INTEGER),
                hidden_product(x, w_z, s_z, b_z, INTEGER),
                hidden_product(x, w_n, s_n, b_n, INTEGER),
                h,
                PORTABLE,
            )
            kept = tl.full((BLOCK,), 1.0, tl.float32)
            if state_grid is not None:
                kept = tl.where(in_range(new, state_inv, state_low, state_high), 1.0, 0.0)
            da_r, da_z, da_n, dh_n, dh = gru_gradients(kept, r, z, n, hn, h)
            slope = dh + clip * (f_r * da_r + f_z * da_z + f_n * dh_n)
            here = inside
            runs = inside
            if not EVEN_STEPS:
                here = inside & (s < T)
                runs = here
            if mask is not None:
                position = start - (i + u) * sign
                real = tl.load(mask + position * B + b, mask=s < T, other=0)
                runs = here & (real != 0)
            if (mask is not None) or (not EVEN_STEPS):
                da_r = tl.where(runs, da_r, 0.0)
                da_z = tl.where(runs, da_z, 0.0)
                da_n = tl.where(runs, da_n, 0.0)
                dh_n = tl.where(runs, dh_n, 0.0)
                slope = tl.where(runs, slope, 1.0)
            grad = loaded[5 * u + 4].to(tl.float32) + carry
            carry = grad * slope
            da_r = grad * da_r
            da_z = grad * da_z
            dh_n = grad * dh_n
            p = dgi_p - u * step * 3
            tl.store(p, da_r, mask=here)
            tl.store(p + H, da_z, mask=here)
            tl.store(p + 2 * H, grad * da_n, mask=here)
            if adjoint is not None:
                tl.store(adjoint + (at - u * step), tl.where(runs, grad, 0.0), mask=here)
            dw_r += da_r * x
            dw_z += da_z * x
            dw_n += dh_n * x
            db_r += da_r
            db_z += da_z
            db_n += dh_n
        gi_p -= UNROLL * step * 3
        dgi_p -= UNROLL * step * 3
        at -= UNROLL * step
    tl.store(dh0 + b * H + c, carry, mask=inside)
    sums_p = sums + b * H + c
    tl.store(sums_p, dw_r, mask=inside)
    tl.store(sums_p + row, dw_z, mask=inside)
    tl.store(sums_p + 2 * row, dw_n, mask=inside)
    tl.store(sums_p + 3 * row, db_r, mask=inside)
    tl.store(sums_p + 4 * row, db_z, mask=inside)
    tl.store(sums_p + 5 * row, db_n, mask=inside)


def prepare(spec: ScanSpec) -> tuple[DiagonalWeights, Tensor, Tensor | None]:
    """Weights to compute gates again, the float ones ``[3, H]``, and what a gradient of the operand's values is multiplied by.

    Gates are the float state's in every state: what they lack in exactness no gradient shows, and they take half the time.
    """
    (factor,) = spec.operand.factors.values()
    weights = prepare_forward(spec)
    scale = weights.scale if is_integer(factor, spec.grids.h) else factor.scale
    if weights.quantized:
        factors = gate_factors(weights.weight.device)
        if weights.scale is None:
            weights = weights._replace(weight=weights.weight * factors)
        else:
            weights = weights._replace(scale=weights.scale * factors)
        weights = weights._replace(bias=weights.bias * factors, quantized=False)
    return weights, factor.dequantize().float().contiguous(), scale


def backward(
    prepared: tuple[DiagonalWeights, Tensor, Tensor | None],
    gi: Tensor,
    h0: Tensor,
    states: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    reverse: bool,
    dstates: Tensor,
    dlast: Tensor,
    want_adjoint: bool,
    want_weights: bool,
) -> ScanGradients:
    """Gradients of the sequence, of h0, of the weights and of the bias."""
    weights, float_weight, scale = prepared
    steps, rows, _, hidden = gi.shape
    dgi, dh0 = torch.empty_like(gi), torch.empty_like(h0)
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    sums = gi.new_empty((_SUMS, rows, hidden), dtype=torch.float32)
    constants = weights.tiling(64, unroll=4, stages=4, steps=steps, reverse=reverse)
    KernelCall(
        kernel=_backward,
        grid=(triton.cdiv(hidden, constants["BLOCK"]), rows, 1),
        io=(gi, h0, mask, states, dstates, dlast, dgi, dh0, adjoint, sums),
        static=(
            float_weight, weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows,
        ),
        constants=constants,
        warps=1,
    ).run()  # fmt: skip
    if not want_weights:
        return ScanGradients(dgi, dh0, adjoint=adjoint)
    dweight, dbias = sums[:3].sum(1), sums[3:].sum(1)
    return ScanGradients(dgi, dh0, adjoint=adjoint, dfirst=dweight if scale is None else dweight * scale, dbias=dbias)
