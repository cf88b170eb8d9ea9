"""Backward scan of a diagonal operand: gates are computed again from the saved states, off the recurrence's critical path."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import device_facts
from ..exchange_plan import cdiv
from ..family import KernelCall, ScanGradients
from ..math import (
    clamp,
    count,
    gru_gates,
    gru_gradients,
    in_range,
    load_gate_grids,
    load_grid,
    shifted_codes,
    unshifted,
)
from .weights import DiagonalWeights, hidden_product, load_gate, load_scale, load_values, prepare

__all__ = ["backward", "prepare"]

#: Rows of the sums that a program leaves for its channels: weights, hidden bias and input bias of r, z, n.
_SUMS = 9


#: Steps of a chunk at least, where a scan is cut into chunks for want of rows, programs for each processor to be had so, and
#: chunks that are worth doing much of the work twice.
_CHUNK, _PROGRAMS, _FEWEST_CHUNKS = 64, 4, 3


@triton.jit(do_not_specialize=["T", "B", "CHUNK", "CHUNKS"])
def _backward(
    gi, h0, mask, states, dstates, dlast, dgi, dh0, adjoint, sums, maps, values, scale, bias, h_grid, state_grid, gates_grid,
    T, B, CHUNK, CHUNKS, ONLY_MAPS: tl.constexpr,
    H: tl.constexpr, SCALES: tl.constexpr, INTEGER: tl.constexpr, STATE_N: tl.constexpr, GATES_SHAPE: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, EVEN_STEPS: tl.constexpr, REVERSE: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Program (c, b, j): channels of tile c of row b, from the last step of chunk j of the scan to its first.

    The gradient of the state is a linear recurrence, ``carry = (dstates + carry) * slope``; slopes need no carry. So a chunk of
    steps is a map, ``carry * a + o``, and all chunks can be computed at once, once the maps of those behind them are known:
    ``maps`` ``[2, CHUNKS, B, H]``, None for a single chunk. ONLY_MAPS fills them, of all chunks but the first.
    """
    tiles: tl.constexpr = (H + BLOCK - 1) // BLOCK
    b = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = c < H
    w_r = load_gate(values, scale, bias, h_grid, 0, c, inside, H, SCALES, INTEGER, PORTABLE)
    w_z = load_gate(values, scale, bias, h_grid, 1, c, inside, H, SCALES, INTEGER, PORTABLE)
    w_n = load_gate(values, scale, bias, h_grid, 2, c, inside, H, SCALES, INTEGER, PORTABLE)
    f_r = load_values(values, 0, c, inside, H) * load_scale(scale, 0, c, inside, H, SCALES)
    f_z = load_values(values, 1, c, inside, H) * load_scale(scale, 1, c, inside, H, SCALES)
    f_n = load_values(values, 2, c, inside, H) * load_scale(scale, 2, c, inside, H, SCALES)
    if h_grid is not None:
        h_scale, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        _, state_inv, state_low, state_high = load_grid(state_grid, tl.minimum(c, H - 1), STATE_N)
    gate_grids = None
    if gates_grid is not None:
        gate_grids = load_gate_grids(gates_grid, tl.minimum(c, H - 1), GATES_SHAPE)

    row = tl.cast(B, tl.int64) * H
    j = tl.program_id(1)
    if ONLY_MAPS:
        j += 1
    begin = j * CHUNK
    length = tl.minimum(T - begin, CHUNK)
    # Steps that round the number up to whole groups come first, where the carry is left as it is.
    first = begin + tl.cdiv(length, UNROLL) * UNROLL - 1
    start = tl.cast(first, tl.int64)
    sign = 1
    if REVERSE:
        start = tl.cast(T - 1 - first, tl.int64)
        sign = -1
    step = row * sign
    initial = tl.load(h0 + b * H + c, mask=inside, other=0.0).to(tl.float32)
    carry = tl.zeros((BLOCK,), tl.float32)
    factor = carry + 1.0
    if not ONLY_MAPS:
        carry = tl.load(dlast + b * H + c, mask=inside, other=0.0).to(tl.float32)
        if maps is not None:
            for behind in tl.range(0, count(CHUNKS - 1 - j), num_stages=STAGES):
                map_p = maps + (CHUNKS - 1 - behind) * row + b * H + c
                a = tl.load(map_p, mask=inside, other=0.0)
                carry = carry * a + tl.load(map_p + CHUNKS * row, mask=inside, other=0.0)
    gi_p = gi + (start * row + b * H) * 3 + c
    dgi_p = dgi + (start * row + b * H) * 3 + c
    at = start * row + b * H + c
    dw_r = tl.zeros((BLOCK,), tl.float32)
    dw_z, dw_n, db_r, db_z, db_n, db_in = dw_r, dw_r, dw_r, dw_r, dw_r, dw_r
    for i in tl.range(0, count(length), UNROLL, num_stages=STAGES):
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
                x = shifted_codes(h, h_inv, h_low, h_high)
                clip = tl.where(in_range(h, h_inv, h_low, h_high), 1.0, 0.0)
                if not INTEGER:
                    x = unshifted(x) * h_scale
            r, z, n, hn, new = gru_gates(
                loaded[5 * u].to(tl.float32),
                loaded[5 * u + 1].to(tl.float32),
                loaded[5 * u + 2].to(tl.float32),
                hidden_product(x, w_r, INTEGER),
                hidden_product(x, w_z, INTEGER),
                hidden_product(x, w_n, INTEGER),
                h,
                PORTABLE,
                gate_grids,
            )
            if INTEGER:
                x = unshifted(x)
            kept = tl.full((BLOCK,), 1.0, tl.float32)
            if state_grid is not None:
                kept = tl.where(in_range(new, state_inv, state_low, state_high), 1.0, 0.0)
            da_r, da_z, da_n, dh_n, dh = gru_gradients(kept, r, z, n, hn, h, gates_grid is not None)
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
                slope = tl.where(runs, slope, 1.0)
            grad = loaded[5 * u + 4].to(tl.float32) + carry
            carry = grad * slope
            if ONLY_MAPS:
                factor = clamp(factor * slope, -3e38, 3e38)  # an infinite one would make NaN of a carry of 0
            else:
                da_r = grad * da_r
                da_z = grad * da_z
                da_n = grad * da_n
                dh_n = grad * dh_n
                if (mask is not None) or (not EVEN_STEPS):
                    da_r = tl.where(runs, da_r, 0.0)
                    da_z = tl.where(runs, da_z, 0.0)
                    da_n = tl.where(runs, da_n, 0.0)
                    dh_n = tl.where(runs, dh_n, 0.0)
                p = dgi_p - u * step * 3
                tl.store(p, da_r, mask=here)
                tl.store(p + H, da_z, mask=here)
                tl.store(p + 2 * H, da_n, mask=here)
                if adjoint is not None:
                    tl.store(adjoint + (at - u * step), tl.where(runs, grad, 0.0), mask=here)
                dw_r += da_r * x
                dw_z += da_z * x
                dw_n += dh_n * x
                db_r += da_r
                db_z += da_z
                db_n += dh_n
                db_in += da_n
        gi_p -= UNROLL * step * 3
        dgi_p -= UNROLL * step * 3
        at -= UNROLL * step
    if ONLY_MAPS:
        map_p = maps + j * row + b * H + c
        tl.store(map_p, factor, mask=inside)
        tl.store(map_p + CHUNKS * row, carry, mask=inside)
    else:
        tl.store(dh0 + b * H + c, carry, mask=inside & (j == 0))
        # Of the factor's values, which a scale multiplies in the product.
        unit = 1.0
        if INTEGER:
            unit = h_scale
        sums_p = sums + j * row + b * H + c
        plane = CHUNKS * row
        tl.store(sums_p, dw_r * (unit * load_scale(scale, 0, c, inside, H, SCALES)), mask=inside)
        tl.store(sums_p + plane, dw_z * (unit * load_scale(scale, 1, c, inside, H, SCALES)), mask=inside)
        tl.store(sums_p + 2 * plane, dw_n * (unit * load_scale(scale, 2, c, inside, H, SCALES)), mask=inside)
        tl.store(sums_p + 3 * plane, db_r, mask=inside)
        tl.store(sums_p + 4 * plane, db_z, mask=inside)
        tl.store(sums_p + 5 * plane, db_n, mask=inside)
        tl.store(sums_p + 6 * plane, db_r, mask=inside)
        tl.store(sums_p + 7 * plane, db_z, mask=inside)
        tl.store(sums_p + 8 * plane, db_in, mask=inside)


