"""Forward scan of large blocks on Hopper clusters whose products are of fp16 operands, floats or integers.

A step waits for: the others' states, product, sum over its parts, gates, own state to all others. Weights stay in registers,
inputs of the next steps are on their way to shared memory, results are stored after the state is sent.
"""

from __future__ import annotations

from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.exchange_plan import cdiv
from ...triton.math import codes, gru_gates, load_grid, on_grid
from ..cluster import ClusterCall
from ..exchange import area_bytes, area_of, area_shape, close_exchange, open_exchange, read_chunks, wait_for_round
from ..gluon import constexpr_function, gl, jit, mma_v2, wait_for_copies
from ..layouts import copy_layout, ring_memory
from . import STAGES
from .layouts import (
    CHANNELS,
    ROWS,
    WARPS,
    load_weights,
    operand_place,
    parts_of,
    product_layout,
    send_layout,
    sum_layout,
    sum_memory,
)
from .tiles import fetch_inputs, keep, lines_of_slot, load_gates, read_gate, send, store_gates, summed, turn_memory
from .turns import rows_taken, tiles_of_cluster
from .weights import HalfWeights

#: Of a step of one tile, and of three.
_DURATIONS = {1: 1.0, 3: 1.75}
_CHANNELS = gl.constexpr(CHANNELS)
_ROWS = gl.constexpr(ROWS)


@constexpr_function
def _area(PROGRAMS, TILES, TAKEN):
    """The exchange's: of each tile's states, twice."""
    return area_shape((PROGRAMS * CHANNELS * TAKEN * 2,), 2 * TILES)


