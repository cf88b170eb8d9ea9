"""The two factors of a butterfly multiplied out by one launch each, and their gradients: the factors bit for bit what
:mod:`gruqat_hf.structures.butterfly` computes stage by stage, the gradients as close as sums in another order are.

Entry ``[o, i]`` of a block is the product, over its stages t, of one twiddle each: that of output bit t of ``o`` and input bit t
of ``i``, at the position that the bits of ``o`` below t and those of ``i`` above t name.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...structures.butterfly import multiply_out
from .family import KernelCall

#: Widest block, whose entries are one program's.
_WIDEST = 64


@triton.jit
def _twiddle(twiddle, g, group, q, o, i, t, WIDTH: tl.constexpr, INNER: tl.constexpr, FIRST: tl.constexpr, TOTAL: tl.constexpr):
    """Where stage ``t``'s twiddle of the entries ``[o, i]`` is; of block ``q`` of INNER in ``group`` of gate ``g``."""
    stride = 1 << t
    position = (((group * WIDTH + i) >> (t + 1)) * stride + (o & (stride - 1))) * INNER + q
    half: tl.constexpr = (1 << TOTAL) // 2
    return twiddle + ((g * TOTAL + FIRST + t) * half + position) * 4 + ((o >> t) & 1) * 2 + ((i >> t) & 1)


@triton.jit
def _forward(
    twiddle, out, BLOCKS: tl.constexpr, INNER: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr, TOTAL: tl.constexpr
):  # fmt: skip
    """Program k: a block ``[WIDTH, WIDTH]`` of ``out`` ``[gates, BLOCKS, WIDTH, WIDTH]``."""
    WIDTH: tl.constexpr = 1 << STAGES
    k = tl.program_id(0)
    o = tl.arange(0, WIDTH)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    product = tl.full((WIDTH, WIDTH), 1.0, tl.float32)
    for t in tl.static_range(STAGES):
        at = _twiddle(twiddle, k // BLOCKS, k % BLOCKS // INNER, k % INNER, o, i, t, WIDTH, INNER, FIRST, TOTAL)
        product = product * tl.load(at)
    tl.store(out + k * (WIDTH * WIDTH) + o * WIDTH + i, product)


@triton.jit
def _backward(
    twiddle, grad, dtwiddle,
    BLOCKS: tl.constexpr, INNER: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Program (k, t): gradients of block k's twiddles of stage t, each of which is in WIDTH / 2 entries."""
    WIDTH: tl.constexpr = 1 << STAGES
    k = tl.program_id(0)
    t = tl.program_id(1)
    own = tl.arange(0, 2 * WIDTH)[:, None]
    entry = tl.arange(0, WIDTH // 2)[None, :]
    rest = own >> 2
    o = ((entry >> t) << (t + 1)) | (((own >> 1) & 1) << t) | (rest & ((1 << t) - 1))
    i = ((rest >> t) << (t + 1)) | ((own & 1) << t) | (entry & ((1 << t) - 1))
    product = tl.load(grad + k * (WIDTH * WIDTH) + o * WIDTH + i)
    for u in tl.static_range(STAGES):
        at = _twiddle(twiddle, k // BLOCKS, k % BLOCKS // INNER, k % INNER, o, i, u, WIDTH, INNER, FIRST, TOTAL)
        product = product * tl.where(u == t, 1.0, tl.load(at))
    found = tl.sum(product, axis=1)
    # All entries of a row have the same twiddle of this stage: the first one tells where it is.
    own = tl.arange(0, 2 * WIDTH)
    rest = own >> 2
    o = (((own >> 1) & 1) << t) | (rest & ((1 << t) - 1))
    i = ((rest >> t) << (t + 1)) | ((own & 1) << t)
    at = _twiddle(dtwiddle, k // BLOCKS, k % BLOCKS // INNER, k % INNER, o, i, t, WIDTH, INNER, FIRST, TOTAL)
    tl.store(at, found)


def _factors(stages: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constexprs of the two factors of a butterfly with so many stages."""
    inner = (stages + 1) // 2
    first = {"BLOCKS": 1 << (stages - inner), "INNER": 1, "FIRST": 0, "STAGES": inner, "TOTAL": stages}
    return first, {"BLOCKS": 1 << inner, "INNER": 1 << inner, "FIRST": inner, "STAGES": stages - inner, "TOTAL": stages}


class _MultiplyOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, twiddle: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gates, stages = twiddle.shape[:2]
        outs = []
        for constants in _factors(stages):
            width = 1 << constants["STAGES"]
            out = twiddle.new_empty(gates, constants["BLOCKS"], width, width)
            KernelCall(_forward, (gates * constants["BLOCKS"], 1, 1), (twiddle, out), (), constants).run()
            outs.append(out)
        ctx.save_for_backward(twiddle)
        return outs[0], outs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (twiddle,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return torch.autograd.grad(multiply_out(twiddle), twiddle, grads, create_graph=True)[0]
        gates, stages = twiddle.shape[:2]
        dtwiddle = torch.empty_like(twiddle)
        for constants, grad in zip(_factors(stages), grads):
            grid = (gates * constants["BLOCKS"], constants["STAGES"], 1)
            KernelCall(_backward, grid, (twiddle, grad.contiguous(), dtwiddle), (), constants).run()
        return dtwiddle


def multiplied_out(twiddle: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both factors of ``twiddle`` ``[gates, stages, size / 2, 2, 2]`` fp32; None where these kernels do not take it."""
    stages = twiddle.shape[1]
    if twiddle.dtype != torch.float32 or not 2 <= stages <= 2 * (_WIDEST.bit_length() - 1) or not twiddle.is_contiguous():
        return None
    return _MultiplyOut.apply(twiddle)
