"""Forward scan of large blocks on Hopper clusters whose products are of 8-bit codes.

A step waits for: the others' states, product, sum over its parts, gates, own state to all others. Codes take half the bytes of
fp16 in the exchange and in registers, so that a cluster holds blocks of 1024: of each program's 192 KB of weights, all but the
last piece of gate n stay in registers, that one in shared memory.
"""

from __future__ import annotations

from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.exchange_plan import cdiv
from ...triton.math import clamp, gru_gates, load_grid, on_grid
from ..cluster import ClusterCall
from ..exchange import area_bytes, area_of, area_shape, close_exchange, open_exchange, read_chunks, wait_for_round
from ..gluon import constexpr_function, gl, jit, mma_v2, wait_for_copies
from ..layouts import copy_layout
from . import STAGES
from .byte_layouts import (
    PIECE,
    ROWS,
    WARPS,
    by_channels,
    load_weights,
    operand_at,
    product_layout,
    send_layout,
    splits,
    sum_layout,
    sum_memory,
    weight_memory,
)
from .tiles import fetch_inputs, keep, lines_of_slot, load_gates, read_gate, send, store_gates, summed, turn_memory
from .turns import rows_taken, tiles_of_cluster
from .weights import ByteWeights

#: Of a step of one tile, and of three; by the pieces of a block.
_DURATIONS = {1: {1: 1.0, 3: 2.0}, 2: {1: 1.0, 3: 2.5}}
_ROWS = gl.constexpr(ROWS)
_PIECE = gl.constexpr(PIECE)
#: 1.5 * 2**23: the last byte of its sum with a small float is that float, rounded half to even.
_ROUNDER = gl.constexpr(12582912.0)


@constexpr_function
def _area(PIECES, TILES, TAKEN):
    """The exchange's: the pieces of each tile's states, twice."""
    return area_shape((PIECE * TAKEN,), 2 * PIECES * TILES)


