"""Forward scan of a block-diagonal operand whose blocks fit one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import grid_size
from .. import streamed
from ..device import device_facts
from ..exchange_plan import cdiv
from ..family import KernelCall
from ..math import codes, count, gru_gates, load_grid, on_grid, pack_gates
from ..memory import put
from ..streamed import StreamedWeights
from . import ROWS, tiling
from .weights import BlockWeights, packed, prepare

__all__ = ["call", "forward", "prepare"]

#: With more groups of weights than these a step loops over them: unrolled, many would take minutes to compile.
_MOST_UNROLLED = 2
_UNROLLED_GROUPS = tl.constexpr(_MOST_UNROLLED)


@triton.jit
def multiply(weight, x, COPIES: tl.constexpr, PRECISION: tl.constexpr):
    """``weight`` ``[M, K]`` times ``x`` ``[K, N]`` in fp32.

    COPIES 2: with each column of ``x`` twice, as 4 rows of the batch would leave half of a matrix unit's 8 columns empty, and
    more rows would leave processors idle.
    """
    M: tl.constexpr = weight.shape[0]
    K: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if COPIES == 2:
        x = tl.reshape(tl.join(x, x), (K, 2 * N))
    product = tl.dot(weight, x, input_precision=PRECISION)
    if COPIES == 2:
        product, _ = tl.split(tl.reshape(product, (M, N, 2)))
    return product


@triton.jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr, GROUPS: tl.constexpr,
    STATE_N: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, EVEN_STEPS: tl.constexpr, FULL: tl.constexpr,
    REVERSE: tl.constexpr, PORTABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on. Tiles are ``[channels, rows]``: weights come first in the dots.

    ``gates`` are ``[T, B, H]`` int64, four fp16 values each, or ``[T, B, 4, H]`` fp32.
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
    own = s < SIZE
    b_r = tl.load(bias + c, mask=own, other=0.0)[:, None]
    b_z = tl.load(bias + H + c, mask=own, other=0.0)[:, None]
    b_n = tl.load(bias + 2 * H + c, mask=own, other=0.0)[:, None]
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        carried = load_grid(state_grid, tl.minimum(c, H - 1)[:, None], STATE_N)
    if scale is not None:
        s_r = tl.load(scale + c, mask=own, other=0.0)[:, None]
        s_z = tl.load(scale + H + c, mask=own, other=0.0)[:, None]
        s_n = tl.load(scale + 2 * H + c, mask=own, other=0.0)[:, None]

    row = tl.cast(B, tl.int64) * H
    start = tl.cast(0, tl.int64)
    sign = 1
    if REVERSE:
        start = tl.cast(T - 1, tl.int64)
        sign = -1
    step = row * sign
    inside = own[:, None] & (b < B)[None, :]
    offset = b[None, :] * H + c[:, None]
    h = tl.load(h0 + offset, mask=inside, other=0.0).to(tl.float32)
    gi_p = gi + start * row * 3 + b[None, :] * (3 * H) + c[:, None]
    out_p = states + start * row + offset
    if gates is not None:
        PACKED: tl.constexpr = gates.dtype.element_ty == tl.int64
        planes: tl.constexpr = 1 if PACKED else 4
        gates_p = gates + start * row * planes + b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b
    for t in tl.range(0, count(T), UNROLL, num_stages=STAGES):
        loaded = ()
        for u in tl.static_range(UNROLL):
            p = gi_p + u * step * 3
            if FULL and EVEN_STEPS:
                loaded = loaded + (tl.load(p), tl.load(p + H), tl.load(p + 2 * H))
            else:
                here = inside & (t + u < T)
                loaded = loaded + (tl.load(p, mask=here), tl.load(p + H, mask=here), tl.load(p + 2 * H, mask=here))
        for u in tl.static_range(UNROLL):
            if scale is not None and GROUPS > _UNROLLED_GROUPS:
                code = codes(h, h_inv, h_low, h_high)
                gh_r = tl.zeros((BLOCK, ROWS), tl.float32)
                gh_z = gh_r
                gh_n = gh_r
                for g in tl.range(0, GROUPS, num_stages=1):
                    x = tl.where((s // (SIZE // GROUPS) == g)[:, None], code, 0.0).to(tl.float16)
                    scale_p = scale + g * 3 * H + c
                    gh_r += multiply(w_r, x, COPIES, PRECISION) * tl.load(scale_p, mask=own, other=0.0)[:, None]
                    gh_z += multiply(w_z, x, COPIES, PRECISION) * tl.load(scale_p + H, mask=own, other=0.0)[:, None]
                    gh_n += multiply(w_n, x, COPIES, PRECISION) * tl.load(scale_p + 2 * H, mask=own, other=0.0)[:, None]
            elif scale is not None:
                code = codes(h, h_inv, h_low, h_high)
                x = code.to(tl.float16)
                if GROUPS > 1:
                    x = tl.where((s < SIZE // GROUPS)[:, None], code, 0.0).to(tl.float16)
                gh_r = multiply(w_r, x, COPIES, PRECISION) * s_r
                gh_z = multiply(w_z, x, COPIES, PRECISION) * s_z
                gh_n = multiply(w_n, x, COPIES, PRECISION) * s_n
                for g in tl.static_range(1, GROUPS):
                    x = tl.where((s // (SIZE // GROUPS) == g)[:, None], code, 0.0).to(tl.float16)
                    scale_p = scale + g * 3 * H + c
                    gh_r += multiply(w_r, x, COPIES, PRECISION) * tl.load(scale_p, mask=own, other=0.0)[:, None]
                    gh_z += multiply(w_z, x, COPIES, PRECISION) * tl.load(scale_p + H, mask=own, other=0.0)[:, None]
                    gh_n += multiply(w_n, x, COPIES, PRECISION) * tl.load(scale_p + 2 * H, mask=own, other=0.0)[:, None]
            else:
                x = h.to(weight.dtype.element_ty)
                gh_r = multiply(w_r, x, COPIES, PRECISION)
                gh_n = multiply(w_n, x, COPIES, PRECISION)
                gh_z = multiply(w_z, x, COPIES, PRECISION)
            r, z, n, hn, new = gru_gates(
                loaded[3 * u].to(tl.float32),
                loaded[3 * u + 1].to(tl.float32),
                loaded[3 * u + 2].to(tl.float32),
                gh_r + b_r,
                gh_z + b_z,
                gh_n + b_n,
                h,
                PORTABLE,
            )
            if state_grid is not None:
                new, z = on_grid(new, z, carried, gates is not None)
            if mask is not None:
                real = tl.load(mask_p + u * sign * B, mask=(b < B) & (t + u < T), other=0)
                new = tl.where((real != 0)[None, :], new, h)
            h = new
            here = inside & (t + u < T)
            put(out_p + u * step, h.to(states.dtype.element_ty), here)
            if gates is not None:
                p = gates_p + u * step * planes
                if PACKED:
                    put(p, pack_gates(r, z, n, hn), here)
                else:
                    put(p, r, here)
                    put(p + H, z, here)
                    put(p + 2 * H, n, here)
                    put(p + 3 * H, hn, here)
        gi_p += UNROLL * step * 3
        out_p += UNROLL * step
        if gates is not None:
            gates_p += UNROLL * step * planes
        if mask is not None:
            mask_p += UNROLL * sign * B


def call(
    weights: BlockWeights | StreamedWeights,
    gi: Tensor,
    h0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    states: Tensor,
    gates: Tensor | None,
) -> KernelCall | None:
    """The launch that fills ``states``, and ``gates`` if given; None where weights do not fit a program."""
    if isinstance(weights, StreamedWeights):
        return None
    facts, exact = device_facts(gi.device), weights.weight.dtype == torch.float32
    steps, rows, _, hidden = gi.shape
    unroll, stages = tiling(weights.size, exact, mask is not None, facts)
    groups = 1 if weights.scale is None else weights.scale.shape[0]
    if groups == _MOST_UNROLLED:
        unroll = min(unroll, 2)
    constants = {
        "H": hidden,
        "SIZE": weights.size,
        "BLOCK": weights.padded,
        "ROWS": ROWS,
        "COPIES": 2,
        "GROUPS": groups,
        "STATE_N": grid_size(weights.state_grid),
        "UNROLL": unroll,
        "STAGES": stages,
        "EVEN_STEPS": steps % unroll == 0,
        "FULL": weights.size == weights.padded and rows % ROWS == 0,
        "REVERSE": reverse,
        "PORTABLE": weights.quantized,
        "PRECISION": weights.precision,
    }
    return KernelCall(
        kernel=_forward,
        grid=(weights.blocks, cdiv(rows, ROWS), 1),
        io=(gi, h0, mask, states, packed(gates)),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants=constants,
        warps=4,
        portable=weights.quantized,
    )


def forward(
    weights: BlockWeights | StreamedWeights,
    gi: Tensor,
    h0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    states: Tensor,
    gates: Tensor | None,
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    if isinstance(weights, StreamedWeights):
        return streamed.forward(weights, gi, h0, mask, reverse, states, gates)
    launch = call(weights, gi, h0, mask, reverse, states, gates)
    assert launch is not None
    launch.run()