@jit
def _multiply(base, count, at, w_r, w_z, w_n, SLOT: gl.constexpr, AREA: gl.constexpr):
    """The parts of the three gates' products that warps compute, when a slot's ``count``-th states have come."""
    wait_for_round(base, count, SLOT, AREA)
    right = read_chunks(at, SLOT, AREA, at.shape[1] // 32, AREA[0] // (at.shape[0] * at.shape[1] // _CHANNELS))
    zeros = gl.full([at.shape[0], _CHANNELS, _ROWS], 0.0, gl.float32, layout=product_layout(at.shape[0]))
    return mma_v2(w_r, right, zeros), mma_v2(w_z, right, zeros), mma_v2(w_n, right, zeros)


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, PROGRAMS: gl.constexpr, TILES: gl.constexpr, TAKEN: gl.constexpr,
    STAGES: gl.constexpr, STATE_N: gl.constexpr, REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows j * TILES * TAKEN and on. Other parameters as in the block-diagonal kernel.

    TAKEN: rows of a tile, which has columns for ROWS; what those that are none compute is nobody's. Of several tiles all of them.
    TILES, an odd number: tiles of ROWS rows, which take turns within a step, so that one's states travel while others are
    computed; of several, a turn computes the next one's product beside its own gates. Steps go in pairs for the two slots of each
    tile's exchange; a last step that is none computes on zeros, and stores nothing.
    """
    BLOCK: gl.constexpr = PROGRAMS * _CHANNELS
    PARTS: gl.constexpr = parts_of(BLOCK)
    SUMS: gl.constexpr = sum_layout(PARTS)
    GATES: gl.constexpr = gl.SliceLayout(0, SUMS)
    AREA: gl.constexpr = _area(PROGRAMS, TILES, TAKEN)
    gl.static_assert(TILES % 2 == 1 and STAGES % 2 == 0, "turns alternate between two sets of memory, whatever the step")
    gl.static_assert(TILES == 1 or TAKEN == _ROWS)
    TILE: gl.constexpr = _ROWS * H
    SLOTS: gl.constexpr = STAGES * TILES
    AHEAD: gl.constexpr = (STAGES - 1) * TILES
    SEND: gl.constexpr = send_layout(PROGRAMS)
    COPY: gl.constexpr = copy_layout(_CHANNELS, gi.dtype.element_ty.primitive_bitwidth // 8, 8)
    part = gl.program_id(0)
    first_row = gl.program_id(1) * (TILES * TAKEN)
    end = B if TAKEN == _ROWS else gl.minimum(B, first_row + TAKEN)
    block = gl.program_id(2)

    tile = weight + (block * PROGRAMS + part) * (_CHANNELS * BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    w_r = load_weights(tile, BLOCK)
    w_z = load_weights(tile + gate_stride, BLOCK)
    w_n = load_weights(tile + 2 * gate_stride, BLOCK)

    s = part * _CHANNELS + gl.arange(0, _CHANNELS, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = block * SIZE + s
    b_r, b_z, b_n = load_gates(bias, c, own, H)
    if PORTABLE:
        s_r, s_z, s_n = load_gates(scale, c, own, H)
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        carried = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    offset = b[None, :] * H + c[:, None]
    h = ()
    inside = ()
    for k in gl.static_range(TILES):
        inside = inside + (own[:, None] & (b + k * _ROWS < end)[None, :],)
        h = h + (gl.load(h0 + k * TILE + offset, mask=inside[k], other=0.0).to(gl.float32),)
    out_p = states + start * row
    if gates is not None:
        planes: gl.constexpr = 1 if gates.dtype.element_ty == gl.int64 else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b

    INPUT: gl.constexpr = gi.dtype.element_ty
    PRODUCT: gl.constexpr = [PARTS, _CHANNELS, _ROWS]
    RING: gl.constexpr = ring_memory(_CHANNELS, 4, INPUT.primitive_bitwidth // 8)
    memory = (
        turn_memory(gl.float32, PRODUCT, sum_memory(), gl.float16, INPUT, RING, SLOTS // 2),
        turn_memory(gl.float32, PRODUCT, sum_memory(), gl.float16, INPUT, RING, SLOTS // 2),
    )
    lines, present = lines_of_slot(memory[0][2], block, part, first_row, end, H, SIZE, COPY, TILES)
    gi_p = gi + start * row * 3
    for i in gl.static_range(STAGES - 1):
        for k in gl.static_range(TILES):
            inputs = gi_p + 3 * k * TILE + lines
            fetch_inputs(memory[(i * TILES + k) % 2][2], (i * TILES + k) // 2, inputs, present[k] & (i < T))
        gi_p += step * 3

    base = open_exchange(AREA, PROGRAMS)
    operand_at = base + operand_place(BLOCK, TAKEN)
    rank = gl.arange(0, PROGRAMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SEND)))[:, None, None]
    chunk_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SEND)))[None, :, None]
    chunk = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, SEND)))[None, None, :] >> 3
    place = part * (_CHANNELS * TAKEN * 2) + chunk_row * (_CHANNELS * 2) + chunk * 16
    area = area_of(rank + place * 0, base)
    to = area + place
    chosen = None
    if TAKEN < _ROWS:
        chosen = (chunk_row < TAKEN).to(gl.int32) + area * 0
    for k in gl.static_range(TILES):
        x = codes(h[k], h_inv, h_low, h_high) if PORTABLE else h[k]
        memory[k % 2][1].permute([1, 0]).store(x.to(gl.float16))
        send(memory[k % 2][1], area, to, 2 * k, AREA, SEND, chosen)
    if TILES > 1:
        keep(_multiply(base, 0, operand_at, w_r, w_z, w_n, 0, AREA), memory[0][0])
        wait_for_copies(AHEAD - 1)

    for t in range(0, T, 2):
        for u in gl.static_range(2):
            slot = (t + u) * TILES % SLOTS
            free = ((t + u) * TILES + AHEAD) % SLOTS
            following = ()
            for k in gl.static_range(TILES):
                if mask is not None:
                    real = gl.load(mask_p + k * _ROWS, mask=(b + k * _ROWS < end) & (t + u < T), other=0)
                parts, own_state, ring = memory[(u * TILES + k) % 2]
                next_memory = memory[(u * TILES + k + 1) % 2]
                if TILES == 1:
                    keep(_multiply(base, t // 2, operand_at, w_r, w_z, w_n, u, AREA), parts)
                    wait_for_copies(AHEAD - 1)
                gi_r = read_gate(ring, (slot + k) // 2, 0, GATES)
                gi_n = read_gate(ring, (slot + k) // 2, 2, GATES)
                gi_z = read_gate(ring, (slot + k) // 2, 1, GATES)
                gh_r = summed(parts[0], SUMS)
                gh_z = summed(parts[1], SUMS)
                gh_n = summed(parts[2], SUMS)
                if TILES > 1:
                    if k + 1 < TILES:
                        product = _multiply(base, t // 2, operand_at, w_r, w_z, w_n, 2 * (k + 1) + u, AREA)
                    else:
                        product = _multiply(base, t // 2 + u, operand_at, w_r, w_z, w_n, 1 - u, AREA)
                if PORTABLE:
                    gh_r = gh_r * s_r
                    gh_z = gh_z * s_z
                    gh_n = gh_n * s_n
                r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r + b_r, gh_z + b_z, gh_n + b_n, h[k], PORTABLE)
                if state_grid is not None:
                    new, z = on_grid(new, z, carried, gates is not None)
                here = inside[k] & (t + u < T)
                if mask is not None:
                    new = gl.where((real != 0)[None, :], new, h[k])
                following = following + (new,)
                wanted = present[k] & (t + u + STAGES - 1 < T)
                if TILES > 1:
                    fetch_inputs(next_memory[2], (free + k) // 2, gi_p + 3 * k * TILE + lines, wanted)
                x = codes(new, h_inv, h_low, h_high) if PORTABLE else new
                own_state.permute([1, 0]).store(x.to(gl.float16))
                if TILES > 1:
                    keep(product, next_memory[0])
                    wait_for_copies(AHEAD - 1)
                send(own_state, area, to, 2 * k + 1 - u, AREA, SEND, chosen)
                if TILES == 1:
                    fetch_inputs(next_memory[2], (free + k) // 2, gi_p + 3 * k * TILE + lines, wanted)
                gl.store(out_p + k * TILE + offset, new.to(states.dtype.element_ty), mask=here)
                if gates is not None:
                    store_gates(gates_p + k * planes * TILE + gates_offset, r, z, n, hn, here, H)
            h = following
            gi_p += step * 3
            out_p += step
            if gates is not None:
                gates_p += step * planes
            if mask is not None:
                mask_p += sign * B
    # The last rounds are nobody's states, but must have come before a program may end; of several tiles the first's has.
    for k in gl.static_range(1 if TILES > 1 else 0, TILES):
        wait_for_round(base, (T + 1) // 2, 2 * k, AREA, False)
    close_exchange()


def call(
    weights: HalfWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    tiles = tiles_of_cluster(rows, weights.blocks, weights.programs, gi.device, _DURATIONS)
    taken = ROWS if tiles > 1 else rows_taken(rows, weights.blocks, weights.programs, gi.device)
    return ClusterCall(
        kernel=_forward,
        grid=(1, cdiv(rows, tiles * taken), weights.blocks),
        io=(gi, h0, mask, states, packed(gates)),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "PROGRAMS": weights.programs,
            "TILES": tiles,
            "TAKEN": taken,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=WARPS,
        portable=weights.quantized,
        cluster=weights.programs,
        exchange=area_bytes(_area(weights.programs, tiles, taken)),
    )
