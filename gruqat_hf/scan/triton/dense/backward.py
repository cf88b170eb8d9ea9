"""Backward scan of large blocks. A program owns 16 channels; every step it writes their gate gradients and reads those of the
whole block, which, multiplied by its columns of the weights, give the gradient of its channels one step earlier."""

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
    load_gates,
    load_grid,
    load_tiles,
    new_counters,
    step_gradients,
    store_planes,
    sum_parts,
)
from ..family import KernelCall, ScanGradients
from ..math import count, in_range, round_to_tf32, to_tf32
from ..precision import fp32_precision
from .layout import DenseLayout, layout_of


class Prepared(NamedTuple):
    """Attributes:
    weight: transposed float weights ``[blocks, slices, 1, 3, rows, inputs]`` fp32.
    h_grid: packed grid or None.
    """

    layout: DenseLayout
    blocks: int
    weight: Tensor
    h_grid: Tensor | None
    exact: bool
    precision: str


def prepare(spec: ScanSpec) -> Prepared:
    """Weights as the kernel reads them."""
    weight = spec.operand.factors["blocks"].dequantize().float()
    layout = layout_of(weight.shape[-1], 1)
    packed, precision = layout.pack(weight.transpose(-1, -2)), fp32_precision(spec)
    if precision == "tf32" and not spec.exact:
        packed = round_to_tf32(packed)
    return Prepared(layout, weight.shape[1], packed, pack_grid(spec.grids.h), spec.exact, precision)


