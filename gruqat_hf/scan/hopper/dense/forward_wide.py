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
from ...triton.math import codes, gru_gates, load_grid, on_grid
from ..gluon import gl, jit, mma_v2, wait_for_copies
from ..layouts import copy_layout, ring_memory
from ..mailbox import new_mailbox, post_pairs
from . import STAGES
from .layouts import CHANNELS, ROWS, WARPS, load_weights, operand_place, sum_layout
from .tiles import fetch_inputs, keep, lines_of_slot, load_gates, read_gate, store_gates, summed
from .weights import HalfWeights
from .wide import (
    BLOCK,
    PARTS,
    PROGRAMS,
    WORDS,
    Wave,
    hear_operand,
    hear_rest_of_operand,
    held_weights,
    hold_weights,
    look_for_operand,
    no_product,
    own_place,
    parts_memory,
    patience_of,
    pieces,
    waves,
)

#: Of :func:`.wide.patience_of`: at one row, and for each doubling.
_PATIENCE = 100, 90
#: Tiles that take turns in a program, at most: what shared memory and registers hold.
_MOST_TURNS = 4
_CHANNELS, _ROWS = gl.constexpr(CHANNELS), gl.constexpr(ROWS)
_BLOCK, _PARTS = gl.constexpr(BLOCK), gl.constexpr(PARTS)
_PROGRAMS, _WORDS = gl.constexpr(PROGRAMS), gl.constexpr(WORDS)


@jit
def _turn_memory(INPUT: gl.constexpr, RING: gl.constexpr, SLOTS: gl.constexpr):
    """What every other turn has for itself, so that one barrier parts a turn from the next: parts of three products, and a ring
    of inputs on their way."""
    parts = parts_memory(), parts_memory(), parts_memory()
    return parts, gl.allocate_shared_memory(INPUT, [SLOTS, 4 * _ROWS, _CHANNELS], RING)


@jit
def _multiply(right, w_r, w_z, w_n):
    """The parts of the three gates' products that warps compute."""
    product_r = mma_v2(w_r, right, no_product())
    product_z = mma_v2(w_z, right, no_product())
    return product_r, product_z, mma_v2(held_weights(w_n), right, no_product())


