"""Backward scan of large blocks on Hopper clusters, from the last step of the scan to the first.

A step waits for: parts of the state's gradient from all programs, their sum, that times three coefficients to shared memory,
barrier, product, its parts to all programs. Coefficients follow from saved gates and states alone, and are ready before.

Parts travel as fp16, brought near 1 by a power of two for each row that all programs must know: every RESCALE steps they tell
each other their largest gradients, which count from the next step on.
"""

from __future__ import annotations

from torch import Tensor

from ...replay import hidden_bias
from ...triton.block_diagonal.weights import packed
from ...triton.dense import backward as portable
from ...triton.exchange_plan import cdiv
from ...triton.family import ScanGradients, aligned
from ...triton.magnitude import largest_magnitudes
from ...triton.math import in_range, load_grid
from ..cluster import ClusterCall
from ..exchange import area_bytes, area_of, area_shape, close_exchange, open_exchange, read_halves, send_chunks, wait_for_round
from ..gluon import constexpr_function, gl, jit, mma_v2, wait_for_copies
from ..gradients import coefficients, powers
from ..results import Gradients, room_for_sums, store_step, store_sums
from ..staging import fetch_step, operands, read, rings
from . import LARGEST_HALF, RESCALE, STAGES, backward_wide
from .layouts import CHANNELS, ROWS, WARPS, part_layout, parts_layout
from .maxima import hear_largest, maxima_bytes, tell_largest
from .turns import rows_taken
from .weights import BackwardWeights
from .weights import backward_weights as prepare

__all__ = ["backward", "prepare"]

_CHANNELS = gl.constexpr(CHANNELS)
_ROWS = gl.constexpr(ROWS)


@constexpr_function
def _area(PROGRAMS, TAKEN):
    """The exchange's: of all programs' parts, twice, and of maxima."""
    return area_shape((PROGRAMS * CHANNELS * TAKEN * 2,), 2, maxima_bytes(PROGRAMS, ROWS, WARPS))


