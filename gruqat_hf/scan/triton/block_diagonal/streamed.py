"""Scans of a block-diagonal operand of any block size: weights pass through one program anew at every step.

The state goes from step to step through global memory: a program's barrier makes its stores visible to all of its own threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import grid_size
from ..family import KernelCall
from ..math import codes, count, gru_gates, gru_gradients, in_range, load_grid, pack_halves, unpack_halves
from .weights import BlockWeights, packed

#: Channels of a tile, and rows of the batch.
_TILE, _ROWS = 64, 16


@triton.jit
def _product(weight, x, o, first, width, b, rows_in, h_inv, h_low, h_high,
             H: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
             INTEGER: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows ``o`` of one gate's ``weight`` times inputs ``first`` to ``first + width`` of ``x``, ``[TILE, ROWS]`` fp32.

    INTEGER: of codes; each tile's sum is exact in fp32, and tiles are added as integers.
    """
    total = tl.zeros((TILE, ROWS), tl.int32 if INTEGER else tl.float32)
    for start in tl.range(0, width, TILE, num_stages=1):
        i = start + tl.arange(0, TILE)
        own = i < width
        w = tl.load(weight + o[:, None] * PADDED + (first + i)[None, :], mask=own[None, :], other=0.0)
        v = tl.load(x + b[None, :] * H + (first + i)[:, None], mask=own[:, None] & rows_in[None, :], other=0.0)
        if INTEGER:
            total += tl.dot(w, codes(v, h_inv, h_low, h_high).to(w.dtype)).to(tl.int32)
        else:
            total = tl.dot(w, v.to(w.dtype), total, input_precision=PRECISION)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, carried, weight, scale, bias, h_grid, state_grid, T, B,
    H: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    STATE_N: tl.constexpr, REVERSE: tl.constexpr, PORTABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on. ``carried`` ``[2, B, H]`` fp32: the states before and after a step."""
    k = tl.program_id(0)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows_in = b < B
    INTEGER: tl.constexpr = scale is not None
    WIDTH: tl.constexpr = SIZE // GROUPS
    w_r = weight + k * PADDED * PADDED
    w_z = w_r + (H // SIZE) * PADDED * PADDED
    w_n = w_z + (H // SIZE) * PADDED * PADDED
    h_inv, h_low, h_high = 1.0, 0.0, 0.0
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    row = tl.cast(B, tl.int64) * H
    for first in tl.range(0, SIZE, TILE, num_stages=1):
        o = first + tl.arange(0, TILE)
        inside = (o < SIZE)[:, None] & rows_in[None, :]
        offset = b[None, :] * H + (k * SIZE + o)[:, None]
        tl.store(carried + offset, tl.load(h0 + offset, mask=inside).to(tl.float32), mask=inside)
    for t in tl.range(0, count(T), num_stages=1):
        tl.debug_barrier()
        position = tl.cast(t, tl.int64)
        if REVERSE:
            position = T - 1 - position
        before = carried + (t % 2) * row
        after = carried + (1 - t % 2) * row
        x = before + k * SIZE
        for first in tl.range(0, SIZE, TILE, num_stages=1):
            o = first + tl.arange(0, TILE)
            c = k * SIZE + o
            own = (o < SIZE)[:, None]
            gh_r = tl.zeros((TILE, ROWS), tl.float32)
            gh_z = gh_r
            gh_n = gh_r
            for g in tl.range(0, GROUPS, num_stages=1):
                p_r = _product(w_r, x, o, g * WIDTH, WIDTH, b, rows_in, h_inv, h_low, h_high,
                               H, PADDED, TILE, ROWS, INTEGER, PRECISION)  # fmt: skip
                p_z = _product(w_z, x, o, g * WIDTH, WIDTH, b, rows_in, h_inv, h_low, h_high,
                               H, PADDED, TILE, ROWS, INTEGER, PRECISION)  # fmt: skip
                p_n = _product(w_n, x, o, g * WIDTH, WIDTH, b, rows_in, h_inv, h_low, h_high,
                               H, PADDED, TILE, ROWS, INTEGER, PRECISION)  # fmt: skip
                if INTEGER:
                    scale_p = scale + g * 3 * H + c[:, None]
                    p_r = p_r * tl.load(scale_p, mask=own, other=0.0)
                    p_z = p_z * tl.load(scale_p + H, mask=own, other=0.0)
                    p_n = p_n * tl.load(scale_p + 2 * H, mask=own, other=0.0)
                gh_r += p_r
                gh_z += p_z
                gh_n += p_n
            inside = own & rows_in[None, :]
            offset = b[None, :] * H + c[:, None]
            h = tl.load(before + offset, mask=inside, other=0.0)
            gi_p = gi + position * row * 3 + b[None, :] * (3 * H) + c[:, None]
            r, z, n, hn, new = gru_gates(
                tl.load(gi_p, mask=inside, other=0.0).to(tl.float32),
                tl.load(gi_p + H, mask=inside, other=0.0).to(tl.float32),
                tl.load(gi_p + 2 * H, mask=inside, other=0.0).to(tl.float32),
                gh_r + tl.load(bias + c[:, None], mask=own, other=0.0),
                gh_z + tl.load(bias + H + c[:, None], mask=own, other=0.0),
                gh_n + tl.load(bias + 2 * H + c[:, None], mask=own, other=0.0),
                h,
                PORTABLE,
            )
            if state_grid is not None:
                state_scale, state_inv, state_low, state_high = load_grid(state_grid, tl.minimum(c, H - 1)[:, None], STATE_N)
                z = tl.where(in_range(new, state_inv, state_low, state_high), z, -1.0)
                new = codes(new, state_inv, state_low, state_high) * state_scale
            if mask is not None:
                real = tl.load(mask + position * B + b[None, :], mask=rows_in[None, :], other=0)
                new = tl.where(real != 0, new, h)
            tl.store(after + offset, new, mask=inside)
            tl.store(states + position * row + offset, new, mask=inside)
            if gates is not None:
                if gates.dtype.element_ty == tl.int64:
                    tl.store(gates + position * row + offset, pack_halves(r, z, n, hn), mask=inside)
                else:
                    gates_p = gates + position * row * 4 + b[None, :] * (4 * H) + c[:, None]
                    tl.store(gates_p, r, mask=inside)
                    tl.store(gates_p + H, z, mask=inside)
                    tl.store(gates_p + 2 * H, n, mask=inside)
                    tl.store(gates_p + 3 * H, hn, mask=inside)


def forward_call(
    weights: BlockWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> KernelCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    carried = gi.new_empty((2, rows, hidden), dtype=torch.float32)
    return KernelCall(
        kernel=_forward,
        grid=(weights.blocks, triton.cdiv(rows, _ROWS), 1),
        io=(gi, h0, mask, states, packed(gates), carried),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "PADDED": weights.padded,
            "TILE": min(_TILE, weights.padded),
            "ROWS": _ROWS,
            "GROUPS": 1 if weights.scale is None else weights.scale.shape[0],
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
            "PRECISION": weights.precision,
        },
        warps=4,
        portable=weights.quantized,
    )


@triton.jit(do_not_specialize=["T", "B"])
def _backward(
    h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, direct, weight, h_grid, T, B,
    H: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (k, j), from the last step of the scan to the first. ``weight`` is transposed, ``[3, nblocks, in, out]``.

    ``dh0`` carries the state's gradient from step to step, ``direct`` ``[B, H]`` its part that passes by the product.
    """
    k = tl.program_id(0)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows_in = b < B
    w_r = weight + k * PADDED * PADDED
    w_z = w_r + (H // SIZE) * PADDED * PADDED
    w_n = w_z + (H // SIZE) * PADDED * PADDED
    row = tl.cast(B, tl.int64) * H
    for first in tl.range(0, SIZE, TILE, num_stages=1):
        o = first + tl.arange(0, TILE)
        inside = (o < SIZE)[:, None] & rows_in[None, :]
        offset = b[None, :] * H + (k * SIZE + o)[:, None]
        tl.store(dh0 + offset, tl.load(dlast + offset, mask=inside).to(tl.float32), mask=inside)
    tl.debug_barrier()
    for i in tl.range(0, count(T), num_stages=1):
        s = T - 1 - i
        position = tl.cast(s, tl.int64)
        before = position - 1
        if REVERSE:
            position = T - 1 - position
            before = position + 1
        for first in tl.range(0, SIZE, TILE, num_stages=1):
            o = first + tl.arange(0, TILE)
            inside = (o < SIZE)[:, None] & rows_in[None, :]
            offset = b[None, :] * H + (k * SIZE + o)[:, None]
            h = tl.load(h0 + offset, mask=inside & (s == 0), other=0.0).to(tl.float32)
            h += tl.load(states + before * row + offset, mask=inside & (s > 0), other=0.0).to(tl.float32)
            if gates.dtype.element_ty == tl.int64:
                r, z, n, hn = unpack_halves(tl.load(gates + position * row + offset, mask=inside, other=0))
            else:
                gates_p = gates + position * row * 4 + b[None, :] * (4 * H) + (k * SIZE + o)[:, None]
                r = tl.load(gates_p, mask=inside, other=0.0)
                z = tl.load(gates_p + H, mask=inside, other=0.0)
                n = tl.load(gates_p + 2 * H, mask=inside, other=0.0)
                hn = tl.load(gates_p + 3 * H, mask=inside, other=0.0)
            grad = tl.load(dh0 + offset, mask=inside, other=0.0)
            grad += tl.load(dstates + position * row + offset, mask=inside, other=0.0).to(tl.float32)
            runs = inside
            if mask is not None:
                runs = inside & (tl.load(mask + position * B + b[None, :], mask=rows_in[None, :], other=0) != 0)
            if adjoint is not None:
                tl.store(adjoint + position * row + offset, tl.where(runs, grad, 0.0), mask=inside)
            passed = tl.where(runs, 0.0, grad)
            grad = tl.where(runs & (z >= 0.0), grad, 0.0)
            da_r, da_z, da_n, dh_n, dh = gru_gradients(grad, r, z, n, hn, h)
            dgi_p = dgi + position * row * 3 + b[None, :] * (3 * H) + (k * SIZE + o)[:, None]
            tl.store(dgi_p, da_r, mask=inside)
            tl.store(dgi_p + H, da_z, mask=inside)
            tl.store(dgi_p + 2 * H, da_n, mask=inside)
            tl.store(dgh_n + position * row + offset, dh_n, mask=inside)
            tl.store(direct + offset, dh + passed, mask=inside)
        tl.debug_barrier()
        for first in tl.range(0, SIZE, TILE, num_stages=1):
            o = first + tl.arange(0, TILE)
            inside = (o < SIZE)[:, None] & rows_in[None, :]
            offset = b[None, :] * H + (k * SIZE + o)[:, None]
            x = dgi + position * row * 3 + k * SIZE
            total = _product(w_r, x, o, 0, SIZE, b, rows_in, 1.0, 0.0, 0.0, 3 * H, PADDED, TILE, ROWS, False, PRECISION)
            total += _product(w_z, x + H, o, 0, SIZE, b, rows_in, 1.0, 0.0, 0.0, 3 * H, PADDED, TILE, ROWS, False, PRECISION)
            x = dgh_n + position * row + k * SIZE
            total += _product(w_n, x, o, 0, SIZE, b, rows_in, 1.0, 0.0, 0.0, H, PADDED, TILE, ROWS, False, PRECISION)
            if h_grid is not None:
                _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
                h = tl.load(h0 + offset, mask=inside & (s == 0), other=0.0).to(tl.float32)
                h += tl.load(states + before * row + offset, mask=inside & (s > 0), other=0.0).to(tl.float32)
                total = tl.where(in_range(h, h_inv, h_low, h_high), total, 0.0)
            tl.store(dh0 + offset, tl.load(direct + offset, mask=inside, other=0.0) + total, mask=inside)
        tl.debug_barrier()


def backward(
    weight: Tensor, size: int, h_grid: Tensor | None, precision: str, h0: Tensor, states: Tensor, gates: Tensor,
    mask: Tensor | None, reverse: bool, dstates: Tensor, dlast: Tensor, dgi: Tensor, dgh_n: Tensor, adjoint: Tensor | None,
) -> Tensor:  # fmt: skip
    """Fill ``dgi``, ``dgh_n`` and ``adjoint``; gives the gradient of h0, ``[B, H]`` fp32.

    Args:
        weight: float weights transposed and padded, ``[3, nblocks, PADDED, PADDED]``.
        size: of a block.
    """
    steps, rows, hidden = states.shape
    dh0 = torch.empty_like(h0, dtype=torch.float32)
    KernelCall(
        kernel=_backward,
        grid=(hidden // size, triton.cdiv(rows, _ROWS), 1),
        io=(h0, mask, states, packed(gates), dstates, dlast, dgi, dgh_n, dh0, adjoint, torch.empty_like(dh0)),
        static=(weight, h_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": size,
            "PADDED": weight.shape[-1],
            "TILE": min(_TILE, weight.shape[-1]),
            "ROWS": _ROWS,
            "REVERSE": reverse,
            "PRECISION": precision,
        },
    ).run()
    return dh0
