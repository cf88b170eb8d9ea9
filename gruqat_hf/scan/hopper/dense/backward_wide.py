"""Backward scan of blocks that no cluster holds: 32 programs of a grid share one, from the last step of the scan to the first.

A step waits for: product with all channels' gate gradients, sum over its parts, that and the output's gradient times three
coefficients to the mailbox. Coefficients follow from saved gates and states alone, and are ready before.

Gate gradients travel as fp16, brought near 1 by a power of two for each row that all programs must know: every RESCALE steps they
tell each other their largest gradients, which count from the next step on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.block_diagonal.weights import packed
from ...triton.exchange_plan import cdiv
from ...triton.family import KernelCall, ScanGradients, aligned
from ...triton.magnitude import largest_magnitudes
from ...triton.math import in_range, load_grid
from ..gluon import gl, jit, mma_v2, wait_for_copies
from ..gradients import coefficients, powers
from ..mailbox import hear_magnitudes, new_mailbox, post_magnitudes, post_pairs
from ..results import Gradients, room_for_sums, store_step, store_sums
from ..staging import fetch_step, read, rings
from . import RESCALE, STAGES
from .layouts import CHANNELS, ROWS, WARPS, load_weights, operand_place, sum_layout
from .maxima import maxima_layout
from .tiles import summed
from .weights import BackwardWeights
from .wide import (
    BLOCK,
    PARTS,
    PROGRAMS,
    WORDS,
    Wave,
    hear_operands,
    held_weights,
    hold_weights,
    no_product,
    own_place,
    parts_memory,
    patience_of,
    pieces,
    waves,
)

#: Of :func:`.wide.patience_of`: at one row, and for each doubling.
_PATIENCE = 350, 60
_CHANNELS, _ROWS = gl.constexpr(CHANNELS), gl.constexpr(ROWS)
_BLOCK, _PARTS = gl.constexpr(BLOCK), gl.constexpr(PARTS)
_PROGRAMS, _WORDS = gl.constexpr(PROGRAMS), gl.constexpr(WORDS)


@jit
def _largest_told(maxima, GATES: gl.constexpr):
    """The largest of each row that all programs have posted to ``maxima`` ``[PROGRAMS, ROWS]``."""
    LAYOUT: gl.constexpr = maxima_layout(_ROWS, gl.num_warps())
    program = gl.arange(0, _PROGRAMS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    largest = gl.max(hear_magnitudes(maxima.to(gl.int64) + (program * _ROWS + row) * 4), axis=0)
    return gl.convert_layout(largest, gl.SliceLayout(0, GATES))


@jit(do_not_specialize=["T", "B", "first_tile", "patience"])
def _backward(
    h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums, mailbox, maxima, largest_gradient, weight, h_grid,
    T, B, first_tile, patience,
    H: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, RESCALE: gl.constexpr, CLIPPED: gl.constexpr,
    REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows (first_tile + j) * ROWS and on. Other parameters as in the block-diagonal
    kernel; ``largest_gradient`` ``[2, B]`` is that of each row of dstates, then of dlast. ``mailbox`` ``[T + 1, tiles of this
    launch, blocks, 3, WORDS]`` is for gate gradients, ``maxima`` ``[cdiv(T, RESCALE), tiles, blocks, PROGRAMS, ROWS]`` for the
    largest ones; ``patience``: cycles that a program waits before its first look.

    Steps go in pairs, each with shared memory of its own, as in the forward kernel.
    """
    SUMS: gl.constexpr = sum_layout(_PARTS)
    GATES: gl.constexpr = gl.SliceLayout(0, SUMS)
    SLOTS: gl.constexpr = STAGES // 2
    part = gl.program_id(0)
    row_tile = first_tile + gl.program_id(1)
    first_row = row_tile * _ROWS
    block = gl.program_id(2)
    first_channel = block * SIZE + part * _CHANNELS
    channels = gl.minimum(SIZE - part * _CHANNELS, _CHANNELS)

    tile = weight + (block * _PROGRAMS + part) * (_CHANNELS * _BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * _BLOCK * _BLOCK
    w_r = load_weights(tile, _BLOCK)
    w_z = load_weights(tile + gate_stride, _BLOCK)
    w_n = hold_weights(tile + 2 * gate_stride)
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)

    s = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(1, GATES))
    n = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))
    b = first_row + n
    c = first_channel + s
    row = B.to(gl.int64) * H
    sign: gl.constexpr = 1 if REVERSE else -1
    start = gl.to_tensor(0).to(gl.int64) if REVERSE else (T - 1).to(gl.int64)
    step = row * sign
    inside = (s < channels)[:, None] & (b < B)[None, :]
    offset = b[None, :] * H + c[:, None]
    wide = b[None, :] * (3 * H) + c[:, None]
    initial = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    at = start * row
    if mask is not None:
        mask_p = mask + start * B + b
    peak = gl.load(largest_gradient + b, mask=b < B, other=0.0)
    up, down = powers(gl.maximum(peak, gl.load(largest_gradient + B + b, mask=b < B, other=0.0)), 0)

    even = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, _CHANNELS, _ROWS)
    odd = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, _CHANNELS, _ROWS)
    ahead = at
    for i in gl.static_range(STAGES):
        going = even if i % 2 == 0 else odd
        fetch_step(going, i // 2, gates, dstates, states, ahead, step, first_row, first_channel, channels, i, T, B, H)
        ahead += step
    parts_even = parts_memory()
    parts_odd = parts_memory()
    nothing = gl.full([_CHANNELS, _ROWS], 0.0, gl.float32, layout=GATES)
    db_r = nothing
    db_z = nothing
    db_n = nothing
    db_in = nothing

    tiles = gl.num_programs(1).to(gl.int64)
    place = gl.program_id(1) * (H // SIZE) + block
    GATE_BYTES: gl.constexpr = _WORDS * 4
    round_bytes = tiles * ((H // SIZE) * 3 * GATE_BYTES)
    letters = (mailbox + place * (3 * _WORDS)).to(gl.int64)
    heard_at = letters + operand_place(_BLOCK)
    posted_at = letters + own_place(part, GATES)
    maxima_p = maxima + place * (_PROGRAMS * _ROWS)
    carry = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32)
    wait_for_copies(STAGES - 1)

    for i in range(0, T, 2):
        slot = (i // 2) % SLOTS
        for u in gl.static_range(2):
            going = even if u == 0 else odd
            parts = parts_even if u == 0 else parts_odd
            h = gl.where(i + u + 1 == T, initial, read(going[2], slot, GATES).to(gl.float32))
            runs = inside & (i + u < T)
            if mask is not None:
                runs = runs & (gl.load(mask_p, mask=(b < B) & (i + u < T), other=0) != 0)[None, :]
                mask_p += sign * B
            c_r, c_z, c_hn, c_n, direct = coefficients(read(going[0], slot, GATES), h, runs, CLIPPED)
            d = read(going[1], slot, GATES).to(gl.float32)
            if i % RESCALE == 0:
                if u == 0:
                    post_magnitudes((maxima_p + part * _ROWS + n).to(gl.int64), gl.max(gl.abs(carry), axis=0))
                else:
                    up, down = powers(gl.maximum(_largest_told(maxima_p, GATES), peak), 0)
                    maxima_p += tiles * ((H // SIZE) * _PROGRAMS * _ROWS)
            grad = d + carry
            counted = grad
            scaled = d * up[None, :] + carry * up[None, :]
            if mask is not None:
                counted = gl.where(runs, grad, 0.0)
                scaled = gl.where(runs, scaled, 0.0)
            post_pairs(posted_at, scaled * c_r)
            post_pairs(posted_at + GATE_BYTES, scaled * c_z)
            post_pairs(posted_at + 2 * GATE_BYTES, scaled * c_hn)

            # While they are on their way.
            here = inside & (i + u < T)
            adjoint_p = None if adjoint is None else adjoint + at + offset
            da_r, da_z, dh_n, da_n = store_step(
                dgi + at * 3 + wide, dgh_n + at + offset, adjoint_p, counted, c_r, c_z, c_hn, c_n, here, H
            )
            at += step
            db_r += da_r
            db_z += da_z
            db_n += dh_n
            db_in += da_n
            weighted = nothing + down[None, :]
            if h_grid is not None:
                weighted = gl.where(in_range(h, h_inv, h_low, h_high), weighted, 0.0)

            x_r, x_z, x_n = hear_operands(heard_at, patience)
            total = mma_v2(w_r, x_r, no_product())
            total = mma_v2(w_z, x_z, total)
            total = mma_v2(held_weights(w_n), x_n, total)
            parts.store(total)
            heard_at += round_bytes
            posted_at += round_bytes
            wait_for_copies(STAGES - 2)
            carry = summed(parts, SUMS) * weighted + grad * direct
            fetch_step(
                going, slot, gates, dstates, states, ahead, step, first_row, first_channel, channels, i + u + STAGES, T, B, H
            )
            ahead += step
    gl.store(dh0 + offset, carry.to(dh0.dtype.element_ty), mask=inside)
    # Sums go through shared memory, which the compiler has where copies of steps that are none might still arrive.
    wait_for_copies(0)
    gate = ((B + _ROWS - 1) // _ROWS).to(gl.int64) * H
    store_sums(sums + row_tile.to(gl.int64) * H + c, gate, db_r, db_z, db_n, db_in, s < channels)


def backward(
    prepared: BackwardWeights,
    gi: Tensor,
    h0: Tensor,
    states: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    reverse: bool,
    dstates: Tensor,
    dlast: Tensor,
    want_adjoint: bool,
    want_weights: bool,
) -> ScanGradients:
    """Gradients of the scan's inputs and of both biases, as the cluster's kernel gives them."""
    found, parts = Gradients.like(gi, h0, want_adjoint), pieces(gi.shape[0], reverse)
    sums, carry = [], None
    for at, before in zip(reversed(parts), [*reversed(parts[:-1]), None]):
        # What a launch begins with and leaves behind, where another one goes on with it.
        initial = h0 if before is None else states[before.start if reverse else before.stop - 1]
        if before is not None and carry is None:
            carry = torch.empty_like(h0, dtype=torch.float32)
        out = found.dgi[at], found.dgh_n[at], found.dh0 if before is None else carry
        saved = initial, None if mask is None else mask[at], aligned(states[at]), packed(aligned(gates[at])), aligned(dstates[at])
        adjoint = None if found.adjoint is None else found.adjoint[at]
        sums.append(room_for_sums(gi, cdiv(gi.shape[1], ROWS)))
        largest = largest_magnitudes(saved[-1], dlast)
        for wave in waves(gi.shape[1], gi.shape[3] // prepared.size, gi.device):
            _launch(prepared, (*saved, dlast, *out, adjoint, sums[-1]), largest, wave, reverse)
        if carry is not None:
            dlast = carry
    dbias, dbias_input = torch.cat(sums, 1).sum(1).split(3)
    return ScanGradients(
        found.dgi, found.dh0, found.dgh_n, found.adjoint, dbias=dbias if want_weights else None, dbias_input=dbias_input
    )


def _launch(prepared: BackwardWeights, io: tuple[Tensor | None, ...], largest: Tensor, wave: Wave, reverse: bool) -> None:
    """Launch the kernel for some steps, of which ``io`` is, and for a wave's tiles of rows."""
    dgi, (first, tiles, _) = io[6], wave
    assert dgi is not None
    steps, rows, _, hidden = dgi.shape
    blocks = hidden // prepared.size
    mailbox = new_mailbox((steps + 1, tiles, blocks, 3, WORDS), dgi.device)
    maxima = new_mailbox((cdiv(steps, RESCALE), tiles, blocks, PROGRAMS, ROWS), dgi.device).view(torch.float32)
    KernelCall(
        kernel=_backward,
        grid=(PROGRAMS, tiles, blocks),
        io=(*io, mailbox, maxima),
        static=(largest, prepared.weight, prepared.h_grid, steps, rows, first, patience_of(*_PATIENCE, rows, tiles)),
        constants={
            "H": hidden,
            "SIZE": prepared.size,
            "STAGES": STAGES,
            "RESCALE": RESCALE,
            "CLIPPED": prepared.clipped,
            "REVERSE": reverse,
        },
        warps=WARPS,
        cooperative=True,
    ).run()
