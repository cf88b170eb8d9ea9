"""Backward scan of a block-diagonal operand on Hopper.

From the last step of the scan to the first. A step waits for: gradient of its state times three coefficients, these to shared
memory, barrier, product with the transposed weights. Coefficients follow from saved gates and states alone, and are ready before:
each step reads what the next but one needs.
"""

from __future__ import annotations

from torch import Tensor

from ...triton.block_diagonal import backward as portable
from ...triton.block_diagonal.weights import packed
from ...triton.device import device_facts
from ...triton.exchange_plan import cdiv
from ...triton.family import KernelCall, ScanGradients, aligned
from ...triton.magnitude import largest_magnitudes
from ...triton.math import in_range, load_grid
from ...triton.weight_gradient import weight_gradient
from ..gluon import gl, jit, wait_for_copies
from ..gradients import coefficients, powers
from ..layouts import gate_layout, product_layout
from ..results import Gradients, room_for_sums, store_step, store_sums
from ..staging import operands
from . import REGISTERS, STAGES, rows_of_tile
from .folding import is_folded, load_sides, multiply, multiply_two, to_right
from .steps import fetch, pair_source, rings, saved_source, take

__all__ = ["backward", "prepare"]

#: Steps between two looks at the size of gradients; even.
_RESCALE = 16

prepare = portable.prepare


@jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums, largest_gradient, weight, h_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    RESCALE: gl.constexpr, CLIPPED: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on. Parameters, and the powers of two, as in the portable tier's kernel.

    CLIPPED: the carried state has a grid, so that saved gates may be marked. Steps go in pairs, each with shared memory of its
    own, as in the forward kernel. What is outside of a tensor is zero, and stays zero: it needs no other care than at stores.
    """
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(BLOCK), 2)
    SLOTS: gl.constexpr = STAGES // 2
    k = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    tile = weight + k * BLOCK * BLOCK
    w_r = load_sides(tile, BLOCK, ROWS)
    w_z = load_sides(tile + gate_stride, BLOCK, ROWS)
    w_n = load_sides(tile + 2 * gate_stride, BLOCK, ROWS)
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)

    s = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    peak = gl.load(largest_gradient + b, mask=b < B, other=0.0)
    c = k * SIZE + s
    row = B.to(gl.int64) * H
    sign: gl.constexpr = 1 if REVERSE else -1
    start = gl.to_tensor(0).to(gl.int64) if REVERSE else (T - 1).to(gl.int64)
    step = row * sign
    at = start * row
    inside = (s < SIZE)[:, None] & (b < B)[None, :]
    # Elements outside of a tensor are past its end at once: one comparison a step does for both.
    row_end = gl.where(b < B, T, 0)
    end = gl.where(inside, T, 0)
    offset = b[None, :] * H + c[:, None]
    dgi_p = dgi + at * 3 + (b[None, :] * (3 * H) + c[:, None])
    dgh_p = dgh_n + at + offset
    adjoint_p = None if adjoint is None else adjoint + at + offset
    initial = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)

    even = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, BLOCK, ROWS)
    odd = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, BLOCK, ROWS)
    saved_p, saved_end = saved_source(gates + at, first_row, k * SIZE, SIZE, T, B, H, BLOCK, ROWS)
    pair_p, pair_end = pair_source(dstates + at, states + (at + step), first_row, k * SIZE, SIZE, T, B, H, BLOCK, ROWS)
    for ahead in gl.static_range(STAGES):
        fetch(even if ahead % 2 == 0 else odd, ahead // 2, ahead, saved_p, saved_end, pair_p, pair_end)
        saved_p += step
        pair_p += step
    x_even = operands(BLOCK // 2 if is_folded(BLOCK, ROWS) else BLOCK)
    x_odd = operands(BLOCK // 2 if is_folded(BLOCK, ROWS) else BLOCK)
    db_r = gl.full([BLOCK, ROWS], 0.0, gl.float32, layout=GATES)
    db_z = db_r
    db_n = db_r
    db_in = db_r

    runs = None
    if mask is not None:
        mask_p = mask + start * B + b
        runs = (gl.load(mask_p, mask=b < B, other=0) != 0)[None, :]
        runs_1 = (gl.load(mask_p + sign * B, mask=1 < row_end, other=0) != 0)[None, :]
        runs_2 = (gl.load(mask_p + 2 * sign * B, mask=2 < row_end, other=0) != 0)[None, :]
    wait_for_copies(STAGES - 2)
    saved, d, h = take(even, 0, GATES)
    next_saved, next_d, next_h = take(odd, 0, GATES)
    fetch(even, 0, STAGES, saved_p, saved_end, pair_p, pair_end)
    saved_p += step
    pair_p += step
    h = gl.where(T == 1, initial, h)
    c_r, c_z, c_hn, c_n, direct = coefficients(saved, h, runs, CLIPPED)
    grad = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32) + d

    for first in range(0, T, RESCALE):
        up, down = powers(gl.maximum(gl.max(gl.abs(grad), axis=0), peak), 4)
        scaled = grad * up[None, :]
        for i in range(first, gl.minimum(first + RESCALE, T), 2):
            slot = (i >> 1) & (SLOTS - 1)
            next_slot = (slot + 1) & (SLOTS - 1)
            if mask is not None:
                runs_3 = (gl.load(mask_p + 3 * sign * B, mask=i + 3 < row_end, other=0) != 0)[None, :]
                mask_p += 2 * sign * B
                runs_4 = (gl.load(mask_p + 2 * sign * B, mask=i + 4 < row_end, other=0) != 0)[None, :]
            for u in gl.static_range(2):
                counted = grad
                if mask is not None:
                    counted = gl.where(runs, grad, 0.0)
                    scaled = gl.where(runs, scaled, 0.0)
                x = x_even if u == 0 else x_odd
                x[0].store(to_right((scaled * c_r).to(gl.float16)))
                x[1].store(to_right((scaled * c_z).to(gl.float16)))
                x[2].store(to_right((scaled * c_hn).to(gl.float16)))
                wait_for_copies(STAGES - 2)
                right_r = x[0].load(RIGHT)
                right_z = x[1].load(RIGHT)
                right_n = x[2].load(RIGHT)
                # All else, while the product is on its way.
                here = i + u < end
                da_r, da_z, dh_n, da_n = store_step(dgi_p, dgh_p, adjoint_p, counted, c_r, c_z, c_hn, c_n, here, H)
                if adjoint is not None:
                    adjoint_p += step
                dgi_p += step * 3
                dgh_p += step
                # The next step has been read: its slot is free for the one that takes its turn. That after it is read below, from
                # the other ring, for which the compiler asks no further barrier.
                fetch(
                    odd if u == 0 else even, slot if u == 0 else next_slot, i + u + 1 + STAGES,
                    saved_p, saved_end, pair_p, pair_end,
                )  # fmt: skip
                saved_p += step
                pair_p += step
                db_r += da_r
                db_z += da_z
                db_n += dh_n
                db_in += da_n
                total_rz = multiply_two(w_r, right_r, w_z, right_z, ROWS)
                total_n = multiply(w_n, right_n, ROWS)

                if h_grid is not None:
                    passes = in_range(h, h_inv, h_low, h_high)

                h = gl.where((i + u + 2 == row_end)[None, :], initial, next_h)
                rest = grad * direct + next_d
                if mask is not None:
                    runs = runs_1 if u == 0 else runs_2
                    comes = runs
                else:
                    # The second step of a last pair may be none.
                    comes = (i + 1 < row_end)[None, :] if u == 0 else None
                c_r, c_z, c_hn, c_n, direct = coefficients(next_saved, h, comes, CLIPPED)
                next_saved, next_d, next_h = take(even if u == 0 else odd, next_slot, GATES)
                total = total_rz + total_n
                if h_grid is not None:
                    total = gl.where(passes, total, 0.0)
                # Both at once: what the next step stores first does not wait for the unscaled gradient.
                scaled = total + rest * up[None, :]
                grad = total * down[None, :] + rest
            if mask is not None:
                runs_1 = runs_3
                runs_2 = runs_4
    # There is no step after the last, whose gradient would be added.
    gl.store(dh0 + offset, grad.to(dh0.dtype.element_ty), mask=inside)
    store_sums(sums + gl.program_id(1) * H + c, gl.num_programs(1) * H, db_r, db_z, db_n, db_in, s < SIZE)


def backward(
    prepared: portable.BackwardWeights,
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
    """Gradients of the sequence, of h0, of the weights and of both biases."""
    spec, weight, h_grid, size, _ = prepared
    if spec.exact:
        return portable.backward(prepared, gi, h0, states, gates, mask, reverse, dstates, dlast, want_adjoint, want_weights)
    steps, rows, _, hidden = gi.shape
    padded = weight.shape[-1]
    tile = rows_of_tile(hidden // size, rows, device_facts(gi.device).processors)
    tiles = cdiv(rows, tile)
    dgi, dgh_n, dh0, adjoint = Gradients.like(gi, h0, want_adjoint)
    sums = room_for_sums(gi, tiles)
    largest = largest_magnitudes(dstates, dlast)
    KernelCall(
        kernel=_backward,
        grid=(hidden // size, tiles, 1),
        io=(h0, mask, aligned(states), packed(aligned(gates)), aligned(dstates), dlast, dgi, dgh_n, dh0, adjoint, sums),
        static=(largest, weight, h_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": size,
            "BLOCK": padded,
            "ROWS": tile,
            "STAGES": STAGES,
            "RESCALE": _RESCALE,
            "CLIPPED": spec.grids.state is not None,
            "REVERSE": reverse,
        },
        warps=padded // 16,
        registers=REGISTERS,
    ).run()
    dbias, dbias_input = sums.sum(1).split(3)
    if not want_weights:
        return ScanGradients(dgi, dh0, adjoint=adjoint, dbias_input=dbias_input)
    dfirst = weight_gradient(spec, dgi, dgh_n, h0, states, reverse)
    return ScanGradients(dgi, dh0, adjoint=adjoint, dfirst=dfirst, dbias=dbias, dbias_input=dbias_input)
