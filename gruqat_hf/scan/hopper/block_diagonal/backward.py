"""Backward scan of a block-diagonal operand on Hopper.

From the last step of the scan to the first. A step waits for: gradient of its state times three coefficients, these to shared
memory, barrier, product with the transposed weights. Coefficients follow from saved gates and states alone, and are ready before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.block_diagonal import backward as portable
from ...triton.block_diagonal.weights import packed
from ...triton.device import device_facts
from ...triton.exchange_plan import cdiv
from ...triton.family import KernelCall, ScanGradients, aligned
from ...triton.magnitude import largest_magnitudes
from ...triton.math import in_range, load_grid
from ...triton.weight_gradient import weight_gradient
from ..gluon import gl, jit, mma_v2, wait_for_copies
from ..gradients import coefficients, powers
from ..layouts import gate_layout, load_weights, product_layout, to_columns, to_gates
from ..staging import fetch_step, operands, read, rings
from . import STAGES, rows_of_tile

__all__ = ["backward", "prepare"]

#: Steps between two looks at the size of gradients; even.
_RESCALE = 16

prepare = portable.prepare


@jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums, largest_gradient, weight, h_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    RESCALE: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on. Parameters, and the powers of two, as in the portable tier's kernel.

    Steps go in pairs, each with shared memory of its own, as in the forward kernel.
    """
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    PRODUCT: gl.constexpr = product_layout(BLOCK)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    SLOTS: gl.constexpr = STAGES // 2
    k = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    tile = weight + k * BLOCK * BLOCK
    w_r = load_weights(tile, BLOCK)
    w_z = load_weights(tile + gate_stride, BLOCK)
    w_n = load_weights(tile + 2 * gate_stride, BLOCK)
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
    inside = (s < SIZE)[:, None] & (b < B)[None, :]
    offset = b[None, :] * H + c[:, None]
    wide = b[None, :] * (3 * H) + c[:, None]
    initial = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    carry = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32)
    at = start * row
    if mask is not None:
        mask_p = mask + start * B + b

    even = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, BLOCK, ROWS)
    odd = rings(gates.dtype.element_ty, states.dtype.element_ty, SLOTS, BLOCK, ROWS)
    ahead = at
    for i in gl.static_range(STAGES):
        fetch_step(
            even if i % 2 == 0 else odd, i // 2, gates, dstates, states, ahead, step, first_row, k * SIZE, SIZE, i, T, B, H
        )
        ahead += step
    x_even = operands(BLOCK)
    x_odd = operands(BLOCK)
    zeros = gl.full([BLOCK, 8], 0.0, gl.float32, layout=PRODUCT)
    db_r = gl.full([BLOCK, ROWS], 0.0, gl.float32, layout=GATES)
    db_z = db_r
    db_n = db_r
    db_in = db_r
    up = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(0, GATES))
    down = up

    wait_for_copies(STAGES - 1)
    h = read(even[2], 0, GATES).to(gl.float32)
    h = gl.where(T == 1, initial, h)
    runs = inside
    if mask is not None:
        runs = inside & (gl.load(mask_p, mask=b < B, other=0) != 0)[None, :]
    c_r, c_z, c_hn, c_n, direct = coefficients(read(even[0], 0, GATES), h, runs)
    d = read(even[1], 0, GATES).to(gl.float32)

    for i in range(0, T, 2):
        if i % RESCALE == 0:
            up, down = powers(gl.maximum(gl.max(gl.abs(carry), axis=0), peak), 4)
        for u in gl.static_range(2):
            grad = d + carry
            scaled = d * up[None, :] + carry * up[None, :]
            x = x_even if u == 0 else x_odd
            x[0].store(to_columns((scaled * c_r).to(gl.float16)))
            x[1].store(to_columns((scaled * c_z).to(gl.float16)))
            x[2].store(to_columns((scaled * c_hn).to(gl.float16)))
            wait_for_copies(STAGES - 2)
            right_r = x[0].load(RIGHT)
            right_z = x[1].load(RIGHT)
            right_n = x[2].load(RIGHT)
            slot = (i // 2) % SLOTS
            going = even if u == 0 else odd
            fetch_step(going, slot, gates, dstates, states, ahead, step, first_row, k * SIZE, SIZE, i + u + STAGES, T, B, H)
            ahead += step
            total = to_gates(mma_v2(w_r, right_r, zeros), ROWS)
            total_z = to_gates(mma_v2(w_z, right_z, zeros), ROWS)
            total_n = to_gates(mma_v2(w_n, right_n, zeros), ROWS)

            here = inside & (i + u < T)
            if adjoint is not None:
                gl.store(adjoint + at + offset, gl.where(runs, grad, 0.0), mask=here)
            da_r = grad * c_r
            da_z = grad * c_z
            dh_n = grad * c_hn
            dgi_p = dgi + at * 3 + wide
            gl.store(dgi_p, da_r.to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + H, da_z.to(dgi.dtype.element_ty), mask=here)
            da_n = grad * c_n
            gl.store(dgi_p + 2 * H, da_n.to(dgi.dtype.element_ty), mask=here)
            gl.store(dgh_n + at + offset, dh_n.to(dgi.dtype.element_ty), mask=here)
            at += step
            db_r += da_r
            db_z += da_z
            db_n += dh_n
            db_in += da_n
            weighted = gl.full([BLOCK, ROWS], 1.0, gl.float32, layout=GATES) * down[None, :]
            if h_grid is not None:
                weighted = gl.where(in_range(h, h_inv, h_low, h_high), weighted, 0.0)
            passed = grad * direct

            # The next step's coefficients, while the product is on its way.
            coming = odd if u == 0 else even
            next_slot = slot if u == 0 else (i // 2 + 1) % SLOTS
            h = read(coming[2], next_slot, GATES).to(gl.float32)
            h = gl.where(i + u + 2 == T, initial, h)
            runs = inside & (i + u + 1 < T)
            if mask is not None:
                mask_p += sign * B
                runs = runs & (gl.load(mask_p, mask=(b < B) & (i + u + 1 < T), other=0) != 0)[None, :]
            c_r, c_z, c_hn, c_n, direct = coefficients(read(coming[0], next_slot, GATES), h, runs)
            d = read(coming[1], next_slot, GATES).to(gl.float32)
            carry = (total + (total_z + total_n)) * weighted + passed
    gl.store(dh0 + offset, carry.to(dh0.dtype.element_ty), mask=inside)
    sums_p = sums + gl.program_id(1) * H + c
    gate = gl.num_programs(1) * H
    sum_r = gl.sum(db_r, axis=1)
    sum_z = gl.sum(db_z, axis=1)
    gl.store(sums_p, sum_r, mask=s < SIZE)
    gl.store(sums_p + gate, sum_z, mask=s < SIZE)
    gl.store(sums_p + 2 * gate, gl.sum(db_n, axis=1), mask=s < SIZE)
    gl.store(sums_p + 3 * gate, sum_r, mask=s < SIZE)
    gl.store(sums_p + 4 * gate, sum_z, mask=s < SIZE)
    gl.store(sums_p + 5 * gate, gl.sum(db_in, axis=1), mask=s < SIZE)


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
    dgi = torch.empty_like(gi)
    dgh_n = gi.new_empty((steps, rows, hidden))
    dh0 = torch.empty_like(h0)
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    sums = gi.new_empty((6, tiles, hidden), dtype=torch.float32)
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
            "REVERSE": reverse,
        },
        warps=padded // 16,
    ).run()
    dbias, dbias_input = sums.sum(1).split(3)
    if not want_weights:
        return ScanGradients(dgi, dh0, adjoint=adjoint, dbias_input=dbias_input)
    dfirst = weight_gradient(spec, dgi, dgh_n, h0, states, reverse)
    return ScanGradients(dgi, dh0, adjoint=adjoint, dfirst=dfirst, dbias=dbias, dbias_input=dbias_input)