@jit
def _load_weights(weight, BLOCK: gl.constexpr):
    """A program's part of a gate's weights into registers, as a product's left side."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, part_layout(), 2)
    into = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LEFT))
    out = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, LEFT))
    return gl.load(weight + into[:, None] * _CHANNELS + out[None, :])


@jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums, largest_gradient, weight, h_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, PROGRAMS: gl.constexpr, TAKEN: gl.constexpr, STAGES: gl.constexpr,
    RESCALE: gl.constexpr, CLIPPED: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows j * TAKEN and on. Other parameters as in the block-diagonal kernel;
    ``largest_gradient`` ``[2, B]`` is that of each row of dstates, then of dlast.

    Steps go in pairs, each with shared memory and a slot of its own, as in the forward kernel. A step's parts count in the next.
    """
    PARTS: gl.constexpr = parts_layout(PROGRAMS)
    GATES: gl.constexpr = gl.SliceLayout(0, PARTS)
    PRODUCT: gl.constexpr = part_layout()
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    BLOCK: gl.constexpr = PROGRAMS * _CHANNELS
    AREA: gl.constexpr = _area(PROGRAMS, TAKEN)
    PART: gl.constexpr = _CHANNELS * TAKEN * 2
    PAIRS: gl.constexpr = TAKEN // 2
    SLOTS: gl.constexpr = STAGES // 2
    REPEATS: gl.constexpr = BLOCK // 256
    part = gl.program_id(0)
    first_row = gl.program_id(1) * TAKEN
    end = B if TAKEN == _ROWS else gl.minimum(B, first_row + TAKEN)
    block = gl.program_id(2)
    first_channel = block * SIZE + part * _CHANNELS
    channels = gl.minimum(SIZE - part * _CHANNELS, _CHANNELS)

    tile = weight + (block * PROGRAMS + part) * (_CHANNELS * BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    w_r = _load_weights(tile, BLOCK)
    w_z = _load_weights(tile + gate_stride, BLOCK)
    w_n = _load_weights(tile + 2 * gate_stride, BLOCK)
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
    inside = (s < channels)[:, None] & (b < end)[None, :]
    offset = b[None, :] * H + c[:, None]
    wide = b[None, :] * (3 * H) + c[:, None]
    initial = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    at = start * row
    if mask is not None:
        mask_p = mask + start * B + b
    peak = gl.load(largest_gradient + b, mask=b < end, other=0.0)
    up, down = powers(gl.maximum(peak, gl.load(largest_gradient + B + b, mask=b < end, other=0.0)), 0)

    even = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, _CHANNELS, _ROWS)
    odd = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, _CHANNELS, _ROWS)
    ahead = at
    for i in gl.static_range(STAGES):
        going = even if i % 2 == 0 else odd
        fetch_step(going, i // 2, gates, dstates, states, ahead, step, first_row, first_channel, channels, i, T, end, H)
        ahead += step
    x_even = operands(_CHANNELS)
    x_odd = operands(_CHANNELS)
    zeros = gl.full([BLOCK, _ROWS], 0.0, gl.float32, layout=PRODUCT)
    nothing = gl.full([_CHANNELS, _ROWS], 0.0, gl.float32, layout=GATES)
    db_r = nothing
    db_z = nothing
    db_n = nothing
    db_in = nothing

    # Of a product's rows, 16 are a warp's, and 128 all warps'; two such runs are a warp's part for one program.
    m = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, PRODUCT))[:, None]
    column = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, PRODUCT))[None, :]
    base = open_exchange(AREA, PROGRAMS)
    area = area_of(((m >> 4) & 7) * REPEATS + (m >> 8) + column * 0, base)
    to = area + part * PART + ((m & 7) * PAIRS + (column >> 1)) * 16
    chosen = None
    if TAKEN < _ROWS:
        chosen = (column < TAKEN).to(gl.int32) + area * 0
    program = gl.arange(0, PROGRAMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))[:, None, None]
    mine = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))[None, :, None]
    mine_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))[None, None, :]
    chunk = (mine >> 2) * PAIRS + (mine_row >> 1) % PAIRS
    parts_at = base + program * PART + chunk * 16 + (mine & 3) * 4 + (mine_row & 1) * 2

    # What counts in the first step: no program's parts, and the gradient of the last state.
    send_chunks(zeros.to(gl.float16), area, to, 0, AREA, chosen)
    weighted = nothing
    passed = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32)
    wait_for_copies(STAGES - 1)

    for i in range(0, T, 2):
        slot = (i // 2) % SLOTS
        for u in gl.static_range(2):
            going = even if u == 0 else odd
            h = gl.where(i + u + 1 == T, initial, read(going[2], slot, GATES).to(gl.float32))
            runs = inside & (i + u < T)
            if mask is not None:
                runs = runs & (gl.load(mask_p, mask=(b < end) & (i + u < T), other=0) != 0)[None, :]
                mask_p += sign * B
            c_r, c_z, c_hn, c_n, direct = coefficients(read(going[0], slot, GATES), h, runs, CLIPPED)
            d = read(going[1], slot, GATES).to(gl.float32)
            wait_for_round(base, i // 2, u, AREA)
            came = gl.sum(read_halves(parts_at, u, AREA).to(gl.float32), axis=0)
            if TAKEN < _ROWS:
                came = gl.where(inside, came, 0.0)
            carry = came * weighted + passed

            if u == 0:
                if i % RESCALE == 0:
                    tell_largest(base, carry, part, PROGRAMS, 2, AREA)
            elif i % RESCALE == 0:
                largest = hear_largest(base, i // RESCALE, PROGRAMS, _ROWS, 2, AREA, GATES)
                up, down = powers(gl.maximum(largest, peak), 0)
            grad = d + carry
            counted = grad
            scaled = d * up[None, :] + carry * up[None, :]
            if mask is not None:
                counted = gl.where(runs, grad, 0.0)
                scaled = gl.where(runs, scaled, 0.0)
            x = x_even if u == 0 else x_odd
            x[0].store((scaled * c_r).to(gl.float16))
            x[1].store((scaled * c_z).to(gl.float16))
            x[2].store((scaled * c_hn).to(gl.float16))
            wait_for_copies(STAGES - 2)
            total = mma_v2(w_r, x[0].load(RIGHT), zeros)
            total = mma_v2(w_z, x[1].load(RIGHT), total)
            total = mma_v2(w_n, x[2].load(RIGHT), total)
            send_chunks(total.to(gl.float16), area, to, 1 - u, AREA, chosen)

            # While parts are on their way.
            fetch_step(
                going, slot, gates, dstates, states, ahead, step, first_row, first_channel, channels, i + u + STAGES, T, end, H
            )
            ahead += step
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
            passed = grad * direct
    wait_for_round(base, (T + 1) // 2, 0, AREA, False)
    carry = gl.sum(read_halves(parts_at, 0, AREA).to(gl.float32), axis=0) * weighted + passed
    gl.store(dh0 + offset, carry.to(dh0.dtype.element_ty), mask=inside)
    close_exchange()
    # Sums go through shared memory, which the compiler has where copies of steps that are none might still arrive.
    wait_for_copies(0)
    store_sums(sums + gl.program_id(1) * H + c, gl.num_programs(1) * H, db_r, db_z, db_n, db_in, s < channels)


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
    want_weights: bool = False,
) -> ScanGradients:
    """Gradients of the scan's inputs and of both biases; those of the weights are left to a product over all rows."""
    if prepared.portable is not None:
        found = portable.backward(prepared.portable, gi, h0, states, gates, mask, reverse, dstates, dlast, want_adjoint)
        return found._replace(dbias=hidden_bias(found.dgi, found.dgh_n, found.dbias_input)) if want_weights else found
    if prepared.size > LARGEST_HALF:
        return backward_wide.backward(prepared, gi, h0, states, gates, mask, reverse, dstates, dlast, want_adjoint, want_weights)
    assert prepared.weight is not None
    steps, rows, _, hidden = gi.shape
    programs, blocks = prepared.weight.shape[2], hidden // prepared.size
    taken = rows_taken(rows, blocks, programs, gi.device, least=2)  # what is sent in one piece has values of two rows
    tiles = cdiv(rows, taken)
    dgi, dgh_n, dh0, adjoint = Gradients.like(gi, h0, want_adjoint)
    sums = room_for_sums(gi, tiles)
    largest = largest_magnitudes(dstates, dlast)
    ClusterCall(
        kernel=_backward,
        grid=(1, tiles, blocks),
        io=(h0, mask, aligned(states), packed(aligned(gates)), aligned(dstates), dlast, dgi, dgh_n, dh0, adjoint, sums),
        static=(largest, prepared.weight, prepared.h_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": prepared.size,
            "PROGRAMS": programs,
            "TAKEN": taken,
            "STAGES": STAGES,
            "RESCALE": RESCALE,
            "CLIPPED": prepared.clipped,
            "REVERSE": reverse,
        },
        warps=WARPS,
        cluster=programs,
        exchange=area_bytes(_area(programs, taken)),
    ).run()
    dbias, dbias_input = sums.sum(1).split(3)
    return ScanGradients(dgi, dh0, dgh_n, adjoint, dbias=dbias if want_weights else None, dbias_input=dbias_input)
