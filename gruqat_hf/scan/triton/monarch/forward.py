"""Forward scan of two-factor operands. Every step a program reads the whole state from the exchange buffer, computes the mid
values that its own blocks of the second factor need, then its channels of the next state, which it writes back."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....operands import Factor
from ....quantization import Grid
from ...spec import ScanSpec, is_integer, pack_gates_grid, pack_grid, sums_floats
from .. import streamed
from ..device import device_facts
from ..exchange import (
    gate_planes,
    group_barrier,
    load_grid,
    load_planes,
    load_tiles,
    new_counters,
    new_exchange,
    next_state,
    store_gates,
    to_operand,
)
from ..family import KernelCall
from ..math import codes, count, gate_factors
from ..precision import fp32_precision
from . import streams
from .layout import MonarchLayout, layout_of


class Prepared(NamedTuple):
    """Attributes:
    first: ``[slices, g, chunks, rows, depth]``, codes or float weights in fp16 (fp32 if exact); g is 1 or 3.
    second: ``[slices, 3, positions, positions]``, likewise.
    first_scales, second_scales: ``[g, groups, H]`` and ``[3, groups, H]`` of the integer products, or None.
    bias: ``[3, H]`` fp32.
    h_grid, mid_grid, state_grid: packed grids or None.
    """

    layout: MonarchLayout
    first: Tensor
    second: Tensor
    first_scales: Tensor | None
    second_scales: Tensor | None
    bias: Tensor
    h_grid: Tensor | None
    mid_grid: Tensor | None
    state_grid: Tensor | None
    exact: bool
    precision: str
    quantized: bool


def _product(factor: Factor, grid: Grid | None) -> tuple[Tensor, Tensor | None]:
    """Codes and the scales of an integer product, ``[gates, blocks, out, groups]``; or float weights and None."""
    if not is_integer(factor, grid):
        return factor.dequantize(), None
    assert grid is not None and factor.scale is not None
    return factor.values, (grid.scale.reshape(-1, 1, 1, 1) * factor.scale).expand(*factor.values.shape[:3], factor.groups)


def prepare(spec: ScanSpec) -> Prepared | streamed.StreamedWeights:
    """Weights, scales and grids as the kernel reads them."""
    first, second = spec.operand.factors["first"], spec.operand.factors["second"]
    grids, floats = spec.grids, sums_floats(spec.operand, spec.grids, spec.quantized)
    exact = floats or (spec.exact and not spec.quantized)
    hidden, device = spec.hidden_size, first.values.device
    bias = torch.zeros(3, hidden, device=device) if spec.bias is None else spec.bias.float()
    (first_values, first_scale), (second_values, second_scale) = _product(first, grids.h), _product(second, grids.mid)
    if not spec.quantized:
        factors = gate_factors(device)
        second_values = second_values.float() * factors.view(3, 1, 1, 1)
        bias = bias * factors
    dtype = torch.float32 if exact else torch.float16
    first_values, second_values, bias = first_values.to(dtype), second_values.to(dtype), bias.contiguous()
    packed_grids = pack_grid(grids.h), pack_grid(grids.mid), pack_grid(grids.state)
    precision = fp32_precision(replace(spec, exact=True) if floats else spec)
    if streams(spec, device_facts(device)) is not None:
        both = streamed.StreamedFactor.of(first_values, first_scale), streamed.StreamedFactor.of(second_values, second_scale)
        return streamed.StreamedWeights(*both, bias, *packed_grids, pack_gates_grid(grids.gates), precision, spec.quantized)
    layout = layout_of(tuple(first.values.shape), tuple(second.values.shape))
    return Prepared(
        layout,
        layout.pack_first(first_values),
        layout.pack_second(second_values),
        None if first_scale is None else first_scale.permute(0, 3, 1, 2).flatten(2).contiguous(),
        None if second_scale is None else second_scale.permute(0, 3, 2, 1).flatten(2).contiguous(),
        bias,
        *packed_grids,
        exact,
        precision,
        spec.quantized,
    )


@triton.jit
def _add_groups(
    weight, x, group, scales, live, BATCH: tl.constexpr, H: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr
):
    """The product of codes as ``[positions, BATCH]``, one group of inputs after the other, each with its scales."""
    total = tl.zeros((live.shape[0], BATCH), tl.float32)
    for j in tl.range(0, GROUPS, num_stages=1):
        own = tl.where(group == j, x, 0.0).to(x.dtype)
        product = tl.reshape(tl.dot(weight, own, input_precision=PRECISION), (live.shape[0], BATCH))
        total += product * tl.load(scales + j * H, mask=live, other=0.0)[:, None]
    return total


@triton.jit(do_not_specialize=["T", "B", "tiles"])
def _scan(
    gi,
    h0,
    mask,
    states,
    gates,
    exchange,
    counters,
    channels,
    first,
    second,
    first_scales,
    second_scales,
    bias,
    h_grid,
    mid_grid,
    state_grid,
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
    FIRST_SIZE: tl.constexpr,
    SECOND_BLOCKS: tl.constexpr,
    FIRST_GROUPS: tl.constexpr,
    SECOND_GROUPS: tl.constexpr,
    MID_SCALES: tl.constexpr,
    STATE_SCALES: tl.constexpr,
    PLANES: tl.constexpr,
    RESIDENT: tl.constexpr,
    REVERSE: tl.constexpr,
    PORTABLE: tl.constexpr,
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
    bias_at = bias + channel
    b_r = tl.load(bias_at, mask=live, other=0.0)[:, None]
    b_z = tl.load(bias_at + H, mask=live, other=0.0)[:, None]
    b_n = tl.load(bias_at + 2 * H, mask=live, other=0.0)[:, None]
    h_codes = load_grid(h_grid, channel, live, 1) if PORTABLE else 0
    state_codes = load_grid(state_grid, channel, live, STATE_SCALES) if state_grid is not None else 0

    inside = tl.arange(0, DEPTH)[None, :, None]
    input_channel = chunk * SPAN + inside
    direction = -1 if REVERSE else 1
    start = tl.cast(T - 1, tl.int64) * B if REVERSE else tl.cast(0, tl.int64)
    for tile in tl.range(count(tl.program_id(1)), count(tiles), count(tl.num_programs(1)), num_stages=1):
        row = tile * BATCH + tl.arange(0, BATCH)
        ok = live[:, None] & (row < B)[None, :]
        at = row[None, :] * H + channel[:, None]
        input_row = (tile * BATCH + tl.arange(0, BATCH))[None, None, :]
        input_ok = (inside < SPAN) & (input_channel < H) & (input_row < B)
        input_at = exchange + input_row * H + input_channel
        gi_at = gi + start * (3 * H) + (row[None, :] * (3 * H) + channel[:, None])
        states_at = states + start * H + at
        if gates is not None:
            gates_at = gates + start * (PLANES * H) + (row[None, :] * (PLANES * H) + channel[:, None])
        if mask is not None:
            mask_at = mask + start + row[None, :]

        h = tl.load(h0 + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(exchange + at, to_operand(h, h_codes, PORTABLE).to(exchange.dtype.element_ty), mask=ok)
        coming = load_planes(gi_at, ok, 3, H)
        group_barrier(counters, tile, SLICES, SLICES)
        x = tl.load(input_at, mask=input_ok, other=0.0, cache_modifier=".cg")
        for step in tl.range(0, count(T), num_stages=1):
            now = coming
            gi_at += direction * B * 3 * H
            coming = load_planes(gi_at, ok & (step + 1 < T), 3, H)
            mids = ()
            for g in tl.static_range(FIRST_GATES):
                w = first_tiles[g] if RESIDENT else tl.load(first + g * FIRST_TILE + first_at)
                if FIRST_GROUPS > 1:
                    group = input_channel % FIRST_SIZE // (FIRST_SIZE // FIRST_GROUPS)
                    scales = first_scales + g * FIRST_GROUPS * H + channel
                    mid = _add_groups(w, x, group, scales, live, BATCH, H, FIRST_GROUPS, PRECISION)
                else:
                    mid = tl.reshape(tl.dot(w, x, input_precision=PRECISION), (POSITIONS, BATCH))
                    if PORTABLE:
                        mid *= tl.load(first_scales + g * H + channel, mask=live, other=0.0)[:, None]
                if PORTABLE:
                    bound_at = mid_grid + MID_SCALES + (g if MID_SCALES > 1 else 0)
                    mid = codes(mid, tl.load(bound_at), tl.load(bound_at + MID_SCALES), tl.load(bound_at + 2 * MID_SCALES))
                mids = mids + (mid.to(exchange.dtype.element_ty),)
            gh = ()
            for g in tl.static_range(3):
                w = second_tiles[g] if RESIDENT else tl.load(second + g * SECOND_TILE + second_at)
                if SECOND_GROUPS > 1:
                    group = (channel // SECOND_BLOCKS // (H // SECOND_BLOCKS // SECOND_GROUPS))[:, None]
                    scales = second_scales + g * SECOND_GROUPS * H + channel
                    total = _add_groups(w, mids[g % FIRST_GATES], group, scales, live, BATCH, H, SECOND_GROUPS, PRECISION)
                else:
                    total = tl.dot(w, mids[g % FIRST_GATES], input_precision=PRECISION)
                    if PORTABLE:
                        total *= tl.load(second_scales + g * H + channel, mask=live, other=0.0)[:, None]
                gh = gh + (total,)
            gh = (gh[0] + b_r, gh[1] + b_z, gh[2] + b_n)
            r, z, n, hn, new = next_state(now, gh, h, state_codes, state_grid is not None, PORTABLE)
            if mask is not None:
                new = tl.where(tl.load(mask_at, mask=row[None, :] < B, other=0) != 0, new, h)
                mask_at += direction * B
            h = new
            slot = ((step + 1) % 2) * B * H
            tl.store(exchange + slot + at, to_operand(h, h_codes, PORTABLE).to(exchange.dtype.element_ty), mask=ok)
            group_barrier(counters, tile, SLICES * (step + 2), SLICES)
            x = tl.load(input_at + slot, mask=input_ok, other=0.0, cache_modifier=".cg")
            tl.store(states_at, h.to(states.dtype.element_ty), mask=ok)
            states_at += direction * B * H
            if gates is not None:
                store_gates(gates_at, (r, z, n, hn), ok, PLANES, H)
                gates_at += direction * B * PLANES * H


def forward(
    prepared: Prepared | streamed.StreamedWeights,
    gi: Tensor,
    h0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    states: Tensor,
    gates: Tensor | None,
) -> None:
    """Fill ``states`` ``[T, B, H]`` and, unless None, ``gates`` ``[T, B, 4, H]``."""
    if isinstance(prepared, streamed.StreamedWeights):
        return streamed.forward(prepared, gi, h0, mask, reverse, states, gates)
    layout, facts = prepared.layout, device_facts(gi.device)
    steps, rows, _, hidden = gi.shape
    first_gates = prepared.first.shape[1]
    launch = layout.launch(rows, first_gates, facts, prepared.first.element_size(), prepared.exact)
    assert launch is not None
    gates, planes = gate_planes(gates)
    mid_grid, state_grid = prepared.mid_grid, prepared.state_grid
    KernelCall(
        _scan,
        (layout.slices, launch.side_by_side, 1),
        (gi, h0, mask, states, gates),
        (
            new_exchange((2, rows, hidden), prepared.first.dtype, gi.device),
            new_counters(launch.tiles, gi.device),
            layout.channels(gi.device),
            prepared.first,
            prepared.second,
            prepared.first_scales,
            prepared.second_scales,
            prepared.bias,
            prepared.h_grid,
            mid_grid,
            state_grid,
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
            "FIRST_SIZE": layout.first_size,
            "SECOND_BLOCKS": layout.second_blocks,
            "FIRST_GROUPS": 1 if prepared.first_scales is None else prepared.first_scales.shape[1],
            "SECOND_GROUPS": 1 if prepared.second_scales is None else prepared.second_scales.shape[1],
            "MID_SCALES": 1 if mid_grid is None else mid_grid.shape[1],
            "STATE_SCALES": 1 if state_grid is None else state_grid.shape[1],
            "PLANES": planes,
            "RESIDENT": launch.resident,
            "REVERSE": reverse,
            "PORTABLE": prepared.quantized,
            "PRECISION": prepared.precision,
        },
        warps=layout.warps(launch),
        portable=prepared.quantized,
        cooperative=layout.slices > 1,
    ).run()