def backward(
    weights: DiagonalWeights,
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
    """Gradients of the sequence, of h0, of the weights and of both biases.

    Gates are the float state's in every state: what they lack in exactness no gradient shows, and they take half the time. Only
    where pre-activations have a grid they must be the forward scan's, or some would round to other codes.
    """
    portable = weights.gates_grid is not None
    steps, rows, _, hidden = gi.shape
    dgi, dh0 = torch.empty_like(gi), torch.empty_like(h0)
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    constants = weights.tiling(64, unroll=4, stages=4, steps=steps, reverse=reverse, portable=portable)
    tiles = cdiv(hidden, constants["BLOCK"])
    chunks = min(_PROGRAMS * device_facts(gi.device).processors // (tiles * rows), steps // _CHUNK)
    chunks = chunks if chunks >= _FEWEST_CHUNKS else 1
    chunk = cdiv(cdiv(steps, chunks), constants["UNROLL"]) * constants["UNROLL"]
    chunks = cdiv(steps, chunk)
    sums = gi.new_empty((_SUMS, chunks * rows, hidden), dtype=torch.float32)
    maps = gi.new_empty((2, chunks, rows, hidden), dtype=torch.float32) if chunks > 1 else None
    for only_maps in (True, False) if chunks > 1 else (False,):
        KernelCall(
            kernel=_backward,
            grid=(tiles * rows, chunks - 1 if only_maps else chunks, 1),
            io=(gi, h0, mask, states, dstates, dlast, dgi, dh0, adjoint, sums, maps),
            static=(*weights.static, steps, rows, chunk, chunks),
            constants={"ONLY_MAPS": only_maps, **constants},
            warps=1,
            portable=portable,
        ).run()
    dfirst, dbias, dbias_input = sums.sum(1).split(3)
    if not want_weights:
        dfirst = dbias = None
    return ScanGradients(dgi, dh0, adjoint=adjoint, dfirst=dfirst, dbias=dbias, dbias_input=dbias_input)
