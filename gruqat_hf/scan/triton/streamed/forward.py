"""Forward scan with weights that are read anew at every step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import grid_size
from ..device import device_facts
from ..exchange import gate_planes, group_barrier, new_counters, next_state, store_gates
from ..family import KernelCall
from ..math import count, load_gate_grids, load_grid
from . import tiles
from .product import product
from .tiles import StreamedWeights


@triton.jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, carried, mid, counters, first, first_scale, weight, scale, bias,
    h_grid, mid_grid, state_grid, gates_grid, T, B,
    H: tl.constexpr, FIRST_GATES: tl.constexpr, FIRST_BLOCKS: tl.constexpr, FIRST_OUT: tl.constexpr, FIRST_IN: tl.constexpr,
    FIRST_ROWS: tl.constexpr, FIRST_PADDED: tl.constexpr, FIRST_GROUPS: tl.constexpr, FIRST_DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, OUT_ROWS: tl.constexpr, PADDED: tl.constexpr,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, MID_N: tl.constexpr, STATE_N: tl.constexpr, GATES_SHAPE: tl.constexpr,
    PLANES: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, PORTABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, k, j): every SLICES-th tile from tile i, of block k (two factors: of all blocks), rows j * ROWS and on.

    ``carried`` ``[2, B, H]`` fp32: the states before and after a step; ``mid`` ``[B, FIRST_GATES, mid values]`` fp32.
    """
    TWO: tl.constexpr = first is not None
    MID: tl.constexpr = FIRST_BLOCKS * FIRST_OUT
    FIRST_TILES: tl.constexpr = (FIRST_OUT + TILE - 1) // TILE
    TILES: tl.constexpr = (OUT + TILE - 1) // TILE
    TASKS: tl.constexpr = BLOCKS * TILES if TWO else TILES
    STRIDE: tl.constexpr = BLOCKS if TWO else 1
    b = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    rows_in = b < B
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    h_codes = load_grid(h_grid, 0, 1) if h_grid is not None else 0
    row = tl.cast(B, tl.int64) * H
    for task in tl.range(count(tl.program_id(0)), TASKS, SLICES, num_stages=1):
        k = task // TILES if TWO else tl.program_id(1)
        o = task % TILES * TILE + tl.arange(0, TILE)
        offset = b[None, :] * H + (o * STRIDE + (k if TWO else k * OUT))[:, None]
        inside = (o < OUT)[:, None] & rows_in[None, :]
        tl.store(carried + offset, tl.load(h0 + offset, mask=inside).to(tl.float32), mask=inside)
    arrivals = SLICES
    group_barrier(counters, group, arrivals, SLICES)
    for t in tl.range(0, count(T), num_stages=1):
        position = tl.cast(t, tl.int64)
        if REVERSE:
            position = T - 1 - position
        before = carried + (t % 2) * row
        after = carried + (1 - t % 2) * row
        if TWO:
            for task in tl.range(count(tl.program_id(0)), FIRST_GATES * FIRST_BLOCKS * FIRST_TILES, SLICES, num_stages=1):
                block = task // FIRST_TILES
                k = block % FIRST_BLOCKS
                o = task % FIRST_TILES * TILE + tl.arange(0, TILE)
                own = o < FIRST_OUT
                value = product(
                    first + tl.cast(block, tl.int64) * (FIRST_ROWS * FIRST_PADDED), before + k * FIRST_IN, o,
                    first_scale + block * FIRST_OUT if first_scale is not None else None, own, b, rows_in, h_codes,
                    FIRST_PADDED, FIRST_IN, H, 1, FIRST_GROUPS, FIRST_GATES * MID,
                    TILE, FIRST_DEPTH, ROWS, STAGES, h_grid is not None, PRECISION,
                )  # fmt: skip
                offset = b[None, :] * (FIRST_GATES * MID) + (block * FIRST_OUT + o)[:, None]
                tl.store(mid + offset, value, mask=own[:, None] & rows_in[None, :])
            arrivals += SLICES
            group_barrier(counters, group, arrivals, SLICES)
        for task in tl.range(count(tl.program_id(0)), TASKS, SLICES, num_stages=1):
            k = task // TILES if TWO else tl.program_id(1)
            o = task % TILES * TILE + tl.arange(0, TILE)
            own = o < OUT
            live = own[:, None]
            inside = live & rows_in[None, :]
            c = o * STRIDE + (k if TWO else k * OUT)
            gh = ()
            for g in tl.static_range(3):
                if TWO:
                    x = mid + (g % FIRST_GATES) * MID + k
                    grid = load_grid(mid_grid, g % MID_N, MID_N) if mid_grid is not None else 0
                else:
                    x = before + k * IN
                    grid = h_codes
                value = product(
                    weight + tl.cast(g * BLOCKS + k, tl.int64) * (OUT_ROWS * PADDED), x, o,
                    scale + g * H + k * OUT if scale is not None else None, own, b, rows_in, grid,
                    PADDED, IN, FIRST_GATES * MID if TWO else H, STRIDE, GROUPS, 3 * H,
                    TILE, DEPTH, ROWS, STAGES, (mid_grid if TWO else h_grid) is not None, PRECISION,
                )  # fmt: skip
                gh = gh + (value + tl.load(bias + g * H + c, mask=own, other=0.0)[:, None],)
            offset = b[None, :] * H + c[:, None]
            h = tl.load(before + offset, mask=inside, other=0.0)
            gi_p = gi + position * row * 3 + b[None, :] * (3 * H) + c[:, None]
            now = (
                tl.load(gi_p, mask=inside, other=0.0).to(tl.float32),
                tl.load(gi_p + H, mask=inside, other=0.0).to(tl.float32),
                tl.load(gi_p + 2 * H, mask=inside, other=0.0).to(tl.float32),
            )
            channel = tl.minimum(c, H - 1)[:, None]
            state_codes = load_grid(state_grid, channel, STATE_N) if state_grid is not None else 0
            gate_grids = load_gate_grids(gates_grid, channel, GATES_SHAPE) if gates_grid is not None else None
            r, z, n, hn, new = next_state(now, gh, h, state_codes, state_grid is not None, PORTABLE, gate_grids)
            if mask is not None:
                real = tl.load(mask + position * B + b[None, :], mask=rows_in[None, :], other=0)
                new = tl.where(real != 0, new, h)
            tl.store(after + offset, new, mask=inside)
            tl.store(states + position * row + offset, new.to(states.dtype.element_ty), mask=inside)
            if gates is not None:
                gates_p = gates + position * row * PLANES + b[None, :] * (PLANES * H) + c[:, None]
                store_gates(gates_p, (r, z, n, hn), inside, PLANES, H)
        arrivals += SLICES
        group_barrier(counters, group, arrivals, SLICES)