@jit(do_not_specialize=["T", "B", "first_tile", "patience"])
def _forward(
    gi, h0, mask, states, gates, mailbox, weight, scale, bias, h_grid, state_grid, T, B, first_tile, patience,
    H: gl.constexpr, SIZE: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, STATE_N: gl.constexpr,
    REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows (first_tile + j * TILES) * ROWS and on. Other parameters as in the
    block-diagonal kernel; ``mailbox`` ``[T + 2, groups * TILES, blocks, WORDS]``; ``patience``: cycles that a program of one tile
    waits before its first look.

    TILES: tiles of ROWS rows, which take turns within a step, so that one's states travel while others are computed. A turn ends
    with the next one's product, whose states are looked for before the gates, and for what was not there yet after them. Steps go
    in pairs, as turns alternate between two sets of memory; a last step that is none computes on zeros, and stores nothing.
    """
    SUMS: gl.constexpr = sum_layout(_PARTS)
    GATES: gl.constexpr = gl.SliceLayout(0, SUMS)
    TILE: gl.constexpr = _ROWS * H
    SLOTS: gl.constexpr = STAGES * TILES
    AHEAD: gl.constexpr = SLOTS - 1
    COPY: gl.constexpr = copy_layout(_CHANNELS, gi.dtype.element_ty.primitive_bitwidth // 8, 8)
    part = gl.program_id(0)
    first_row = (first_tile + gl.program_id(1) * TILES) * _ROWS
    block = gl.program_id(2)

    tile = weight + (block * _PROGRAMS + part) * (_CHANNELS * _BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * _BLOCK * _BLOCK
    w_r = load_weights(tile, _BLOCK)
    w_z = load_weights(tile + gate_stride, _BLOCK)
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
        carried = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    offset = b[None, :] * H + c[:, None]
    h = ()
    inside = ()
    for k in gl.static_range(TILES):
        inside = inside + (own[:, None] & (b + k * _ROWS < B)[None, :],)
        h = h + (gl.load(h0 + k * TILE + offset, mask=inside[k], other=0.0).to(gl.float32),)
    out_p = states + start * row
    if gates is not None:
        planes: gl.constexpr = 1 if gates.dtype.element_ty == gl.int64 else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b

    INPUT: gl.constexpr = gi.dtype.element_ty
    RING: gl.constexpr = ring_memory(_CHANNELS, 4, INPUT.primitive_bitwidth // 8)
    memory = _turn_memory(INPUT, RING, SLOTS // 2), _turn_memory(INPUT, RING, SLOTS // 2)
    lines, present = lines_of_slot(memory[0][1], block, part, first_row, B, H, SIZE, COPY, TILES)
    gi_p = gi + start * row * 3
    for i in gl.static_range(AHEAD):
        inputs = gi_p + 3 * (i % TILES) * TILE + lines
        fetch_inputs(memory[i % 2][1], i // 2, inputs, present[i % TILES] & (i // TILES < T))
        if (i + 1) % TILES == 0:
            gi_p += step * 3

    TILE_BYTES: gl.constexpr = (H // SIZE) * _WORDS * 4
    letters = (mailbox + (gl.program_id(1) * TILES * (H // SIZE) + block) * _WORDS).to(gl.int64)
    round_bytes = gl.num_programs(1).to(gl.int64) * (TILES * TILE_BYTES)
    heard_at = letters + operand_place(_BLOCK)
    posted_at = letters + own_place(part, GATES)
    for k in gl.static_range(TILES):
        x = codes(h[k], h_inv, h_low, h_high) if PORTABLE else h[k]
        post_pairs(posted_at + k * TILE_BYTES, x)
    if TILES > 1:
        keep(_multiply(hear_operand(heard_at, 0), w_r, w_z, w_n), memory[0][0])
        wait_for_copies(AHEAD - 1)

    for t in range(0, T, 2):
        for u in gl.static_range(2):
            first_slot = (t + u) * TILES % SLOTS
            free = ((t + u) * TILES + AHEAD) % SLOTS
            following = ()
            for k in gl.static_range(TILES):
                if mask is not None:
                    real = gl.load(mask_p + k * _ROWS, mask=(b + k * _ROWS < B) & (t + u < T), other=0)
                parts, ring = memory[(u * TILES + k) % 2]
                next_parts, next_ring = memory[(u * TILES + k + 1) % 2]
                slot = (first_slot + k) // 2
                if TILES == 1:
                    keep(_multiply(hear_operand(heard_at, patience), w_r, w_z, w_n), parts)
                    wait_for_copies(AHEAD - 1)
                gi_r = read_gate(ring, slot, 0, GATES)
                gi_n = read_gate(ring, slot, 2, GATES)
                gi_z = read_gate(ring, slot, 1, GATES)
                gh_r = summed(parts[0], SUMS)
                gh_z = summed(parts[1], SUMS)
                gh_n = summed(parts[2], SUMS)
                next_at = heard_at + (k + 1) * TILE_BYTES if k + 1 < TILES else heard_at + round_bytes
                if TILES > 1:
                    seen = look_for_operand(next_at)
                if PORTABLE:
                    gh_r = gh_r * s_r
                    gh_z = gh_z * s_z
                    gh_n = gh_n * s_n
                r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r + b_r, gh_z + b_z, gh_n + b_n, h[k], PORTABLE)
                if state_grid is not None:
                    new, z = on_grid(new, z, carried, gates is not None)
                if mask is not None:
                    new = gl.where((real != 0)[None, :], new, h[k])
                following = following + (new,)
                x = codes(new, h_inv, h_low, h_high) if PORTABLE else new
                post_pairs(posted_at + round_bytes + k * TILE_BYTES, x)
                # The slot that the turn before has read is free for the one that comes so long after it.
                inputs = gi_p + 3 * ((k + AHEAD) % TILES) * TILE + lines
                wanted = present[(k + AHEAD) % TILES] & (t + u + (k + AHEAD) // TILES < T)
                fetch_inputs(next_ring, (free + k) % SLOTS // 2, inputs, wanted)
                if k == 0:
                    gi_p += step * 3
                if TILES > 1:
                    keep(_multiply(hear_rest_of_operand(next_at, seen), w_r, w_z, w_n), next_parts)
                    wait_for_copies(AHEAD - 1)
                here = inside[k] & (t + u < T)
                gl.store(out_p + k * TILE + offset, new.to(states.dtype.element_ty), mask=here)
                if gates is not None:
                    store_gates(gates_p + k * planes * TILE + gates_offset, r, z, n, hn, here, H)
            h = following
            heard_at += round_bytes
            posted_at += round_bytes
            out_p += step
            if gates is not None:
                gates_p += step * planes
            if mask is not None:
                mask_p += sign * B


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
        for wave in waves(rows, weights.blocks, gi.device, _MOST_TURNS):
            _launch(weights, io, wave, reverse)
        h0 = filled[at.start if reverse else at.stop - 1]
    if rounded:
        states.copy_(filled)


def _launch(weights: HalfWeights, io: tuple[Tensor | None, ...], wave: Wave, reverse: bool) -> None:
    """Launch the kernel for some steps, of which ``io`` is, and for a wave's tiles of rows."""
    gi, (first, groups, turns) = io[0], wave
    assert gi is not None
    steps, rows, _, hidden = gi.shape
    mailbox = new_mailbox((steps + 2, groups * turns, weights.blocks, WORDS), gi.device)
    KernelCall(
        kernel=_forward,
        grid=(PROGRAMS, groups, weights.blocks),
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
            patience_of(*_PATIENCE, rows, groups),
        ),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "TILES": turns,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=WARPS,
        portable=weights.quantized,
        cooperative=True,
    ).run()
