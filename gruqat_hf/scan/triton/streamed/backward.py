"""Backward scan with weights that are read anew at every step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import device_facts
from ..exchange import gate_planes, group_barrier, load_gates, new_counters, step_gradients
from ..family import KernelCall
from ..math import count, in_range, load_grid
from . import tiles
from .product import product
from .tiles import StreamedFactor


@triton.jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, passes, dstates, dlast, dgi, dgh_n, dh0, adjoint, direct, dmid, counters, first, weight,
    h_grid, T, B,
    H: tl.constexpr, FIRST_GATES: tl.constexpr, FIRST_BLOCKS: tl.constexpr, FIRST_OUT: tl.constexpr, FIRST_IN: tl.constexpr,
    FIRST_ROWS: tl.constexpr, FIRST_PADDED: tl.constexpr, FIRST_DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, OUT_ROWS: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr,
    KEEP: tl.constexpr, PLANES: tl.constexpr, MARKED: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs as in the forward scan, from the last step to the first. Weights are transposed: ``FIRST_OUT`` and ``OUT`` count
    what the factors read.

    ``dh0`` carries the state's gradient from step to step, ``direct`` ``[B, H]`` its part that passes by the product: both fp32,
    each tile with one program. ``dmid``: gradients of the mid values, of all steps (KEEP) or one.
    """
    TWO: tl.constexpr = first is not None
    MID: tl.constexpr = FIRST_BLOCKS * FIRST_IN
    SIZE: tl.constexpr = FIRST_OUT if TWO else OUT
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    TASKS: tl.constexpr = FIRST_BLOCKS * TILES if TWO else TILES
    MID_TILES: tl.constexpr = (OUT + TILE - 1) // TILE
    b = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows_in = b < B
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    row = tl.cast(B, tl.int64) * H
    for task in tl.range(count(tl.program_id(0)), TASKS, SLICES, num_stages=1):
        k = task // TILES if TWO else tl.program_id(1)
        o = task % TILES * TILE + tl.arange(0, TILE)
        inside = (o < SIZE)[:, None] & rows_in[None, :]
        offset = b[None, :] * H + (k * SIZE + o)[:, None]
        tl.store(dh0 + offset, tl.load(dlast + offset, mask=inside).to(tl.float32), mask=inside)
    tl.debug_barrier()
    arrivals = 0
    for i in tl.range(0, count(T), num_stages=1):
        s = T - 1 - i
        position = tl.cast(s, tl.int64)
        before = position - 1
        if REVERSE:
            position = T - 1 - position
            before = position + 1
        for task in tl.range(count(tl.program_id(0)), TASKS, SLICES, num_stages=1):
            k = task // TILES if TWO else tl.program_id(1)
            o = task % TILES * TILE + tl.arange(0, TILE)
            inside = (o < SIZE)[:, None] & rows_in[None, :]
            offset = b[None, :] * H + (k * SIZE + o)[:, None]
            h = tl.load(h0 + offset, mask=inside & (s == 0), other=0.0).to(tl.float32)
            h += tl.load(states + before * row + offset, mask=inside & (s > 0), other=0.0).to(tl.float32)
            gates_p = gates + position * row * PLANES + b[None, :] * (PLANES * H) + (k * SIZE + o)[:, None]
            saved = load_gates(gates_p, inside, PLANES, H)
            grad = tl.load(dh0 + offset, mask=inside, other=0.0)
            grad += tl.load(dstates + position * row + offset, mask=inside, other=0.0).to(tl.float32)
            runs = inside
            if mask is not None:
                runs = inside & (tl.load(mask + position * B + b[None, :], mask=rows_in[None, :], other=0) != 0)
            if adjoint is not None:
                tl.store(adjoint + position * row + offset, tl.where(runs, grad, 0.0), mask=inside)
            passed = tl.where(runs, 0.0, grad)
            da_r, da_z, da_n, dh_n, dh = step_gradients(tl.where(runs, grad, 0.0), saved, h, MARKED)
            dgi_p = dgi + position * row * 3 + b[None, :] * (3 * H) + (k * SIZE + o)[:, None]
            tl.store(dgi_p, da_r, mask=inside)
            tl.store(dgi_p + H, da_z, mask=inside)
            tl.store(dgi_p + 2 * H, da_n, mask=inside)
            tl.store(dgh_n + position * row + offset, dh_n, mask=inside)
            tl.store(direct + offset, dh + passed, mask=inside)
        arrivals += SLICES
        group_barrier(counters, group, arrivals, SLICES)
        from_rz = dgi + position * row * 3
        from_n = dgh_n + position * row
        kept = dmid + position * B * (FIRST_GATES * MID) if KEEP else dmid
        if TWO:
            for task in tl.range(count(tl.program_id(0)), BLOCKS * MID_TILES, SLICES, num_stages=1):
                k = task // MID_TILES
                o = task % MID_TILES * TILE + tl.arange(0, TILE)
                inside = (o < OUT)[:, None] & rows_in[None, :]
                c = (o * BLOCKS + k)[:, None]
                total = tl.zeros((TILE, ROWS), tl.float32)
                for g in tl.static_range(3):
                    value = product(
                        weight + tl.cast(g * BLOCKS + k, tl.int64) * (OUT_ROWS * PADDED),
                        (from_n if g == 2 else from_rz + g * H) + k, o, None, None, b, rows_in, 0,
                        PADDED, IN, H if g == 2 else 3 * H, BLOCKS, 1, 0,
                        TILE, DEPTH, ROWS, STAGES, False, PRECISION,
                    )  # fmt: skip
                    if passes is not None:
                        bits = tl.load(passes + (position * B + b[None, :]) * MID + c, mask=inside, other=0)
                        value = tl.where(((bits >> (g % FIRST_GATES)) & 1) != 0, value, 0.0)
                    total = value if FIRST_GATES == 3 else total + value
                    if g == 2 or FIRST_GATES == 3:
                        at = b[None, :] * (FIRST_GATES * MID) + (g % FIRST_GATES) * MID + c
                        tl.store(kept + at, total, mask=inside)
            arrivals += SLICES
            group_barrier(counters, group, arrivals, SLICES)
        for task in tl.range(count(tl.program_id(0)), TASKS, SLICES, num_stages=1):
            k = task // TILES if TWO else tl.program_id(1)
            o = task % TILES * TILE + tl.arange(0, TILE)
            inside = (o < SIZE)[:, None] & rows_in[None, :]
            offset = b[None, :] * H + (k * SIZE + o)[:, None]
            total = tl.zeros((TILE, ROWS), tl.float32)
            for g in tl.static_range(FIRST_GATES if TWO else 3):
                if TWO:
                    total += product(
                        first + tl.cast(g * FIRST_BLOCKS + k, tl.int64) * (FIRST_ROWS * FIRST_PADDED),
                        kept + g * MID + k * FIRST_IN, o, None, None, b, rows_in, 0,
                        FIRST_PADDED, FIRST_IN, FIRST_GATES * MID, 1, 1, 0,
                        TILE, FIRST_DEPTH, ROWS, STAGES, False, PRECISION,
                    )  # fmt: skip
                else:
                    total += product(
                        weight + tl.cast(g * BLOCKS + k, tl.int64) * (OUT_ROWS * PADDED),
                        (from_n if g == 2 else from_rz + g * H) + k * IN,
                        o, None, None, b, rows_in, 0, PADDED, IN, H if g == 2 else 3 * H, 1, 1, 0,
                        TILE, DEPTH, ROWS, STAGES, False, PRECISION,
                    )  # fmt: skip
            if h_grid is not None:
                _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
                h = tl.load(h0 + offset, mask=inside & (s == 0), other=0.0).to(tl.float32)
                h += tl.load(states + before * row + offset, mask=inside & (s > 0), other=0.0).to(tl.float32)
                total = tl.where(in_range(h, h_inv, h_low, h_high), total, 0.0)
            tl.store(dh0 + offset, tl.load(direct + offset, mask=inside, other=0.0) + total, mask=inside)
        tl.debug_barrier()


