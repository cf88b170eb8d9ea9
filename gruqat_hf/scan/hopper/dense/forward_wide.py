"""Forward scan of blocks that no cluster holds, of fp16 operands, floats or integers: 32 programs of a grid share one.

A step waits for: the others' states, product, sum over its parts, gates, own state to the mailbox. Inputs of the next steps are
on their way to shared memory, results are stored after the state is posted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.family import KernelCall
from ...triton.math import codes, gru_gates, in_range, load_grid
from ..gluon import gl, jit, mma_v2, wait_for_copies
from ..layouts import copy_layout, ring_memory
from ..mailbox import new_mailbox, post_pairs
from . import STAGES
from .layouts import CHANNELS, ROWS, WARPS
from .tiles import fetch_inputs, keep, lines_of_slot, load_gates, read_gate, store_gates, summed
from .weights import HalfWeights
from .wide import (
    BLOCK,
    PROGRAMS,
    WORDS,
    hear_operand,
    held_weights,
    hold_weights,
    load_weights,
    no_product,
    operand_place,
    own_place,
    parts_memory,
    patience_of,
    pieces,
    sum_layout,
    waves,
)

#: Of :func:`.wide.patience_of`: at one row, and for each doubling.
_PATIENCE = 100, 90
_CHANNELS, _ROWS = gl.constexpr(CHANNELS), gl.constexpr(ROWS)
_BLOCK, _PROGRAMS, _WORDS = gl.constexpr(BLOCK), gl.constexpr(PROGRAMS), gl.constexpr(WORDS)


@jit(do_not_specialize=["T", "B", "first_tile", "patience"])
def _forward(
    gi, h0, mask, states, gates, mailbox, weight, scale, bias, h_grid, state_grid, T, B, first_tile, patience,
    H: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, STATE_N: gl.constexpr, REVERSE: gl.constexpr,
    PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows (first_tile + j) * ROWS and on. Other parameters as in the block-diagonal
    kernel; ``mailbox`` ``[T + 2, tiles of this launch, blocks, WORDS]``; ``patience``: cycles that a program waits before its
    first look.

    Steps go in pairs, whose parts of products have memory of their own; a last step that is none computes on zeros, and stores
    nothing.
    """
    SUMS: gl.constexpr = sum_layout()
    GATES: gl.constexpr = gl.SliceLayout(0, SUMS)
    SLOTS: gl.constexpr = STAGES // 2
    COPY: gl.constexpr = copy_layout(_CHANNELS, gi.dtype.element_ty.primitive_bitwidth // 8, 8)
    part = gl.program_id(0)
    first_row = (first_tile + gl.program_id(1)) * _ROWS
    block = gl.program_id(2)

    tile = weight + (block * _PROGRAMS + part) * (_CHANNELS * _BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * _BLOCK * _BLOCK
    w_r = load_weights(tile)
    w_z = load_weights(tile + gate_stride)
    w_n = hold_weights(tile + 2 * gate_stride)

    s = part * _CHANNELS + gl.arange(0, _CHANNELS, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = block * SIZE + s
    b_r, b_z, b_n = load_gates(bias, c, own, H)
    if PORTABLE:
        s_r, s_z, s_n = load_gates(scale, c, own, H)
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    offset = b[None, :] * H + c[:, None]
    inside = own[:, None] & (b < B)[None, :]
    h = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row
    if gates is not None:
        planes: gl.constexpr = 1 if gates.dtype.element_ty == gl.int64 else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b

    INPUT: gl.constexpr = gi.dtype.element_ty
    RING: gl.constexpr = ring_memory(_CHANNELS, 4, INPUT.primitive_bitwidth // 8)
    even = gl.allocate_shared_memory(INPUT, [SLOTS, 4 * _ROWS, _CHANNELS], RING)
    odd = gl.allocate_shared_memory(INPUT, [SLOTS, 4 * _ROWS, _CHANNELS], RING)
    parts_even = parts_memory(), parts_memory(), parts_memory()
    parts_odd = parts_memory(), parts_memory(), parts_memory()
    lines, present = lines_of_slot(even, block, part, first_row, B, H, SIZE, COPY, 1)
    gi_p = gi + start * row * 3
    for i in gl.static_range(STAGES - 1):
        fetch_inputs(even if i % 2 == 0 else odd, i // 2, gi_p + lines, present[0] & (i < T))
        gi_p += step * 3

    letters = (mailbox + (gl.program_id(1) * (H // SIZE) + block) * _WORDS).to(gl.int64)
    round_bytes = gl.num_programs(1).to(gl.int64) * ((H // SIZE) * _WORDS * 4)
    heard_at = letters + operand_place()
    posted_at = letters + own_place(part, GATES)
    x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
    post_pairs(posted_at, x)

    for t in range(0, T, 2):
        for u in gl.static_range(2):
            slot = (t + u) % STAGES // 2
            free = (t + u + STAGES - 1) % STAGES // 2
            if mask is not None:
                real = gl.load(mask_p, mask=(b < B) & (t + u < T), other=0)
            parts = parts_even if u == 0 else parts_odd
            ring = even if u == 0 else odd
            right = hear_operand(heard_at, patience)
            product_r = mma_v2(w_r, right, no_product())
            product_z = mma_v2(w_z, right, no_product())
            product_n = mma_v2(held_weights(w_n), right, no_product())
            keep((product_r, product_z, product_n), parts)
            wait_for_copies(STAGES - 2)
            gi_r = read_gate(ring, slot, 0, GATES)
            gi_n = read_gate(ring, slot, 2, GATES)
            gi_z = read_gate(ring, slot, 1, GATES)
            gh_r = summed(parts[0], SUMS)
            gh_z = summed(parts[1], SUMS)
            gh_n = summed(parts[2], SUMS)
            if PORTABLE:
                gh_r = gh_r * s_r
                gh_z = gh_z * s_z
                gh_n = gh_n * s_n
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r + b_r, gh_z + b_z, gh_n + b_n, h, PORTABLE)
            if state_grid is not None:
                if gates is not None:
                    z = gl.where(in_range(new, state_inv, state_low, state_high), z, -1.0)
                new = codes(new, state_inv, state_low, state_high) * state_scale
            if mask is not None:
                new = gl.where((real != 0)[None, :], new, h)
                mask_p += sign * B
            h = new
            heard_at += round_bytes
            posted_at += round_bytes
            x = codes(new, h_inv, h_low, h_high) if PORTABLE else new
            post_pairs(posted_at, x)
            fetch_inputs(odd if u == 0 else even, free, gi_p + lines, present[0] & (t + u + STAGES - 1 < T))
            here = inside & (t + u < T)
            gl.store(out_p + offset, new.to(states.dtype.element_ty), mask=here)
            if gates is not None:
                store_gates(gates_p + gates_offset, r, z, n, hn, here, H)
                gates_p += step * planes
            gi_p += step * 3
            out_p += step


def forward(
    weights: HalfWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    steps, rows, _, _ = gi.shape
    parts = pieces(steps, reverse)
    # What another launch goes on from is not rounded to half precision.
    rounded = len(parts) > 1 and states.dtype != torch.float32
    filled = torch.empty_like(states, dtype=torch.float32) if rounded else states
    for at in parts:
        io = gi[at], h0, None if mask is None else mask[at], filled[at], None if gates is None else packed(gates[at])
        for wave in waves(rows, weights.blocks, gi.device):
            _launch(weights, io, wave, reverse)
        h0 = filled[at.start if reverse else at.stop - 1]
    if rounded:
        states.copy_(filled)


def _launch(weights: HalfWeights, io: tuple[Tensor | None, ...], wave: tuple[int, int], reverse: bool) -> None:
    """Launch the kernel for some steps, of which ``io`` is, and for a wave's tiles of rows."""
    gi, (first, tiles) = io[0], wave
    assert gi is not None
    steps, rows, _, hidden = gi.shape
    mailbox = new_mailbox((steps + 2, tiles, weights.blocks, WORDS), gi.device)
    KernelCall(
        kernel=_forward,
        grid=(PROGRAMS, tiles, weights.blocks),
        io=(*io, mailbox),
        static=(
            weights.weight,
            weights.scale,
            weights.bias,
            weights.h_grid,
            weights.state_grid,
            steps,
            rows,
            first,
            patience_of(*_PATIENCE, rows, tiles),
        ),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=WARPS,
        portable=weights.quantized,
        cooperative=True,
    ).run()