def forward(
    weights: StreamedWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    facts, first, last = device_facts(gi.device), weights.first, weights.last
    _, blocks, out_rows, padded = last.weight.shape
    first_gates, first_blocks, first_out, first_in, first_rows, first_padded = tiles.shape_of(first)
    if first is None:
        programs = tiles.plan_programs(last.tiles, blocks, rows, facts)
    else:
        programs = tiles.plan_programs(max(first_gates * first_blocks * first.tiles, blocks * last.tiles), 1, rows, facts)
    mid = None if first is None else gi.new_empty((rows, first_gates, first_blocks * first_out), dtype=torch.float32)
    gates, planes = gate_planes(gates)
    KernelCall(
        kernel=_forward,
        grid=programs,
        io=(gi, h0, mask, states, gates),
        static=(
            gi.new_empty((2, rows, hidden), dtype=torch.float32),
            mid,
            new_counters(programs.blocks * programs.tiles, gi.device),
            None if first is None else first.weight,
            None if first is None else first.scale,
            last.weight,
            last.scale,
            weights.bias,
            weights.h_grid,
            weights.mid_grid,
            weights.state_grid,
            weights.gates_grid,
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
            "FIRST_GROUPS": 1 if first is None else first.groups,
            "FIRST_DEPTH": 16 if first is None else tiles.depth_of(first.inputs // first.groups),
            "BLOCKS": blocks,
            "OUT": last.out,
            "IN": last.inputs,
            "OUT_ROWS": out_rows,
            "PADDED": padded,
            "GROUPS": last.groups,
            "DEPTH": tiles.depth_of(last.inputs // last.groups),
            "MID_N": grid_size(weights.mid_grid),
            "STATE_N": grid_size(weights.state_grid),
            "GATES_SHAPE": None if weights.gates_grid is None else tuple(weights.gates_grid.shape[1:]),
            "PLANES": planes,
            "SLICES": programs.slices,
            "TILE": tiles.TILE,
            "ROWS": tiles.ROWS,
            "STAGES": tiles.stages(facts),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
            "PRECISION": weights.precision,
        },
        portable=weights.quantized,
        cooperative=programs.slices > 1,
    ).run()
