"""Backward scan of two-factor operands. A program owns the channels of its blocks of the second factor: from their gate gradients
it computes those of its mid values, reads everybody's, and multiplies them by its columns of the first factor."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ScanSpec, pack_grid
from .. import streamed
from ..device import device_facts
from ..exchange import (
    gate_planes,
    group_barrier,
    load_gates,
    load_grid,
    load_tiles,
    new_counters,
    new_exchange,
    step_gradients,
    store_planes,
)
from ..family import KernelCall, ScanGradients
from ..math import count, in_range, round_to_tf32, to_tf32
from ..memory import put
from ..precision import fp32_precision
from . import streams
from .layout import MonarchLayout, layout_of
from .weights import mid_values, weight_gradients


class Prepared(NamedTuple):
    """Attributes:
    layout: None where weights are read anew at every step.
    first: transposed float weights ``[slices, g, chunks, rows, depth]`` fp32; g is 1 or 3.
    second: transposed float weights ``[slices, 3, positions, positions]`` fp32.
    """

    spec: ScanSpec
    layout: MonarchLayout | None
    first: Tensor | streamed.StreamedFactor
    second: Tensor | streamed.StreamedFactor
    h_grid: Tensor | None


def prepare(spec: ScanSpec) -> Prepared:
    """Weights as the kernel reads them."""
    first, second = (spec.operand.factors[name].dequantize().float() for name in ("first", "second"))
    h_grid = pack_grid(spec.grids.h)
    if fp32_precision(spec) == "tf32" and not spec.exact:
        first, second = round_to_tf32(first), round_to_tf32(second)
    if streams(spec, device_facts(first.device)) is not None:
        factors = (streamed.StreamedFactor.of(factor.transpose(-1, -2)) for factor in (first, second))
        return Prepared(spec, None, *factors, h_grid)
    layout = layout_of(tuple(first.shape), tuple(second.shape))
    first, second = layout.pack_first(first.transpose(-1, -2)), layout.pack_second(second).transpose(-1, -2).contiguous()
    return Prepared(spec, layout, first, second, h_grid)


@triton.jit(do_not_specialize=["T", "B", "tiles"])
def _scan(
    h0,
    states,
    gates,
    mask,
    passes,
    dstates,
    dlast,
    dgi,
    dgh_n,
    dh0,
    adjoint,
    exchange,
    counters,
    channels,
    first,
    second,
    h_grid,
    T,
    B,
    tiles,
    H: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
    BATCH: tl.constexpr,
    FIRST_GATES: tl.constexpr,
    KEEP: tl.constexpr,
    PLANES: tl.constexpr,
    RESIDENT: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    POSITIONS: tl.constexpr = CHUNKS * ROWS
    FIRST_TILE: tl.constexpr = POSITIONS * DEPTH
    SECOND_TILE: tl.constexpr = POSITIONS * POSITIONS
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    first += part * (FIRST_GATES * FIRST_TILE)
    first_at = chunk * (ROWS * DEPTH) + tl.arange(0, ROWS)[None, :, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    second += part * (3 * SECOND_TILE)
    second_at = tl.arange(0, POSITIONS)[:, None] * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    if RESIDENT:
        first_tiles = load_tiles(first, first_at, FIRST_GATES, FIRST_TILE)
        second_tiles = load_tiles(second, second_at, 3, SECOND_TILE)

    channel = tl.load(channels + part * POSITIONS + tl.arange(0, POSITIONS))
    live = channel >= 0
    h_codes = load_grid(h_grid, channel, live, 1) if h_grid is not None else 0
    inside = tl.arange(0, DEPTH)[None, :, None]
    input_channel = chunk * SPAN + inside
    direction = 1 if REVERSE else -1
    start = tl.cast(0, tl.int64) if REVERSE else tl.cast(T - 1, tl.int64) * B
    for tile in tl.range(count(tl.program_id(1)), count(tiles), count(tl.num_programs(1)), num_stages=1):
        row = tile * BATCH + tl.arange(0, BATCH)
        ok = live[:, None] & (row < B)[None, :]
        at = row[None, :] * H + channel[:, None]
        input_row = (tile * BATCH + tl.arange(0, BATCH))[None, None, :]
        input_ok = (inside < SPAN) & (input_channel < H) & (input_row < B)
        input_at = exchange + input_row * (FIRST_GATES * H) + input_channel
        exchange_at = exchange + row[None, :] * (FIRST_GATES * H) + channel[:, None]
        gates_at = gates + start * (PLANES * H) + (row[None, :] * (PLANES * H) + channel[:, None])
        dgi_at = dgi + start * (3 * H) + (row[None, :] * (3 * H) + channel[:, None])
        offset = start * H + at
        before_at = states + offset + direction * B * H
        row_at = start + row[None, :]
        kept = start * (FIRST_GATES * H)

        carry = tl.load(dlast + at, mask=ok, other=0.0).to(tl.float32)
        h_first = tl.load(h0 + at, mask=ok, other=0.0).to(tl.float32)
        coming_gates = load_gates(gates_at, ok, PLANES, H)
        coming_grad = tl.load(dstates + offset, mask=ok, other=0.0).to(tl.float32)
        coming_h = tl.load(before_at, mask=ok & (T > 1), other=0.0).to(tl.float32)
        for step in tl.range(0, count(T), num_stages=1):
            now, h = coming_gates, tl.where(step + 1 < T, coming_h, h_first)
            grad = coming_grad + carry
            gates_at += direction * B * PLANES * H
            before_at += direction * B * H
            coming_gates = load_gates(gates_at, ok & (step + 1 < T), PLANES, H)
            coming_grad = tl.load(dstates + offset + direction * B * H, mask=ok & (step + 1 < T), other=0.0).to(tl.float32)
            coming_h = tl.load(before_at, mask=ok & (step + 2 < T), other=0.0).to(tl.float32)

            if passes is not None:
                passed = tl.load(passes + offset, mask=ok, other=0)

            da_r, da_z, da_n, dgh, dh = step_gradients(grad, now, h)
            out_grad = grad
            if mask is not None:
                real = tl.load(mask + row_at, mask=row[None, :] < B, other=0) != 0
                da_r, da_z = tl.where(real, da_r, 0.0), tl.where(real, da_z, 0.0)
                da_n, dgh = tl.where(real, da_n, 0.0), tl.where(real, dgh, 0.0)
                dh, out_grad = tl.where(real, dh, grad), tl.where(real, grad, 0.0)
                row_at += direction * B

            slot = kept if KEEP else (step % 2) * B * FIRST_GATES * H
            grads = (to_tf32(da_r, PRECISION), to_tf32(da_z, PRECISION), to_tf32(dgh, PRECISION))
            for g in tl.static_range(3):
                w = second_tiles[g] if RESIDENT else tl.load(second + g * SECOND_TILE + second_at)
                if g == 0 or FIRST_GATES == 3:
                    dmid = tl.dot(w, grads[g], input_precision=PRECISION)
                else:
                    dmid = tl.dot(w, grads[g], dmid, input_precision=PRECISION)
                if g == 2 or FIRST_GATES == 3:
                    if passes is not None:
                        dmid = tl.where(((passed >> (g % FIRST_GATES)) & 1) != 0, dmid, 0.0)
                    tl.store(exchange_at + slot + g % FIRST_GATES * H, to_tf32(dmid, PRECISION), mask=ok)
            group_barrier(counters, tile, SLICES * (step + 1), SLICES)
            products = tl.zeros((CHUNKS, ROWS, BATCH), tl.float32)
            for g in tl.static_range(FIRST_GATES):
                w = first_tiles[g] if RESIDENT else tl.load(first + g * FIRST_TILE + first_at)
                x = tl.load(input_at + slot + g * H, mask=input_ok, other=0.0, cache_modifier=".cg")
                if g == 0:  # nobody waits for these, so they come after the first load
                    store_planes(dgi_at, (da_r, da_z, da_n), ok, H)
                    put(dgh_n + offset, dgh.to(dgh_n.dtype.element_ty), ok)
                    if adjoint is not None:
                        tl.store(adjoint + offset, out_grad, mask=ok)
                products = tl.dot(w, x, products, input_precision=PRECISION)
            summed = tl.reshape(products, (POSITIONS, BATCH))
            if h_grid is not None:
                summed = tl.where(in_range(h, h_codes[1], h_codes[2], h_codes[3]), summed, 0.0)
            carry = dh + summed
            offset += direction * B * H
            dgi_at += direction * B * 3 * H
            kept += direction * B * FIRST_GATES * H
        tl.store(dh0 + at, carry, mask=ok)


def _packed(
    prepared: Prepared, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor, passes: Tensor | None,
    dstates: Tensor, dlast: Tensor, dgi: Tensor, dgh_n: Tensor, dh0: Tensor, adjoint: Tensor | None, dmid: Tensor, keep: bool,
) -> None:  # fmt: skip
    """Fill ``dgi``, ``dgh_n``, ``dh0``, ``adjoint`` and ``dmid`` (KEEP: of all steps), with weights that stay with programs."""
    layout, spec, facts = prepared.layout, prepared.spec, device_facts(dgi.device)
    assert layout is not None
    steps, rows, hidden = states.shape
    first_gates = prepared.first.shape[1]
    launch = layout.launch(rows, first_gates, facts, 4, spec.exact)
    assert launch is not None
    gates, planes = gate_planes(gates)
    KernelCall(
        _scan,
        (layout.slices, launch.side_by_side, 1),
        (h0, states, gates, mask, passes, dstates, dlast, dgi, dgh_n, dh0, adjoint),
        (
            dmid,
            new_counters(launch.tiles, dgi.device),
            layout.channels(dgi.device),
            prepared.first,
            prepared.second,
            prepared.h_grid,
            steps,
            rows,
            launch.tiles,
        ),
        {
            "H": hidden,
            "SLICES": layout.slices,
            "CHUNKS": layout.chunks,
            "ROWS": layout.rows,
            "SPAN": layout.span,
            "DEPTH": layout.depth,
            "BATCH": launch.batch,
            "FIRST_GATES": first_gates,
            "KEEP": keep,
            "PLANES": planes,
            "RESIDENT": launch.resident,
            "REVERSE": reverse,
            "PRECISION": fp32_precision(spec),
        },
        warps=layout.warps(launch),
        cooperative=layout.slices > 1,
    ).run()


def backward(
    prepared: Prepared,
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
    spec = prepared.spec
    steps, rows, _, hidden = gi.shape
    first = spec.operand.factors["first"].values
    mid = None
    if want_weights or spec.grids.mid is not None:
        mid = mid_values(spec, states, h0, reverse, want_weights)
    passes = None if mid is None else mid.passes
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    # Gradients of the mid values: of two steps, or of all where the weights need them.
    shape = (steps if want_weights else 2, rows, first.shape[0], first.shape[1] * first.shape[2])
    dmid = new_exchange(shape, torch.float32, gi.device)
    if prepared.layout is None:
        # Programs read one another's gate gradients, which stay in fp32 for that.
        dgi = torch.empty_like(gi, dtype=torch.float32)
        dgh_n = dgi.new_empty(steps, rows, hidden)
        dh0 = streamed.backward(
            prepared.first, prepared.second, prepared.h_grid, fp32_precision(spec), h0, states, gates, passes, mask, reverse,
            dstates, dlast, dgi, dgh_n, adjoint, dmid, spec.grids.gates is not None,
        )  # fmt: skip
        dgi, dgh_n, dh0 = dgi.to(gi.dtype), dgh_n.to(gi.dtype), dh0.to(h0.dtype)
    else:
        dgi = torch.empty_like(gi)
        dgh_n = gi.new_empty(steps, rows, hidden)
        dh0 = torch.empty_like(h0)
        _packed(prepared, h0, mask, reverse, states, gates, passes, dstates, dlast, dgi, dgh_n, dh0, adjoint, dmid, want_weights)
    weights = None, None, None
    if want_weights:
        assert mid is not None
        weights = weight_gradients(spec, states, h0, reverse, mid, dmid, dgi, dgh_n)
    dfirst, dsecond, dbias = weights
    return ScanGradients(dgi=dgi, dh0=dh0, adjoint=adjoint, dfirst=dfirst, dsecond=dsecond, dbias=dbias)