@triton.jit(do_not_specialize=["T", "B", "tiles"])
def _scan(
    h0,
    states,
    gates,
    mask,
    dstates,
    dlast,
    dgi,
    dgh_n,
    dh0,
    adjoint,
    counters,
    weight,
    h_grid,
    T,
    B,
    tiles,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    PLANES: tl.constexpr,
    RESIDENT: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, block = tl.program_id(0), tl.program_id(1)
    DEPTH: tl.constexpr = INPUTS // SPLITS
    TILE: tl.constexpr = ROWS * INPUTS
    split = tl.arange(0, SPLITS)[:, None, None]
    weight += (block * SLICES + part) * (3 * TILE)
    weight_at = tl.arange(0, ROWS)[None, :, None] * INPUTS + split * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    if RESIDENT:
        weights = load_tiles(weight, weight_at, 3, TILE)

    inside = part * ROWS + tl.arange(0, ROWS)
    live = inside < SIZE
    channel = block * SIZE + inside
    h_codes = load_grid(h_grid, channel, live, 1) if h_grid is not None else 0
    depth = split * DEPTH + tl.arange(0, DEPTH)[None, :, None]
    direction = 1 if REVERSE else -1
    first = tl.cast(0, tl.int64) if REVERSE else tl.cast(T - 1, tl.int64) * B
    for tile in tl.range(count(tl.program_id(2)), count(tiles), count(tl.num_programs(2)), num_stages=1):
        row = tile * BATCH + tl.arange(0, BATCH)
        ok = live[:, None] & (row < B)[None, :]
        at = row[None, :] * H + channel[:, None]
        input_row = (tile * BATCH + tl.arange(0, BATCH))[None, None, :]
        input_ok = (depth < SIZE) & (input_row < B)
        input_at = block * SIZE + depth
        gates_at = gates + first * (PLANES * H) + (row[None, :] * (PLANES * H) + channel[:, None])
        dgi_step = dgi + first * (3 * H)
        dgh_n_step = dgh_n + first * H
        offset = first * H + at
        before_at = states + offset + direction * B * H
        mask_at = first + row[None, :]

        carry = tl.load(dlast + at, mask=ok, other=0.0).to(tl.float32)
        h_first = tl.load(h0 + at, mask=ok, other=0.0).to(tl.float32)
        coming_gates = load_gates(gates_at, ok, PLANES, H)
        coming_grad = tl.load(dstates + offset, mask=ok, other=0.0).to(tl.float32)
        coming_h = tl.load(before_at, mask=ok & (T > 1), other=0.0).to(tl.float32)
        group = tile * tl.num_programs(1) + block
        for step in tl.range(0, count(T), num_stages=1):
            now, h = coming_gates, tl.where(step + 1 < T, coming_h, h_first)
            grad = coming_grad + carry
            gates_at += direction * B * PLANES * H
            before_at += direction * B * H
            coming_gates = load_gates(gates_at, ok & (step + 1 < T), PLANES, H)
            coming_grad = tl.load(dstates + offset + direction * B * H, mask=ok & (step + 1 < T), other=0.0).to(tl.float32)
            coming_h = tl.load(before_at, mask=ok & (step + 2 < T), other=0.0).to(tl.float32)

            da_r, da_z, da_n, dgh, dh = step_gradients(grad, now, h)
            out_grad = grad
            if mask is not None:
                real = tl.load(mask + mask_at, mask=row[None, :] < B, other=0) != 0
                mask_at += direction * B
                da_r, da_z = tl.where(real, da_r, 0.0), tl.where(real, da_z, 0.0)
                da_n, dgh = tl.where(real, da_n, 0.0), tl.where(real, dgh, 0.0)
                dh, out_grad = tl.where(real, dh, grad), tl.where(real, grad, 0.0)
            da_r, da_z, dgh = to_tf32(da_r, PRECISION), to_tf32(da_z, PRECISION), to_tf32(dgh, PRECISION)
            store_planes(dgi_step + row[None, :] * (3 * H) + channel[:, None], (da_r, da_z, da_n), ok, H)
            tl.store(dgh_n_step + at, dgh, mask=ok)
            group_barrier(counters, group, SLICES * (step + 1), SLICES)
            from_rz = dgi_step + input_row * (3 * H) + input_at
            from_n = dgh_n_step + input_row * H + input_at
            x = tl.load(from_rz, mask=input_ok, other=0.0, cache_modifier=".cg")
            w = weights[0] if RESIDENT else tl.load(weight + 0 * TILE + weight_at)
            products = tl.dot(w, x, input_precision=PRECISION)
            if adjoint is not None:
                tl.store(adjoint + offset, out_grad, mask=ok)
            x = tl.load(from_rz + H, mask=input_ok, other=0.0, cache_modifier=".cg")
            w = weights[1] if RESIDENT else tl.load(weight + 1 * TILE + weight_at)
            products = tl.dot(w, x, products, input_precision=PRECISION)
            x = tl.load(from_n, mask=input_ok, other=0.0, cache_modifier=".cg")
            w = weights[2] if RESIDENT else tl.load(weight + 2 * TILE + weight_at)
            products = tl.dot(w, x, products, input_precision=PRECISION)
            summed = sum_parts(products, SPLITS)
            if h_grid is not None:
                summed = tl.where(in_range(h, h_codes[1], h_codes[2], h_codes[3]), summed, 0.0)
            carry = dh + summed
            offset += direction * B * H
            dgi_step += direction * B * 3 * H
            dgh_n_step += direction * B * H
        tl.store(dh0 + at, carry, mask=ok)


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
    """Gradients of the scan's inputs; those of the weights are left to a product over all rows."""
    layout, blocks, facts = prepared.layout, prepared.blocks, device_facts(gi.device)
    steps, rows, _, hidden = gi.shape
    launch = layout.launch(rows, blocks, facts, 4, prepared.exact)
    assert launch is not None
    gates, planes = gate_planes(gates)
    # Programs read one another's gate gradients, which stay in fp32 for that.
    dgi = torch.empty_like(gi, dtype=torch.float32)
    dgh_n = dgi.new_empty(steps, rows, hidden)
    dh0 = dgi.new_empty(rows, hidden)
    adjoint = torch.empty_like(dgh_n) if want_adjoint else None
    KernelCall(
        _scan,
        (layout.slices, blocks, launch.side_by_side),
        (h0, states, gates, mask, dstates, dlast, dgi, dgh_n, dh0, adjoint),
        (
            new_counters(launch.tiles * blocks, gi.device),
            prepared.weight,
            prepared.h_grid,
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
            "INPUTS": layout.inputs,
            "SPLITS": layout.splits(launch),
            "PLANES": planes,
            "RESIDENT": launch.resident,
            "REVERSE": reverse,
            "PRECISION": prepared.precision,
        },
        warps=launch.warps,
        cooperative=layout.slices > 1,
    ).run()
    return ScanGradients(dgi=dgi.to(gi.dtype), dh0=dh0.to(h0.dtype), dgh_n=dgh_n.to(gi.dtype), adjoint=adjoint)
