"""Forward scan of two-factor operands on Hopper clusters.

A step waits for: states, first product, mid values to the others, theirs, second product, gates, states to the others. Warps
exchange by themselves, without a barrier among those of a program. Weights stay in registers, inputs of the next steps are on
their way to shared memory, and what a step stores waits for the next one's mid values to be on their way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.exchange_plan import cdiv
from ...triton.family import aligned
from ...triton.math import codes, gru_gates, load_grid, on_grid, pack_gates
from ...triton.transposition import transposed, transposition
from ..cluster import ClusterCall
from ..exchange import area_bytes, area_of, area_shape, close_exchange, expect_round, open_exchange, send_pairs, wait_for_round
from ..gluon import constexpr_function, gl, jit
from ..layouts import gate_layout, product_layout, to_product
from . import STEPS, TILE_ROWS, registers
from .memory import commit_step, copy_pairs, in_order, open_memory, plane_bytes, take_pairs, wait_for_step
from .product import chunks_at, load_sides, multiply, place_in_slot, read_right
from .weights import MonarchWeights
from .weights import forward_weights as prepare

__all__ = ["call", "forward", "prepare"]


@constexpr_function
def _area(BLOCK, ROWS, FIRST_GATES):
    """The exchange's: of states and of mid values, twice."""
    return area_shape((BLOCK * ROWS * 2, FIRST_GATES * BLOCK * ROWS * 2), 2)


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, first, second, first_scale, second_scale, bias, h_grid, mid_grid, state_grid, T, B,
    H: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, STEPS: gl.constexpr, FIRST_GATES: gl.constexpr,
    MID_N: gl.constexpr, STATE_N: gl.constexpr, REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (p, j): block p of either factor, of rows j * ROWS and on. ``gi``, ``states`` and packed ``gates`` are in exchange
    order. Other parameters as in the block-diagonal kernel.

    Steps go in pairs, for the slots of the exchange; a last step that is none computes on zeros, and stores nothing.
    """
    BLOCK: gl.constexpr = H // PROGRAMS
    SHARE: gl.constexpr = BLOCK // PROGRAMS
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    SLOT: gl.constexpr = BLOCK * ROWS * 2
    AREA: gl.constexpr = _area(BLOCK, ROWS, FIRST_GATES)
    GATE: gl.constexpr = PROGRAMS * BLOCK * BLOCK
    PLANE: gl.constexpr = plane_bytes(gi.dtype.element_ty, BLOCK, ROWS)
    PACKED: gl.constexpr = gates is not None and gates.dtype.element_ty == gl.int64
    part = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS

    first_tile = first + part * (BLOCK * BLOCK)
    second_tile = second + part * (BLOCK * BLOCK)
    first_weights = ()
    for g in gl.static_range(FIRST_GATES):
        first_weights = first_weights + (load_sides(first_tile + g * GATE, BLOCK),)
    w_r = load_sides(second_tile, BLOCK)
    w_z = load_sides(second_tile + GATE, BLOCK)
    w_n = load_sides(second_tile + 2 * GATE, BLOCK)

    u = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    j = gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    b = first_row + j
    c = u * PROGRAMS + part
    b_r = gl.load(bias + c)[:, None]
    b_z = gl.load(bias + H + c)[:, None]
    b_n = gl.load(bias + 2 * H + c)[:, None]
    zeros = gl.full([BLOCK, ROWS], 0.0, gl.float32, layout=GATES)
    nothing = gl.full([BLOCK, 8], 0.0, gl.float32, layout=product_layout(BLOCK))
    if PORTABLE:
        start_r = nothing
        start_z = nothing
        start_n = nothing
        s_r = gl.load(second_scale + c)[:, None]
        s_z = gl.load(second_scale + H + c)[:, None]
        s_n = gl.load(second_scale + 2 * H + c)[:, None]
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
        mid_c = part * BLOCK + u % SHARE * PROGRAMS + u // SHARE
        mid_scales = ()
        mid_grids = ()
        for g in gl.static_range(FIRST_GATES):
            mid_scales = mid_scales + (gl.load(first_scale + g * H + mid_c)[:, None],)
            mid_grids = mid_grids + (load_grid(mid_grid, g if MID_N > 1 else 0, MID_N),)
    else:
        start_r = to_product(zeros + b_r)
        start_z = to_product(zeros + b_z)
        start_n = to_product(zeros + b_n)
    if state_grid is not None:
        carried = load_grid(state_grid, c[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    inside = (b < B)[None, :] & (u >= 0)[:, None]
    end = gl.where(inside, T, 0)
    offset = b[None, :] * H + (part * BLOCK + u)[:, None]
    h = gl.load(h0 + (b[None, :] * H + c[:, None]), mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row
    kept = gl.full([BLOCK, ROWS], 0, gl.int64, layout=GATES)
    if gates is not None:
        planes: gl.constexpr = 1 if PACKED else 4
        gates_p = gates + start * row * planes
    if mask is not None:
        valid = b < B
        mask_p = mask + start * B + b
        real = gl.load(mask_p, mask=valid, other=0), gl.load(mask_p + sign * B, mask=valid & (1 < T), other=0)

    memory = open_memory(STEPS * 3 * PLANE)
    pair_at = memory + ((u >> 1)[:, None] * ROWS + j[None, :]) * (2 * PLANE // (BLOCK * ROWS))
    gi_p = gi + start * row * 3 + (b[None, :] * (3 * H) + (part * BLOCK + u)[:, None])
    for i in gl.static_range(STEPS):
        copy_pairs(pair_at + i * (3 * PLANE), gi_p, i < end, 3, H, PLANE)
        commit_step()
        gi_p += step * 3

    number = part * SHARE + u % SHARE
    base = open_exchange(AREA, PROGRAMS)
    chunk_at = base + chunks_at(BLOCK)
    area = area_of((u // SHARE)[:, None] + j[None, :] * 0, base)
    to = area + place_in_slot(number[:, None], j[None, :], BLOCK)
    x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
    send_pairs(x.to(gl.float16), area, to, 0, AREA)

    for t in range(0, T, 2):
        for i in gl.static_range(2):
            wait_for_round(base, (t >> 1) & 1, 2 * i, AREA, False)
            right = read_right(chunk_at, 2 * i, AREA, BLOCK)
            for g in gl.static_range(FIRST_GATES):
                mid = multiply(first_weights[g], right, nothing)
                if PORTABLE:
                    _, mid_inv, mid_low, mid_high = mid_grids[g]
                    mid = codes(mid * mid_scales[g], mid_inv, mid_low, mid_high)
                send_pairs(mid.to(gl.float16), area, to + g * SLOT, 2 * i + 1, AREA)
            expect_round(base, 2 * i, AREA)

            # While mid values are on their way: results of the step before, inputs of this one and of a later one.
            in_order()
            before = inside & (t > 0) if i == 0 else inside
            gl.store(out_p - step + offset, h.to(states.dtype.element_ty), mask=before)
            if PACKED:
                gl.store(gates_p - step + offset, kept, mask=before)
            wait_for_step(STEPS - 1)
            at = pair_at + ((t + i) & (STEPS - 1)) * (3 * PLANE)
            gi_r = take_pairs(at, gi.dtype.element_ty).to(gl.float32)
            gi_z = take_pairs(at + PLANE, gi.dtype.element_ty).to(gl.float32)
            gi_n = take_pairs(at + 2 * PLANE, gi.dtype.element_ty).to(gl.float32)
            copy_pairs(at, gi_p, t + i + STEPS < end, 3, H, PLANE)
            commit_step()
            gi_p += step * 3
            if mask is not None:
                if i == 0:
                    mask_p += 2 * sign * B
                    coming = (
                        gl.load(mask_p, mask=valid & (t + 2 < T), other=0),
                        gl.load(mask_p + sign * B, mask=valid & (t + 3 < T), other=0),
                    )

            wait_for_round(base, (t >> 1) & 1, 2 * i + 1, AREA, False)
            right = ()
            for g in gl.static_range(FIRST_GATES):
                right = right + (read_right(chunk_at + g * SLOT, 2 * i + 1, AREA, BLOCK),)
            gh_r = multiply(w_r, right[0], start_r)
            gh_n = multiply(w_n, right[FIRST_GATES - 1], start_n)
            gh_z = multiply(w_z, right[FIRST_GATES // 2], start_z)
            if PORTABLE:
                gh_r = gh_r * s_r + b_r
                gh_z = gh_z * s_z + b_z
                gh_n = gh_n * s_n + b_n
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h, PORTABLE)
            if state_grid is not None:
                new, z = on_grid(new, z, carried, gates is not None)
            if mask is not None:
                new = gl.where((real[i] != 0)[None, :], new, h)
            h = new
            x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
            send_pairs(x.to(gl.float16), area, to, 2 * (1 - i), AREA)
            expect_round(base, 2 * i + 1, AREA)
            out_p += step
            if PACKED:
                kept = pack_gates(r, z, n, hn)
                gates_p += step
            elif gates is not None:
                here = t + i < end
                gates_at = gates_p + (b[None, :] * (4 * H) + c[:, None])
                gl.store(gates_at, r, mask=here)
                gl.store(gates_at + H, z, mask=here)
                gl.store(gates_at + 2 * H, n, mask=here)
                gl.store(gates_at + 3 * H, hn, mask=here)
                gates_p += step * 4
        if mask is not None:
            real = coming
    last = inside & (T % 2 == 0)
    gl.store(out_p - step + offset, h.to(states.dtype.element_ty), mask=last)
    if PACKED:
        gl.store(gates_p - step + offset, kept, mask=last)
    # The last round is nobody's state, but must have come before a program may end.
    wait_for_round(base, (T + 1) >> 1, 0, AREA, False)
    close_exchange()


def call(
    weights: MonarchWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given; ``gi``, ``states`` and 16-bit gates are in exchange order."""
    steps, rows, _, hidden = gi.shape
    programs, block = weights.first.shape[1:3]
    return ClusterCall(
        kernel=_forward,
        grid=(1, cdiv(rows, TILE_ROWS), 1),
        io=(gi, h0, mask, states, packed(gates)),
        static=(*weights[:-1], steps, rows),
        constants={
            "H": hidden,
            "PROGRAMS": programs,
            "ROWS": TILE_ROWS,
            "STEPS": STEPS,
            "FIRST_GATES": weights.first.shape[0],
            "MID_N": grid_size(weights.mid_grid),
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=block // 16,
        portable=weights.quantized,
        cluster=programs,
        exchange=area_bytes(_area(block, TILE_ROWS, weights.first.shape[0])),
        registers=registers(rows, programs, block // 16, gi.device),
    )


def forward(
    weights: MonarchWeights,
    gi: Tensor,
    h0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    states: Tensor,
    gates: Tensor | None,
    interleaved: bool = False,
) -> None:
    """Fill ``states``, and ``gates`` if given, from ``gi``; gates of 16 bits in exchange order, and ``gi`` if it is interleaved,
    all else in that of channels."""
    programs, block = weights.first.shape[1:3]
    scanned = torch.empty_like(states)
    gi = aligned(gi) if interleaved else transposed(gi, programs)
    call(weights, gi, h0, mask, reverse, scanned, gates).run()
    transposition(scanned, states, block).run()
