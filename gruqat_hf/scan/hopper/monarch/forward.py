"""Forward scan of two-factor operands on Hopper clusters.

A step waits for: states, first product, mid values to the others, theirs, second product, gates, states to the others. Warps
exchange by themselves, without a barrier among those of a program. Weights stay in registers, where inputs of the next steps are
on their way.
"""

from __future__ import annotations

import triton
from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.family import aligned
from ...triton.math import codes, gru_gates, in_range, load_grid, pack_gates
from ..cluster import ClusterCall
from ..exchange import area_of, area_shape, close_exchange, open_exchange, read_chunks, send_pairs, wait_for_round
from ..gluon import gl, jit, mma_v2
from ..layouts import gate_layout, load_weights, product_layout, to_gates, to_product
from . import TILE_ROWS
from .weights import MonarchWeights
from .weights import forward_weights as prepare

__all__ = ["call", "forward", "prepare"]


@jit
def _load_inputs(pointer, mask, H: gl.constexpr):
    """The three gates' inputs of a step."""
    r = gl.load(pointer, mask=mask, other=0.0)
    z = gl.load(pointer + H, mask=mask, other=0.0)
    n = gl.load(pointer + 2 * H, mask=mask, other=0.0)
    return r, z, n


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, first, second, first_scale, second_scale, bias, h_grid, mid_grid, state_grid, T, B,
    H: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, FIRST_GATES: gl.constexpr, MID_N: gl.constexpr,
    STATE_N: gl.constexpr, REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (p, j): block p of either factor, of rows j * ROWS and on. Other parameters as in the block-diagonal kernel.

    Steps go in pairs; those of the next two pairs are in registers or on their way there.
    """
    BLOCK: gl.constexpr = H // PROGRAMS
    SHARE: gl.constexpr = BLOCK // PROGRAMS
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    PRODUCT: gl.constexpr = product_layout(BLOCK)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    SLOT: gl.constexpr = BLOCK * ROWS * 2
    AREA: gl.constexpr = area_shape((SLOT, FIRST_GATES * SLOT), 2)
    part = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS

    first_tile = first + part * (BLOCK * BLOCK)
    second_tile = second + part * (BLOCK * BLOCK)
    GATE: gl.constexpr = PROGRAMS * BLOCK * BLOCK
    first_weights = ()
    for g in gl.static_range(FIRST_GATES):
        first_weights = first_weights + (load_weights(first_tile + g * GATE, BLOCK),)
    w_r = load_weights(second_tile, BLOCK)
    w_z = load_weights(second_tile + GATE, BLOCK)
    w_n = load_weights(second_tile + 2 * GATE, BLOCK)

    u = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    j = gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    b = first_row + j
    c = u * PROGRAMS + part
    b_r = gl.load(bias + c)[:, None]
    b_z = gl.load(bias + H + c)[:, None]
    b_n = gl.load(bias + 2 * H + c)[:, None]
    zeros = gl.full([BLOCK, ROWS], 0.0, gl.float32, layout=GATES)
    nothing = to_product(zeros)
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
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, c[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    inside = (b < B)[None, :] & (u >= 0)[:, None]
    offset = b[None, :] * H + c[:, None]
    h = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row
    if gates is not None:
        PACKED: gl.constexpr = gates.dtype.element_ty == gl.int64
        planes: gl.constexpr = 1 if PACKED else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b
    gi_p = gi + start * row * 3 + (b[None, :] * (3 * H) + c[:, None])
    now = _load_inputs(gi_p, inside, H) + _load_inputs(gi_p + step * 3, inside & (1 < T), H)
    gi_p += step * 6
    coming = _load_inputs(gi_p, inside & (2 < T), H) + _load_inputs(gi_p + step * 3, inside & (3 < T), H)

    k = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, RIGHT))[:, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))[None, :]
    operand_at = column * ROWS // 8 * 64 + ((k >> 1) & 3) * 16
    number = part * SHARE + u % SHARE
    place = ((number >> 5) * (ROWS * 64) + ((number >> 3) & 3) * 16 + (number & 7) * 2)[:, None] + j[None, :] * 64
    open_exchange(AREA)
    area = area_of((u // SHARE)[:, None] + j[None, :] * 0)
    to = area + place
    x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
    send_pairs(x.to(gl.float16), area, to, 0, AREA)

    for t in range(0, T, 2):
        gi_p += step * 6
        later = _load_inputs(gi_p, inside & (t + 4 < T), H) + _load_inputs(gi_p + step * 3, inside & (t + 5 < T), H)
        for i in gl.static_range(2):
            if mask is not None:
                real = gl.load(mask_p, mask=(b < B) & (t + i < T), other=0)
                mask_p += sign * B
            wait_for_round(t // 2, 2 * i, AREA)
            right = read_chunks(operand_at, 2 * i, AREA, BLOCK // 32, ROWS * 64)
            for g in gl.static_range(FIRST_GATES):
                mid = to_gates(mma_v2(first_weights[g], right, nothing), ROWS)
                if PORTABLE:
                    _, mid_inv, mid_low, mid_high = mid_grids[g]
                    mid = codes(mid * mid_scales[g], mid_inv, mid_low, mid_high)
                send_pairs(mid.to(gl.float16), area, to + g * SLOT, 2 * i + 1, AREA)
            wait_for_round(t // 2, 2 * i + 1, AREA)
            right = read_chunks(operand_at, 2 * i + 1, AREA, BLOCK // 32, ROWS * 64)
            gh_r = to_gates(mma_v2(w_r, right, start_r), ROWS)
            if FIRST_GATES > 1:
                right = read_chunks(operand_at + 2 * SLOT, 2 * i + 1, AREA, BLOCK // 32, ROWS * 64)
            gh_n = to_gates(mma_v2(w_n, right, start_n), ROWS)
            if FIRST_GATES > 1:
                right = read_chunks(operand_at + SLOT, 2 * i + 1, AREA, BLOCK // 32, ROWS * 64)
            gh_z = to_gates(mma_v2(w_z, right, start_z), ROWS)
            if PORTABLE:
                gh_r = gh_r * s_r + b_r
                gh_z = gh_z * s_z + b_z
                gh_n = gh_n * s_n + b_n
            gi_r = now[3 * i].to(gl.float32)
            gi_z = now[3 * i + 1].to(gl.float32)
            gi_n = now[3 * i + 2].to(gl.float32)
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h, PORTABLE)
            if state_grid is not None:
                if gates is not None:
                    z = gl.where(in_range(new, state_inv, state_low, state_high), z, -1.0)
                new = codes(new, state_inv, state_low, state_high) * state_scale
            if mask is not None:
                new = gl.where((real != 0)[None, :], new, h)
            h = new
            x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
            send_pairs(x.to(gl.float16), area, to, 2 * (1 - i), AREA)
            here = inside & (t + i < T)
            gl.store(out_p + offset, h.to(states.dtype.element_ty), mask=here)
            out_p += step
            if gates is not None:
                if PACKED:
                    gl.store(gates_p + gates_offset, pack_gates(r, z, n, hn), mask=here)
                else:
                    gl.store(gates_p + gates_offset, r, mask=here)
                    gl.store(gates_p + gates_offset + H, z, mask=here)
                    gl.store(gates_p + gates_offset + 2 * H, n, mask=here)
                    gl.store(gates_p + gates_offset + 3 * H, hn, mask=here)
                gates_p += step * planes
        now = coming
        coming = later
    # The last round is nobody's state, but must have come before a program may end.
    wait_for_round((T + 1) // 2, 0, AREA, False)
    close_exchange()


def call(
    weights: MonarchWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    programs, block = weights.first.shape[1:3]
    return ClusterCall(
        kernel=_forward,
        grid=(1, triton.cdiv(rows, TILE_ROWS), 1),
        io=(gi, h0, mask, states, packed(gates)),
        static=(*weights[:-1], steps, rows),
        constants={
            "H": hidden,
            "PROGRAMS": programs,
            "ROWS": TILE_ROWS,
            "FIRST_GATES": weights.first.shape[0],
            "MID_N": grid_size(weights.mid_grid),
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=block // 16,
        portable=weights.quantized,
        cluster=programs,
    )


def forward(
    weights: MonarchWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    call(weights, aligned(gi), h0, mask, reverse, states, gates).run()
