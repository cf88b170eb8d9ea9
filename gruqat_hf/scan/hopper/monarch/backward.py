"""Backward scan of two-factor operands on Hopper clusters, from the last step of the scan to the first.

A step waits for: the state's gradient, that times three coefficients to shared memory, barrier, product with the second factor,
its result to the others, product with the first, its result to the others. Coefficients follow from saved gates and states
alone, and are ready before.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...replay import before_steps
from ...triton.block_diagonal.weights import packed
from ...triton.family import ScanGradients
from ...triton.math import in_range, load_grid
from ...triton.monarch import backward as portable
from ...triton.monarch.weights import mid_values, weight_gradients
from ..cluster import ClusterCall
from ..exchange import area_of, area_shape, close_exchange, open_exchange, read_chunks, read_pairs, send_pairs, wait_for_round
from ..gluon import gl, jit, mma_v2
from ..gradients import coefficients, hear_largest, maxima_bytes, powers, tell_largest
from ..layouts import gate_layout, load_weights, product_layout, to_columns, to_gates
from ..staging import operands
from . import TILE_ROWS
from .weights import BackwardWeights
from .weights import backward_weights as prepare

__all__ = ["backward", "prepare"]

#: Steps between two looks at the size of gradients; even.
_RESCALE = 16


@jit
def _load_step(gates, dstates, states, passes, at, step, mask, i, T):
    """What step ``i`` needs, which lies at ``at``; zero where it does not run."""
    saved = gl.load(gates + at, mask=mask & (i < T), other=0)
    d = gl.load(dstates + at, mask=mask & (i < T), other=0.0)
    h = gl.load(states + at + step, mask=mask & (i + 1 < T), other=0.0)
    if passes is not None:
        return saved, d, h, gl.load(passes + at, mask=mask & (i < T), other=0)
    else:
        return saved, d, h


@jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, passes, dstates, dlast, dgi, dgh_n, dh0, adjoint, dmid, largest_gradient, first, second, h_grid,
    T, B, H: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, FIRST_GATES: gl.constexpr, RESCALE: gl.constexpr,
    REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (p, j): block p of either factor, of rows j * ROWS and on. Parameters as in the portable kernel; ``dmid`` may be
    None, ``largest_gradient`` is that of dstates, then that of dlast.

    Steps go in pairs; those of the next pair are in registers or on their way there.
    """
    BLOCK: gl.constexpr = H // PROGRAMS
    SHARE: gl.constexpr = BLOCK // PROGRAMS
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    PRODUCT: gl.constexpr = product_layout(BLOCK)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    SLOT: gl.constexpr = BLOCK * ROWS * 2
    AREA: gl.constexpr = area_shape((FIRST_GATES * SLOT, SLOT), 2, maxima_bytes(PROGRAMS, ROWS, BLOCK // 16))
    GATE: gl.constexpr = PROGRAMS * BLOCK * BLOCK
    ITEMS: gl.constexpr = 3 if passes is None else 4
    part = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS

    first_tile = first + part * (BLOCK * BLOCK)
    second_tile = second + part * (BLOCK * BLOCK)
    first_weights = ()
    for g in gl.static_range(FIRST_GATES):
        first_weights = first_weights + (load_weights(first_tile + g * GATE, BLOCK),)
    w_r = load_weights(second_tile, BLOCK)
    w_z = load_weights(second_tile + GATE, BLOCK)
    w_n = load_weights(second_tile + 2 * GATE, BLOCK)
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)

    u = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    j = gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    b = first_row + j
    c = u * PROGRAMS + part
    row = B.to(gl.int64) * H
    sign: gl.constexpr = 1 if REVERSE else -1
    start = gl.to_tensor(0).to(gl.int64) if REVERSE else (T - 1).to(gl.int64)
    step = row * sign
    inside = (b < B)[None, :] & (u >= 0)[:, None]
    offset = b[None, :] * H + c[:, None]
    wide = b[None, :] * (3 * H) + c[:, None]
    initial = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    carry = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32)
    at = start * row
    if mask is not None:
        mask_p = mask + start * B + b
    peak = gl.load(largest_gradient)
    zero_row = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(0, GATES))
    up, down = powers(zero_row + gl.maximum(peak, gl.load(largest_gradient + 1)), 0)
    now = _load_step(gates, dstates, states, passes, at + offset, step, inside, 0, T)
    now = now + _load_step(gates, dstates, states, passes, at + step + offset, step, inside, 1, T)

    x_even = operands(BLOCK)
    x_odd = operands(BLOCK)
    zeros = gl.full([BLOCK, 8], 0.0, gl.float32, layout=PRODUCT)
    k = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, RIGHT))[:, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))[None, :]
    operand_at = column * ROWS // 8 * 64 + ((k >> 1) & 3) * 16
    number = part * SHARE + u % SHARE
    place = ((number >> 5) * (ROWS * 64) + ((number >> 3) & 3) * 16 + (number & 7) * 2)[:, None] + j[None, :] * 64
    carry_at = ((u >> 5) * (ROWS * 64) + ((u >> 3) & 3) * 16 + (u & 7) * 2)[:, None] + j[None, :] * 64
    open_exchange(AREA)
    area = area_of((u // SHARE)[:, None] + j[None, :] * 0)
    to = area + place

    h = gl.where(T == 1, initial, now[2].to(gl.float32))
    runs = inside
    if mask is not None:
        runs = inside & (gl.load(mask_p, mask=b < B, other=0) != 0)[None, :]
    c_r, c_z, c_hn, c_n, direct = coefficients(now[0], h, runs)
    d = now[1].to(gl.float32)

    for t in range(0, T, 2):
        ahead = at + step * 2 + offset
        coming = _load_step(gates, dstates, states, passes, ahead, step, inside, t + 2, T)
        coming = coming + _load_step(gates, dstates, states, passes, ahead + step, step, inside, t + 3, T)
        for i in gl.static_range(2):
            if i == 0:
                if t % RESCALE == 0:
                    tell_largest(carry, part, PROGRAMS, 4, AREA)
            elif t % RESCALE == 0:
                largest = hear_largest(t // RESCALE, PROGRAMS, ROWS, 4, AREA, GATES)
                up, down = powers(gl.maximum(largest, peak), 0)
            grad = d + carry
            scaled = d * up[None, :] + carry * up[None, :]
            x = x_even if i == 0 else x_odd
            x[0].store(to_columns((scaled * c_r).to(gl.float16)))
            x[1].store(to_columns((scaled * c_z).to(gl.float16)))
            x[2].store(to_columns((scaled * c_hn).to(gl.float16)))
            here = inside & (t + i < T)
            mids = (mma_v2(w_r, x[0].load(RIGHT), zeros),)
            if FIRST_GATES == 1:
                mids = (mma_v2(w_n, x[2].load(RIGHT), mma_v2(w_z, x[1].load(RIGHT), mids[0])),)
            else:
                mids = mids + (mma_v2(w_z, x[1].load(RIGHT), zeros), mma_v2(w_n, x[2].load(RIGHT), zeros))
            for g in gl.static_range(FIRST_GATES):
                mid = to_gates(mids[g], ROWS)
                if passes is not None:
                    mid = gl.where(((now[i * ITEMS + 3].to(gl.int32) >> g) & 1) != 0, mid, 0.0)
                send_pairs(mid.to(gl.float16), area, to + g * SLOT, 2 * i, AREA)
                if dmid is not None:
                    dmid_p = dmid + at * FIRST_GATES + (b[None, :] * (FIRST_GATES * H) + c[:, None]) + g * H
                    gl.store(dmid_p, mid * down[None, :], mask=here)

            if adjoint is not None:
                gl.store(adjoint + at + offset, gl.where(runs, grad, 0.0), mask=here)
            dgi_p = dgi + at * 3 + wide
            gl.store(dgi_p, (grad * c_r).to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + H, (grad * c_z).to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + 2 * H, (grad * c_n).to(dgi.dtype.element_ty), mask=here)
            gl.store(dgh_n + at + offset, (grad * c_hn).to(dgi.dtype.element_ty), mask=here)
            at += step

            wait_for_round(t // 2, 2 * i, AREA)
            total = zeros
            for g in gl.static_range(FIRST_GATES):
                right = read_chunks(operand_at + g * SLOT, 2 * i, AREA, BLOCK // 32, ROWS * 64)
                total = mma_v2(first_weights[g], right, total)
            send_pairs(to_gates(total, ROWS).to(gl.float16), area, to, 2 * i + 1, AREA)

            # The next step's coefficients, while the others' results are on their way.
            weighted = gl.full([BLOCK, ROWS], 1.0, gl.float32, layout=GATES) * down[None, :]
            if h_grid is not None:
                weighted = gl.where(in_range(h, h_inv, h_low, h_high), weighted, 0.0)
            passed = grad * direct
            next_saved = now[ITEMS] if i == 0 else coming[0]
            next_h = now[ITEMS + 2] if i == 0 else coming[2]
            d = (now[ITEMS + 1] if i == 0 else coming[1]).to(gl.float32)
            h = gl.where(t + i + 2 == T, initial, next_h.to(gl.float32))
            runs = inside & (t + i + 1 < T)
            if mask is not None:
                mask_p += sign * B
                runs = runs & (gl.load(mask_p, mask=(b < B) & (t + i + 1 < T), other=0) != 0)[None, :]
            c_r, c_z, c_hn, c_n, direct = coefficients(next_saved, h, runs)
            wait_for_round(t // 2, 2 * i + 1, AREA)
            carry = read_pairs(carry_at, 2 * i + 1, AREA).to(gl.float32) * weighted + passed
        now = coming
    gl.store(dh0 + offset, carry.to(dh0.dtype.element_ty), mask=inside)
    close_exchange()


def backward(
    prepared: BackwardWeights,
    gi: Tensor,
    h0: Tensor,
    states: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    reverse: bool,
    dstates: Tensor,
    dlast: Tensor,
    want_adjoint: bool,
    want_weights: bool = False,
) -> ScanGradients:
    """Gradients of the scan's inputs and, if wanted, of the weights."""
    if prepared.portable is not None:
        scan = gi, h0, states, gates, mask, reverse, dstates, dlast
        return portable.backward(prepared.portable, *scan, want_adjoint, want_weights)
    spec = prepared.spec
    assert prepared.first is not None
    steps, rows, _, hidden = gi.shape
    first_gates, programs, block, _ = prepared.first.shape
    before = mid = None
    if want_weights or spec.grids.mid is not None:
        before = before_steps(states, h0, reverse).flatten(0, 1).float()
        mid = mid_values(spec, before)
    dgi, dgh_n, dh0 = torch.empty_like(gi), gi.new_empty((steps, rows, hidden)), torch.empty_like(h0)
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    dmid = gi.new_empty((steps, rows, first_gates, hidden), dtype=torch.float32) if want_weights else None
    largest = torch.stack([torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) for x in (dstates, dlast)])
    passes = None if mid is None else mid.passes
    ClusterCall(
        kernel=_backward,
        grid=(1, triton.cdiv(rows, TILE_ROWS), 1),
        io=(h0, mask, states, packed(gates), passes, dstates, dlast, dgi, dgh_n, dh0, adjoint, dmid),
        static=(largest, prepared.first, prepared.second, prepared.h_grid, steps, rows),
        constants={
            "H": hidden,
            "PROGRAMS": programs,
            "ROWS": TILE_ROWS,
            "FIRST_GATES": first_gates,
            "RESCALE": _RESCALE,
            "REVERSE": reverse,
        },
        warps=block // 16,
        cluster=programs,
    ).run()
    dfirst = dsecond = dbias = None
    if want_weights:
        assert before is not None and mid is not None and dmid is not None
        rows_of = (dmid.flatten(0, 1), dgi.flatten(0, 1), dgh_n.flatten(0, 1))
        dfirst, dsecond, dbias = weight_gradients(spec, before, mid, *rows_of)
    return ScanGradients(dgi=dgi, dh0=dh0, adjoint=adjoint, dfirst=dfirst, dsecond=dsecond, dbias=dbias)
