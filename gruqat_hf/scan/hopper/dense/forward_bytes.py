"""Forward scan of large blocks on Hopper clusters whose products are of 8-bit codes.

A step waits for: the others' states, product, sum over its parts, gates, own state to all others. Codes take half the bytes of
fp16 in the exchange and in registers, so that a cluster holds blocks of 1024: of each program's 192 KB of weights, all but the
last piece of gate n stay in registers, that one in shared memory.
"""

from __future__ import annotations

import triton
from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.math import clamp, codes, gru_gates, in_range, load_grid
from ..cluster import ClusterCall
from ..exchange import area_of, area_shape, close_exchange, open_exchange, read_chunks, send_chunks, wait_for_round
from ..gluon import gl, jit, mma_v2, wait_for_copies
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
from .tiles import fetch_inputs, lines_of_slot, load_gates, read_gate, store_gates
from .weights import ByteWeights

_ROWS = gl.constexpr(ROWS)
_PIECE = gl.constexpr(PIECE)
#: 1.5 * 2**23: the last byte of its sum with a small float is that float, rounded half to even.
_ROUNDER = gl.constexpr(12582912.0)


@jit
def _read_states(at, SLOT: gl.constexpr, AREA: gl.constexpr):
    """A piece of the state as a product's right side."""
    return read_chunks(at, SLOT, AREA, at.shape[1] // 64, 64 * _ROWS, gl.int8)


@jit
def _summed(memory):
    """The sum of a product's parts, as a tile of gates."""
    return gl.sum(memory.load(sum_layout(memory.shape[1])), axis=0).to(gl.float32)


@jit
def _last_byte(x):
    """The last byte of a float's bits, by an instruction of its own: ptxas 12.8 would store the byte of its value."""
    TEXT: gl.constexpr = "prmt.b32 $0, $1, 0, 0x4440;"
    bits = x.to(gl.int32, bitcast=True)
    return gl.inline_asm_elementwise(TEXT, "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1).to(gl.int8)


@jit
def _send(h, inv_scale, low, high, memory, area, to, SLOT: gl.constexpr, AREA: gl.constexpr, PROGRAMS: gl.constexpr):
    """The codes of a program's slice of the state to all programs, itself as well."""
    SEND: gl.constexpr = send_layout(PROGRAMS, memory.shape[1])
    code = clamp(h * inv_scale, low, high) + _ROUNDER
    memory.permute([1, 0]).store(_last_byte(code))
    chunk = gl.expand_dims(memory.load(gl.SliceLayout(0, SEND)), 0)
    chunk, _ = gl.broadcast(chunk, area)
    send_chunks(chunk, area, to, SLOT, AREA)


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, PROGRAMS: gl.constexpr, CHANNELS: gl.constexpr, STAGES: gl.constexpr,
    STATE_N: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows j * ROWS and on. Other parameters as in the block-diagonal kernel.

    Steps go in pairs for the two slots of the exchange; a last step that is none computes on zeros, and stores nothing.
    """
    GATES: gl.constexpr = gl.SliceLayout(0, sum_layout(CHANNELS))
    PRODUCT: gl.constexpr = product_layout(CHANNELS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    SEND: gl.constexpr = send_layout(PROGRAMS, CHANNELS)
    PARTS: gl.constexpr = splits(CHANNELS)
    BLOCK: gl.constexpr = PROGRAMS * CHANNELS
    PIECES: gl.constexpr = BLOCK // _PIECE
    AREA: gl.constexpr = area_shape((_PIECE * _ROWS,), 2 * PIECES)
    WIDTH: gl.constexpr = gi.dtype.element_ty.primitive_bitwidth // 8
    COPY: gl.constexpr = copy_layout(CHANNELS, WIDTH, 8)
    part = gl.program_id(0)
    first_row = gl.program_id(1) * _ROWS
    block = gl.program_id(2)

    tile = weight + (block * PROGRAMS + part) * (CHANNELS * BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    last = tile + (PIECES - 1) * (CHANNELS * _PIECE)
    w_r = load_weights(tile, CHANNELS)
    w_z = load_weights(tile + gate_stride, CHANNELS)
    w_n = load_weights(tile + 2 * gate_stride, CHANNELS)
    if PIECES == 2:
        last_r = load_weights(last, CHANNELS)
        last_z = load_weights(last + gate_stride, CHANNELS)
        last_n = gl.allocate_shared_memory(gl.int8, [PARTS, CHANNELS, _PIECE // PARTS], weight_memory(CHANNELS))
        last_n.store(load_weights(last + 2 * gate_stride, CHANNELS))

    s = part * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = block * SIZE + s
    b_r, b_z, b_n = load_gates(bias, c, own, H)
    s_r, s_z, s_n = load_gates(scale, c, own, H)
    _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    inside = own[:, None] & (b < B)[None, :]
    offset = b[None, :] * H + c[:, None]
    h = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row
    if gates is not None:
        planes: gl.constexpr = 1 if gates.dtype.element_ty == gl.int64 else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b

    # Warps read whole lines of a ring's slot.
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ring = gl.allocate_shared_memory(gi.dtype.element_ty, [STAGES, 4 * _ROWS, CHANNELS], PLAIN)
    lines, present = lines_of_slot(ring, block, part, first_row, B, H, SIZE, COPY)
    gi_p = gi + start * row * 3
    for i in gl.static_range(STAGES - 1):
        fetch_inputs(ring, i, gi_p, lines, present, T)
        gi_p += step * 3

    sums_r = gl.allocate_shared_memory(gl.int32, [PARTS, CHANNELS, _ROWS], sum_memory())
    sums_z = gl.allocate_shared_memory(gl.int32, [PARTS, CHANNELS, _ROWS], sum_memory())
    sums_n = gl.allocate_shared_memory(gl.int32, [PARTS, CHANNELS, _ROWS], sum_memory())
    own_state = gl.allocate_shared_memory(gl.int8, [_ROWS, CHANNELS], PLAIN)
    zeros = gl.full([PARTS, CHANNELS, _ROWS], 0, gl.int32, layout=PRODUCT)
    states_at = operand_at(CHANNELS)
    open_exchange(AREA)
    # For the programs of its own piece, which come first, a program is of the first piece; of the second for others.
    rank = gl.arange(0, PROGRAMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SEND)))[:, None, None]
    chunk_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SEND)))[None, :, None]
    chunk = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, SEND)))[None, None, :] >> 4
    SENDERS: gl.constexpr = _PIECE // CHANNELS
    piece = rank // SENDERS
    place = (piece * SENDERS + part % SENDERS) * (CHANNELS * _ROWS) + chunk_row * CHANNELS + chunk * 16
    area = area_of((rank ^ (part & -SENDERS)) + place * 0)
    to = area + place
    area += piece * 8
    _send(h, h_inv, h_low, h_high, own_state, area, to, 0, AREA, PROGRAMS)

    for t in range(0, T, 2):
        for u in gl.static_range(2):
            if mask is not None:
                real = gl.load(mask_p, mask=(b < B) & (t + u < T), other=0)
                mask_p += sign * B
            wait_for_round(t // 2, PIECES * u, AREA)
            right = _read_states(states_at, PIECES * u, AREA)
            total_r = mma_v2(w_r, right, zeros)
            total_n = mma_v2(w_n, right, zeros)
            total_z = mma_v2(w_z, right, zeros)
            if PIECES == 2:
                wait_for_round(t // 2, PIECES * u + 1, AREA)
                right = _read_states(states_at, PIECES * u + 1, AREA)
                total_r = mma_v2(last_r, right, total_r)
                total_n = mma_v2(last_n.load(LEFT), right, total_n)
                total_z = mma_v2(last_z, right, total_z)
            sums_r.store(by_channels(total_r))
            sums_n.store(by_channels(total_n))
            sums_z.store(by_channels(total_z))
            wait_for_copies(STAGES - 2)
            slot = (t + u) % STAGES
            gi_r = read_gate(ring, slot, 0, GATES)
            gi_n = read_gate(ring, slot, 2, GATES)
            gi_z = read_gate(ring, slot, 1, GATES)
            gh_r = _summed(sums_r) * s_r + b_r
            gh_z = _summed(sums_z) * s_z + b_z
            gh_n = _summed(sums_n) * s_n + b_n
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h, True)
            if state_grid is not None:
                if gates is not None:
                    z = gl.where(in_range(new, state_inv, state_low, state_high), z, -1.0)
                new = codes(new, state_inv, state_low, state_high) * state_scale
            here = inside & (t + u < T)
            if mask is not None:
                new = gl.where((real != 0)[None, :], new, h)
            h = new
            _send(h, h_inv, h_low, h_high, own_state, area, to, PIECES * (1 - u), AREA, PROGRAMS)
            fetch_inputs(ring, t + u + STAGES - 1, gi_p, lines, present, T)
            gi_p += step * 3
            gl.store(out_p + offset, h.to(states.dtype.element_ty), mask=here)
            out_p += step
            if gates is not None:
                store_gates(gates_p + gates_offset, r, z, n, hn, here, H)
                gates_p += step * planes
    # The last round is nobody's state, but must have come before a program may end.
    for i in gl.static_range(PIECES):
        wait_for_round((T + 1) // 2, i, AREA, False)
    close_exchange()


def call(
    weights: ByteWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    return ClusterCall(
        kernel=_forward,
        grid=(1, triton.cdiv(rows, ROWS), weights.blocks),
        io=(gi, h0, mask, states, packed(gates)),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "PROGRAMS": weights.programs,
            "CHANNELS": weights.channels,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
        },
        warps=WARPS,
        portable=True,
        cluster=weights.programs,
    )