def backward(
    first: StreamedFactor | None, last: StreamedFactor, h_grid: Tensor | None, precision: str, h0: Tensor, states: Tensor,
    gates: Tensor, passes: Tensor | None, mask: Tensor | None, reverse: bool, dstates: Tensor, dlast: Tensor, dgi: Tensor,
    dgh_n: Tensor, adjoint: Tensor | None, dmid: Tensor | None, marked: bool,
) -> Tensor:  # fmt: skip
    """Fill ``dgi`` and ``dgh_n``, both fp32, ``adjoint`` and ``dmid``; gives the gradient of h0, ``[B, H]`` fp32.

    Args:
        first, last: float weights, transposed: ``[gates, blocks, in, out]``, in fp32: gradients may be too small for fp16.
        passes: where the grid of the mid values lets gradients through, ``[T * B, mid values]`` uint8, a bit for each gate.
        dmid: ``[T or 1, B, gates, mid values]`` fp32: gradients of the mid values, of all steps or of the latest.
        marked: whether ``gates`` say where the grid of the pre-activations clipped.
    """
    steps, rows, hidden = states.shape
    facts = device_facts(states.device)
    _, blocks, out_rows, padded = last.weight.shape
    first_gates, first_blocks, first_out, first_in, first_rows, first_padded = tiles.shape_of(first)
    if first is None:
        programs = tiles.plan_programs(last.tiles, blocks, rows, facts)
    else:
        programs = tiles.plan_programs(max(first_blocks * first.tiles, blocks * last.tiles), 1, rows, facts)
    gates, planes = gate_planes(gates)
    dh0 = torch.empty_like(h0, dtype=torch.float32)
    KernelCall(
        kernel=_backward,
        grid=programs,
        io=(h0, mask, states, gates, passes, dstates, dlast, dgi, dgh_n, dh0, adjoint),
        static=(
            torch.empty_like(dh0),
            dmid,
            new_counters(programs.blocks * programs.tiles, states.device),
            None if first is None else first.weight,
            last.weight,
            h_grid,
            steps,
            rows,
        ),
        constants={
            "H": hidden,
            "FIRST_GATES": first_gates,
            "FIRST_BLOCKS": first_blocks,
            "FIRST_OUT": first_out,
            "FIRST_IN": first_in,
            "FIRST_ROWS": first_rows,
            "FIRST_PADDED": first_padded,
            "FIRST_DEPTH": 16 if first is None else tiles.depth_of(first.inputs),
            "BLOCKS": blocks,
            "OUT": last.out,
            "IN": last.inputs,
            "OUT_ROWS": out_rows,
            "PADDED": padded,
            "DEPTH": tiles.depth_of(last.inputs),
            "KEEP": dmid is not None and dmid.shape[0] == steps,
            "PLANES": planes,
            "MARKED": marked,
            "SLICES": programs.slices,
            "TILE": tiles.TILE,
            "ROWS": tiles.ROWS,
            "STAGES": tiles.stages(facts),
            "REVERSE": reverse,
            "PRECISION": precision,
        },
        cooperative=programs.slices > 1,
    ).run()
    return dh0
