"""Backward scan of a block-diagonal operand."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ScanSpec, pack_grid
from .. import streamed
from ..device import device_facts
from ..exchange_plan import cdiv
from ..family import KernelCall, ScanGradients
from ..magnitude import largest_magnitudes
from ..math import count, gru_gradients, in_range, load_grid, round_to_tf32, unpack_gates
from ..memory import put
from ..precision import fp32_precision
from ..weight_gradient import weight_gradient
from . import ROWS, backward_stages, is_resident, padded_size
from .forward import multiply
from .weights import packed

#: Steps between two looks at the size of gradients.
_RESCALE = 16


@triton.jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums, largest_gradient, weight, h_grid, T, B,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr,
    STAGES: tl.constexpr, RESCALE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on, from the last step of the scan to the first.

    ``weight`` is transposed, ``[3, nblocks, in, out]``. ``sums`` ``[6, row tiles, H]`` takes the program's sums of the gradients
    of the hidden and of the input product.

    With weights in fp16, gradients are multiplied by a power of two for the product, one for each row, that brings the larger of
    the carry and of all the row's ``dstates`` (``largest_gradient`` ``[B]``) near 2**4. It is taken anew every RESCALE steps; in
    between gradients may grow 2**11 times.
    """
    k = tl.program_id(0)
    s = tl.arange(0, BLOCK)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = k * SIZE + s
    tile = weight + (k * BLOCK + s[:, None]) * BLOCK + s[None, :]
    gate_stride = (H // SIZE) * BLOCK * BLOCK
    w_r = tl.load(tile)
    w_z = tl.load(tile + gate_stride)
    w_n = tl.load(tile + 2 * gate_stride)
    PACKED: tl.constexpr = gates.dtype.element_ty == tl.int64
    HALF: tl.constexpr = weight.dtype.element_ty == tl.float16
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)

    row = tl.cast(B, tl.int64) * H
    start = tl.cast(T - 1, tl.int64)
    sign = -1
    if REVERSE:
        start = tl.cast(0, tl.int64)
        sign = 1
    step = row * sign
    inside = (s < SIZE)[:, None] & (b < B)[None, :]
    offset = b[None, :] * H + c[:, None]
    initial = tl.load(h0 + offset, mask=inside, other=0.0).to(tl.float32)
    carry = tl.load(dlast + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.zeros((1, ROWS), tl.float32)
    down = up
    if HALF:
        peak = tl.load(largest_gradient + b, mask=b < B, other=0.0)
    wide = b[None, :] * H * 3 + c[:, None]
    at = start * row
    db_r = tl.zeros((BLOCK, ROWS), tl.float32)
    db_z = db_r
    db_n = db_r
    db_in = db_r
    for i in tl.range(0, count(T), num_stages=STAGES):
        if PACKED:
            r, z, n, hn = unpack_gates(tl.load(gates + at + offset, mask=inside, other=0))
        else:
            gates_p = gates + at * 4 + b[None, :] * (4 * H) + c[:, None]
            r = tl.load(gates_p, mask=inside, other=0.0)
            z = tl.load(gates_p + H, mask=inside, other=0.0)
            n = tl.load(gates_p + 2 * H, mask=inside, other=0.0)
            hn = tl.load(gates_p + 3 * H, mask=inside, other=0.0)
        grad = tl.load(dstates + at + offset, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(states + (at + step) + offset, mask=inside & (i < T - 1), other=0.0).to(tl.float32)
        h = tl.where(i == T - 1, initial, h)
        # What multiplies the gradient: none of it waits for the carry.
        kept = tl.where(z >= 0.0, 1.0, 0.0)
        runs = inside
        if mask is not None:
            runs = inside & (tl.load(mask + (start + i * sign) * B + b[None, :], mask=(b < B)[None, :], other=0) != 0)
        da_r, da_z, da_n, dh_n, dh = gru_gradients(kept, r, z, n, hn, h)
        if mask is not None:
            dh = tl.where(runs, dh, 1.0)
        clip = tl.full((BLOCK, ROWS), 1.0, tl.float32)
        if h_grid is not None:
            clip = tl.where(in_range(h, h_inv, h_low, h_high), 1.0, 0.0)

        if HALF:
            if i % RESCALE == 0:
                largest = tl.maximum(tl.max(tl.abs(carry), 0), peak)[None, :]
                exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 30)
                up = ((258 - exponent) << 23).to(tl.float32, bitcast=True)
                down = ((exponent - 4) << 23).to(tl.float32, bitcast=True)
        grad += carry
        counted = grad
        if mask is not None:
            counted = tl.where(runs, grad, 0.0)
        if adjoint is not None:
            put(adjoint + at + offset, counted, inside)
        da_r = counted * da_r
        da_z = counted * da_z
        dh_n = counted * dh_n
        if HALF:
            total = multiply(w_r, (da_r * up).to(tl.float16), COPIES, PRECISION)
            total += multiply(w_z, (da_z * up).to(tl.float16), COPIES, PRECISION)
            total += multiply(w_n, (dh_n * up).to(tl.float16), COPIES, PRECISION)
            total = total * down
        else:
            total = multiply(w_r, da_r, COPIES, PRECISION)
            total += multiply(w_z, da_z, COPIES, PRECISION)
            total += multiply(w_n, dh_n, COPIES, PRECISION)
        carry = grad * dh + clip * total
        dgi_p = dgi + at * 3 + wide
        put(dgi_p, da_r.to(dgi.dtype.element_ty), inside)
        put(dgi_p + H, da_z.to(dgi.dtype.element_ty), inside)
        da_n = counted * da_n
        put(dgi_p + 2 * H, da_n.to(dgi.dtype.element_ty), inside)
        put(dgh_n + at + offset, dh_n.to(dgi.dtype.element_ty), inside)
        db_r += da_r
        db_z += da_z
        db_n += dh_n
        db_in += da_n
        at += step
    tl.store(dh0 + offset, carry, mask=inside)
    own = s < SIZE
    sums_p = sums + tl.program_id(1) * H + c
    gate = tl.num_programs(1) * H
    sum_r = tl.sum(db_r, 1)
    sum_z = tl.sum(db_z, 1)
    tl.store(sums_p, sum_r, mask=own)
    tl.store(sums_p + gate, sum_z, mask=own)
    tl.store(sums_p + 2 * gate, tl.sum(db_n, 1), mask=own)
    tl.store(sums_p + 3 * gate, sum_r, mask=own)
    tl.store(sums_p + 4 * gate, sum_z, mask=own)
    tl.store(sums_p + 5 * gate, tl.sum(db_in, 1), mask=own)


class BackwardWeights(NamedTuple):
    """Attributes:
    spec: what the scan computed.
    weight: float weights transposed and padded, ``[3, nblocks, BLOCK, BLOCK]``; fp16 unless fp32 accuracy is wanted. A factor
        in fp32 where blocks do not fit a program.
    h_grid: packed, or None.
    size: of a block.
    precision: of fp32 dots.
    """

    spec: ScanSpec
    weight: Tensor | streamed.StreamedFactor
    h_grid: Tensor | None
    size: int
    precision: str


def prepare(spec: ScanSpec) -> BackwardWeights:
    """Once for each set of weights."""
    (factor,) = spec.operand.factors.values()
    weight = factor.dequantize().transpose(-1, -2)
    size = weight.shape[-1]
    h_grid, precision = pack_grid(spec.grids.h), fp32_precision(spec)
    if spec.grids.gates is not None or not is_resident(size, spec.exact, device_facts(weight.device)):
        weight = weight.float()
        if precision == "tf32" and not spec.exact:
            weight = round_to_tf32(weight)
        return BackwardWeights(spec, streamed.StreamedFactor.of(weight), h_grid, size, precision)
    padded = padded_size(size)
    weight = streamed.pad_blocks(weight, padded, padded, torch.float32 if spec.exact else torch.float16)
    return BackwardWeights(spec, weight, h_grid, size, precision)


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
    """Gradients of the sequence, of h0, of the weights and of both biases."""
    spec, weight, h_grid, size, precision = prepared
    steps, rows, _, hidden = gi.shape
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    if isinstance(weight, streamed.StreamedFactor):
        # Programs read one another's gate gradients, which stay in fp32 for that.
        dgi = torch.empty_like(gi, dtype=torch.float32)
        dgh_n = dgi.new_empty((steps, rows, hidden))
        dh0 = streamed.backward(
            None, weight, h_grid, precision, h0, states, gates, None, mask, reverse, dstates, dlast, dgi, dgh_n, adjoint, None,
            spec.grids.gates is not None,
        )  # fmt: skip
        dgi, dgh_n, dh0, sums = dgi.to(gi.dtype), dgh_n.to(gi.dtype), dh0.to(h0.dtype), None
    else:
        dgi = torch.empty_like(gi)
        dgh_n = gi.new_empty((steps, rows, hidden))
        dh0 = torch.empty_like(h0)
        tiles = cdiv(rows, ROWS)
        sums = gi.new_empty((6, tiles, hidden), dtype=torch.float32)
        largest = largest_magnitudes(dstates, dlast)
        KernelCall(
            kernel=_backward,
            grid=(hidden // size, tiles, 1),
            io=(h0, mask, states, packed(gates), dstates, dlast, dgi, dgh_n, dh0, adjoint, sums),
            static=(largest, weight, h_grid, steps, rows),
            constants={
                "H": hidden,
                "SIZE": size,
                "BLOCK": weight.shape[-1],
                "ROWS": ROWS,
                "COPIES": 2,
                "STAGES": backward_stages(size, spec.exact, device_facts(gi.device)),
                "RESCALE": _RESCALE,
                "REVERSE": reverse,
                "PRECISION": precision,
            },
            warps=4,
        ).run()
    dfirst = dbias = dbias_input = None
    if sums is not None:
        dbias, dbias_input = sums.sum(1).split(3)
    if want_weights:
        dfirst = weight_gradient(spec, dgi, dgh_n, h0, states, reverse)
        if sums is None:
            dbias = torch.cat([dgi[:, :, :2].sum((0, 1), dtype=torch.float32), dgh_n.sum((0, 1), dtype=torch.float32)[None]])
    return ScanGradients(dgi, dh0, adjoint=adjoint, dfirst=dfirst, dbias=dbias if want_weights else None, dbias_input=dbias_input)