@jit
def _multiply(base, count, at, weights, last, last_n, SLOT: gl.constexpr, AREA: gl.constexpr):
    """The parts of the three gates' products that warps compute, when a tile's ``count``-th states have come: of weights of a
    first piece in registers, and of a last one, if there is one, of which those of gate n are in shared memory."""
    CHANNELS: gl.constexpr = weights[0].shape[1]
    PRODUCT: gl.constexpr = product_layout(CHANNELS)
    zeros = gl.full([weights[0].shape[0], CHANNELS, _ROWS], 0, gl.int32, layout=PRODUCT)
    STRIDE: gl.constexpr = AREA[SLOT] // (_PIECE // 64)
    wait_for_round(base, count, SLOT, AREA)
    right = read_chunks(at, SLOT, AREA, at.shape[1] // 64, STRIDE, gl.int8)
    r = mma_v2(weights[0], right, zeros)
    n = mma_v2(weights[2], right, zeros)
    z = mma_v2(weights[1], right, zeros)
    if last_n is not None:
        wait_for_round(base, count, SLOT + 1, AREA)
        right = read_chunks(at, SLOT + 1, AREA, at.shape[1] // 64, STRIDE, gl.int8)
        r = mma_v2(last[0], right, r)
        n = mma_v2(last_n.load(gl.DotOperandLayout(0, PRODUCT, 4)), right, n)
        z = mma_v2(last[1], right, z)
    return by_channels(r), by_channels(z), by_channels(n)


@jit
def _bytes(h, inv_scale, low, high):
    """Codes of states. Each is the last byte of a float's bits, by an instruction of its own: ptxas 12.8 would store the byte of
    the float's value."""
    TEXT: gl.constexpr = "prmt.b32 $0, $1, 0, 0x4440;"
    bits = (clamp(h * inv_scale, low, high) + _ROUNDER).to(gl.int32, bitcast=True)
    return gl.inline_asm_elementwise(TEXT, "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1).to(gl.int8)


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, PROGRAMS: gl.constexpr, CHANNELS: gl.constexpr, TILES: gl.constexpr,
    TAKEN: gl.constexpr, STAGES: gl.constexpr, STATE_N: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows j * TILES * TAKEN and on. The rest is as in the fp16 kernel."""
    SUMS: gl.constexpr = sum_layout(CHANNELS)
    GATES: gl.constexpr = gl.SliceLayout(0, SUMS)
    PARTS: gl.constexpr = splits(CHANNELS)
    BLOCK: gl.constexpr = PROGRAMS * CHANNELS
    PIECES: gl.constexpr = BLOCK // _PIECE
    AREA: gl.constexpr = _area(PIECES, TILES, TAKEN)
    gl.static_assert(TILES % 2 == 1 and STAGES % 2 == 0, "turns alternate between two sets of memory, whatever the step")
    gl.static_assert(TILES == 1 or TAKEN == _ROWS)
    TILE: gl.constexpr = _ROWS * H
    SLOTS: gl.constexpr = STAGES * TILES
    AHEAD: gl.constexpr = (STAGES - 1) * TILES
    SEND: gl.constexpr = send_layout(PROGRAMS, CHANNELS)
    COPY: gl.constexpr = copy_layout(CHANNELS, gi.dtype.element_ty.primitive_bitwidth // 8, 8)
    part = gl.program_id(0)
    first_row = gl.program_id(1) * (TILES * TAKEN)
    end = B if TAKEN == _ROWS else gl.minimum(B, first_row + TAKEN)
    block = gl.program_id(2)

    tile = weight + (block * PROGRAMS + part) * (CHANNELS * BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    weights = (
        load_weights(tile, CHANNELS),
        load_weights(tile + gate_stride, CHANNELS),
        load_weights(tile + 2 * gate_stride, CHANNELS),
    )
    last = weights
    last_n = None
    if PIECES == 2:
        tile += CHANNELS * _PIECE
        last = load_weights(tile, CHANNELS), load_weights(tile + gate_stride, CHANNELS)
        last_n = gl.allocate_shared_memory(gl.int8, [PARTS, CHANNELS, _PIECE // PARTS], weight_memory(CHANNELS))
        last_n.store(load_weights(tile + 2 * gate_stride, CHANNELS))

    s = part * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = block * SIZE + s
    b_r, b_z, b_n = load_gates(bias, c, own, H)
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
    # Warps read whole lines of a ring's slot.
    RING: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    memory = (
        turn_memory(gl.int32, [PARTS, CHANNELS, _ROWS], sum_memory(), gl.int8, INPUT, RING, SLOTS // 2),
        turn_memory(gl.int32, [PARTS, CHANNELS, _ROWS], sum_memory(), gl.int8, INPUT, RING, SLOTS // 2),
    )
    lines, present = lines_of_slot(memory[0][2], block, part, first_row, end, H, SIZE, COPY, TILES)
    gi_p = gi + start * row * 3
    for i in gl.static_range(STAGES - 1):
        for k in gl.static_range(TILES):
            inputs = gi_p + 3 * k * TILE + lines
            fetch_inputs(memory[(i * TILES + k) % 2][2], (i * TILES + k) // 2, inputs, present[k] & (i < T))
        gi_p += step * 3

    base = open_exchange(AREA, PROGRAMS)
    states_at = base + operand_at(CHANNELS, TAKEN)
    # For the programs of its own piece, which come first, a program is of the first piece; of the second for others.
    rank = gl.arange(0, PROGRAMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SEND)))[:, None, None]
    chunk_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SEND)))[None, :, None]
    chunk = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, SEND)))[None, None, :] >> 4
    SENDERS: gl.constexpr = _PIECE // CHANNELS
    piece = rank // SENDERS
    place = (piece * SENDERS + part % SENDERS) * (CHANNELS * TAKEN) + chunk_row * CHANNELS + chunk * 16
    area = area_of((rank ^ (part & -SENDERS)) + place * 0, base)
    to = area + place
    area += piece * 8
    chosen = None
    if TAKEN < _ROWS:
        chosen = (chunk_row < TAKEN).to(gl.int32) + area * 0
    for k in gl.static_range(TILES):
        memory[k % 2][1].permute([1, 0]).store(_bytes(h[k], h_inv, h_low, h_high))
        send(memory[k % 2][1], area, to, 2 * PIECES * k, AREA, SEND, chosen)
    if TILES > 1:
        keep(_multiply(base, 0, states_at, weights, last, last_n, 0, AREA), memory[0][0])
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
                    keep(_multiply(base, t // 2, states_at, weights, last, last_n, PIECES * u, AREA), parts)
                    wait_for_copies(AHEAD - 1)
                gi_r = read_gate(ring, (slot + k) // 2, 0, GATES)
                gi_n = read_gate(ring, (slot + k) // 2, 2, GATES)
                gi_z = read_gate(ring, (slot + k) // 2, 1, GATES)
                gh_r = summed(parts[0], SUMS) * s_r + b_r
                gh_z = summed(parts[1], SUMS) * s_z + b_z
                gh_n = summed(parts[2], SUMS) * s_n + b_n
                if TILES > 1:
                    if k + 1 < TILES:
                        product = _multiply(base, t // 2, states_at, weights, last, last_n, PIECES * (2 * (k + 1) + u), AREA)
                    else:
                        product = _multiply(base, t // 2 + u, states_at, weights, last, last_n, PIECES * (1 - u), AREA)
                r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h[k], True)
                if state_grid is not None:
                    new, z = on_grid(new, z, carried, gates is not None)
                here = inside[k] & (t + u < T)
                if mask is not None:
                    new = gl.where((real != 0)[None, :], new, h[k])
                following = following + (new,)
                wanted = present[k] & (t + u + STAGES - 1 < T)
                if TILES > 1:
                    fetch_inputs(next_memory[2], (free + k) // 2, gi_p + 3 * k * TILE + lines, wanted)
                own_state.permute([1, 0]).store(_bytes(new, h_inv, h_low, h_high))
                if TILES > 1:
                    keep(product, next_memory[0])
                    wait_for_copies(AHEAD - 1)
                send(own_state, area, to, PIECES * (2 * k + 1 - u), AREA, SEND, chosen)
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
        for i in gl.static_range(PIECES):
            wait_for_round(base, (T + 1) // 2, 2 * PIECES * k + i, AREA, False)
    close_exchange()


def call(
    weights: ByteWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    pieces = weights.weight.shape[3]
    tiles = tiles_of_cluster(rows, weights.blocks, weights.programs, gi.device, _DURATIONS[pieces])
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
            "CHANNELS": weights.channels,
            "TILES": tiles,
            "TAKEN": taken,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
        },
        warps=WARPS,
        portable=True,
        cluster=weights.programs,
        exchange=area_bytes(_area(pieces, tiles, taken)),
    )
