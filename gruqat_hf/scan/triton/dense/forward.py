"""Forward scan of large blocks. A program owns 16 channels of a block and all their weights; every step it reads the state of
the whole block from the exchange buffer and writes its own channels there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ScanSpec, pack_grid
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
    sum_parts,
    to_operand,
)
from ..family import KernelCall
from ..math import count, gate_factors
from ..precision import fp32_precision
from .layout import DenseLayout, layout_of


class Prepared(NamedTuple):
    """Attributes:
    weight: ``[blocks, slices, groups, 3, rows, inputs]``: codes or float weights, in fp16 (fp32 if exact).
    scales: ``[groups, 3, H]`` of the integer products, or None.
    bias: ``[3, H]`` fp32.
    h_grid, state_grid: packed grids or None.
    wide: whether integer sums can pass 2**24.
    """

    layout: DenseLayout
    blocks: int
    weight: Tensor
    scales: Tensor | None
    bias: Tensor
    h_grid: Tensor | None
    state_grid: Tensor | None
    wide: bool
    exact: bool
    precision: str
    quantized: bool


def prepare(spec: ScanSpec) -> Prepared:
    """Weights, scales and grids as the kernel reads them."""
    factor, grid = spec.operand.factors["blocks"], spec.grids.h
    _, blocks, size, _ = factor.values.shape
    hidden, device = blocks * size, factor.values.device
    bias = torch.zeros(3, hidden, device=device) if spec.bias is None else spec.bias.float()
    scales, wide, exact = None, False, spec.exact and not spec.quantized
    if spec.quantized:
        assert grid is not None and factor.scale is not None
        values = factor.values
        scales = (grid.scale * factor.scale).expand(3, blocks, size, factor.groups)
        scales = scales.permute(3, 0, 1, 2).reshape(factor.groups, 3, hidden).contiguous()
        wide = factor.qmax * grid.magnitude * (size // factor.groups) >= 1 << 24
    else:
        factors = gate_factors(device)
        values = factor.values.float() * factors.view(3, 1, 1, 1)
        bias = bias * factors
    layout = layout_of(size, factor.groups if spec.quantized else 1)
    weight = layout.pack(values.to(torch.float32 if exact else torch.float16))
    return Prepared(
        layout,
        blocks,
        weight,
        scales,
        bias.contiguous(),
        pack_grid(grid),
        pack_grid(spec.grids.state),
        wide,
        exact,
        fp32_precision(spec),
        spec.quantized,
    )


@triton.jit
def _summed(products, SPLITS: tl.constexpr, WIDE: tl.constexpr):
    """The sum over ``[splits, rows, batch]``; WIDE: of integers that may pass 2**24 together, but not by themselves."""
    if WIDE:
        products = products.to(tl.int32)
    return sum_parts(products, SPLITS).to(tl.float32)


@triton.jit(do_not_specialize=["T", "B", "tiles"])
def _scan(
    gi,
    h0,
    mask,
    states,
    gates,
    exchange,
    counters,
    weight,
    scales,
    bias,
    h_grid,
    state_grid,
    T,
    B,
    tiles,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    GROUPS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STATE_SCALES: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDENT: tl.constexpr,
    REVERSE: tl.constexpr,
    PORTABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, block = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = SIZE // GROUPS
    DEPTH: tl.constexpr = INPUTS // SPLITS
    TILE: tl.constexpr = ROWS * INPUTS
    split = tl.arange(0, SPLITS)[:, None, None]
    weight += (block * SLICES + part) * (3 * GROUPS * TILE)
    weight_at = tl.arange(0, ROWS)[None, :, None] * INPUTS + split * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    if RESIDENT:
        weights = load_tiles(weight, weight_at, 3 * GROUPS, TILE)

    inside = part * ROWS + tl.arange(0, ROWS)
    live = inside < SIZE
    channel = block * SIZE + inside
    bias_at = bias + channel
    b_r = tl.load(bias_at, mask=live, other=0.0)[:, None]
    b_z = tl.load(bias_at + H, mask=live, other=0.0)[:, None]
    b_n = tl.load(bias_at + 2 * H, mask=live, other=0.0)[:, None]
    h_codes = load_grid(h_grid, channel, live, 1) if PORTABLE else 0
    state_codes = load_grid(state_grid, channel, live, STATE_SCALES) if state_grid is not None else 0

    depth = split * DEPTH + tl.arange(0, DEPTH)[None, :, None]
    direction = -1 if REVERSE else 1
    first = tl.cast(T - 1, tl.int64) * B if REVERSE else tl.cast(0, tl.int64)
    for tile in tl.range(count(tl.program_id(2)), count(tiles), count(tl.num_programs(2)), num_stages=1):
        row = tile * BATCH + tl.arange(0, BATCH)
        ok = live[:, None] & (row < B)[None, :]
        at = row[None, :] * H + channel[:, None]
        input_row = (tile * BATCH + tl.arange(0, BATCH))[None, None, :]
        input_ok = (depth < GROUP) & (input_row < B)
        input_at = exchange + input_row * H + block * SIZE + depth
        gi_at = gi + first * (3 * H) + (row[None, :] * (3 * H) + channel[:, None])
        states_at = states + first * H + at
        if gates is not None:
            gates_at = gates + first * (PLANES * H) + (row[None, :] * (PLANES * H) + channel[:, None])
        if mask is not None:
            mask_at = mask + first + row[None, :]

        h = tl.load(h0 + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(exchange + at, to_operand(h, h_codes, PORTABLE).to(exchange.dtype.element_ty), mask=ok)
        coming = load_planes(gi_at, ok, 3, H)
        group = tile * tl.num_programs(1) + block
        group_barrier(counters, group, SLICES, SLICES)
        slot = tl.cast(0, tl.int32)
        x = tl.load(input_at, mask=input_ok, other=0.0, cache_modifier=".cg")
        for step in tl.range(0, count(T), num_stages=1):
            now = coming
            gi_at += direction * B * 3 * H
            coming = load_planes(gi_at, ok & (step + 1 < T), 3, H)
            for j in tl.static_range(GROUPS):
                if j > 0:
                    x = tl.load(input_at + slot + j * GROUP, mask=input_ok, other=0.0, cache_modifier=".cg")
                w = weights[3 * j] if RESIDENT else tl.load(weight + 3 * j * TILE + weight_at)
                s_r = _summed(tl.dot(w, x, input_precision=PRECISION), SPLITS, WIDE)
                w = weights[3 * j + 1] if RESIDENT else tl.load(weight + (3 * j + 1) * TILE + weight_at)
                s_z = _summed(tl.dot(w, x, input_precision=PRECISION), SPLITS, WIDE)
                w = weights[3 * j + 2] if RESIDENT else tl.load(weight + (3 * j + 2) * TILE + weight_at)
                s_n = _summed(tl.dot(w, x, input_precision=PRECISION), SPLITS, WIDE)
                if PORTABLE:
                    scale_at = scales + 3 * j * H + channel
                    s_r *= tl.load(scale_at, mask=live, other=0.0)[:, None]
                    s_z *= tl.load(scale_at + H, mask=live, other=0.0)[:, None]
                    s_n *= tl.load(scale_at + 2 * H, mask=live, other=0.0)[:, None]
                if j == 0:
                    gh_r, gh_z, gh_n = s_r, s_z, s_n
                else:
                    gh_r += s_r
                    gh_z += s_z
                    gh_n += s_n
            gh = (gh_r + b_r, gh_z + b_z, gh_n + b_n)
            r, z, n, hn, new = next_state(now, gh, h, state_codes, state_grid is not None, PORTABLE)
            if mask is not None:
                new = tl.where(tl.load(mask_at, mask=row[None, :] < B, other=0) != 0, new, h)
                mask_at += direction * B
            h = new
            slot = ((step + 1) % 2) * B * H
            tl.store(exchange + slot + at, to_operand(h, h_codes, PORTABLE).to(exchange.dtype.element_ty), mask=ok)
            group_barrier(counters, group, SLICES * (step + 2), SLICES)
            x = tl.load(input_at + slot, mask=input_ok, other=0.0, cache_modifier=".cg")
            tl.store(states_at, h.to(states.dtype.element_ty), mask=ok)
            states_at += direction * B * H
            if gates is not None:
                store_gates(gates_at, (r, z, n, hn), ok, PLANES, H)
                gates_at += direction * B * PLANES * H


def forward(
    prepared: Prepared, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states`` ``[T, B, H]`` and, unless None, ``gates`` ``[T, B, 4, H]``."""
    layout, blocks, facts = prepared.layout, prepared.blocks, device_facts(gi.device)
    steps, rows, _, hidden = gi.shape
    launch = layout.launch(rows, blocks, facts, prepared.weight.element_size(), prepared.exact)
    assert launch is not None
    gates, planes = gate_planes(gates)
    state_grid = prepared.state_grid
    KernelCall(
        _scan,
        (layout.slices, blocks, launch.side_by_side),
        (gi, h0, mask, states, gates),
        (
            new_exchange((2, rows, hidden), prepared.weight.dtype, gi.device),
            new_counters(launch.tiles * blocks, gi.device),
            prepared.weight,
            prepared.scales,
            prepared.bias,
            prepared.h_grid,
            state_grid,
            steps,
            rows,
            launch.tiles,
        ),
        {
            "H": hidden,
            "SIZE": layout.size,
            "SLICES": layout.slices,
            "ROWS": layout.rows,
            "BATCH": launch.batch,
            "GROUPS": layout.groups,
            "INPUTS": layout.inputs,
            "SPLITS": layout.splits(launch),
            "STATE_SCALES": 1 if state_grid is None else state_grid.shape[1],
            "PLANES": planes,
            "WIDE": prepared.wide,
            "RESIDENT": launch.resident,
            "REVERSE": reverse,
            "PORTABLE": prepared.quantized,
            "PRECISION": prepared.precision,
        },
        warps=launch.warps,
        portable=prepared.quantized,
        cooperative=layout.slices > 1,
    ).run()
