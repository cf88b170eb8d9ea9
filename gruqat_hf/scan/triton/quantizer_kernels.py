"""Kernels of quantizers: ranges, scales and codes, bit for bit as :mod:`gruqat_hf.quantization` computes them in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantization.observers import EmaObserver
from .device import device_facts
from .family import KernelCall
from .math import codes, count, in_range

if TYPE_CHECKING:
    from ...quantization import Observer

#: Values that a program reads at a time, and programs for each processor, in a search for the extremes.
_VALUES, _PROGRAMS = 4096, 4
#: Values of a row that a program holds at once, in all.
_TILE = 4096

_ROUNDER = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["size", "step"])
def _extremes(value, parts, size, step, VALUES: tl.constexpr):
    """The smallest and the largest of every ``step``-th tile of ``value``, into ``parts`` ``[2, programs]``; NaN for NaN."""
    low = tl.full((VALUES,), float("inf"), tl.float32)
    high = -low
    strange = tl.zeros((VALUES,), tl.int32)
    begin = tl.program_id(0).to(tl.int64) * VALUES
    for start in tl.range(count(begin), count(tl.cast(size, tl.int64)), count(tl.cast(step, tl.int64))):
        i = start + tl.arange(0, VALUES)
        x = tl.load(value + i, mask=i < size, other=0.0).to(tl.float32)
        low = tl.where(i < size, tl.minimum(low, x), low)
        high = tl.where(i < size, tl.maximum(high, x), high)
        strange = strange | ((i < size) & (x != x)).to(tl.int32)
    any_strange = tl.max(strange, axis=0) != 0
    nan = float("nan")
    tl.store(parts + tl.program_id(0), tl.where(any_strange, nan, tl.min(low, axis=0)))
    tl.store(parts + tl.num_programs(0) + tl.program_id(0), tl.where(any_strange, nan, tl.max(high, axis=0)))


@triton.jit(do_not_specialize=["parts_n"])
def _update(
    parts, min_val, max_val, counted, scale, zero_point, parts_n, decay, rest, min_scale, qmin, qmax,
    PARTS: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    """What ``Observer.update`` and ``FakeQuantize.scale_from_range`` do with a tensor's extremes.

    AVERAGES: the moving average of EMA, ``past * decay + new * rest``; else the extremes ever seen.
    """
    i = tl.arange(0, PARTS)
    lows = tl.load(parts + i, mask=i < parts_n, other=float("inf"))
    highs = tl.load(parts + parts_n + i, mask=i < parts_n, other=-float("inf"))
    strange = tl.max(((lows != lows) | (highs != highs)).to(tl.int32), axis=0) != 0
    low = tl.min(lows, axis=0)
    high = tl.max(highs, axis=0)
    seen = ((high - low) < float("inf")) & (strange == 0)
    number = tl.load(counted)
    past_low, past_high = tl.load(min_val), tl.load(max_val)
    if AVERAGES:
        merged_low, merged_high = past_low * decay + low * rest, past_high * decay + high * rest
    else:
        merged_low, merged_high = tl.minimum(past_low, low), tl.maximum(past_high, high)
    low = tl.where(seen, tl.where(number == 0, low, merged_low), past_low)
    high = tl.where(seen, tl.where(number == 0, high, merged_high), past_high)
    number += seen.to(tl.int64)
    tl.store(min_val, low)
    tl.store(max_val, high)
    tl.store(counted, number)
    if zero_point is None:
        new = tl.maximum(tl.div_rn(tl.maximum(-low, high), qmax), min_scale)
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        new = tl.maximum(tl.div_rn(high - low, qmax - qmin), min_scale)
        zero = qmin - ((tl.div_rn(low, new) + _ROUNDER) - _ROUNDER)
        zero = tl.minimum(tl.maximum(zero, qmin), qmax)
        tl.store(zero_point, zero.to(tl.int32), mask=number > 0)
    tl.store(scale, new, mask=number > 0)


@triton.jit(do_not_specialize=["n"])
def _pack(scale, zero_point, packed, n, qmin, qmax, SCALES: tl.constexpr):
    i = tl.program_id(0) * SCALES + tl.arange(0, SCALES)
    inside = i < n
    s = tl.load(scale + i, mask=inside, other=1.0)
    low, high = tl.full((SCALES,), 0.0, tl.float32) + qmin, tl.full((SCALES,), 0.0, tl.float32) + qmax
    if zero_point is not None:
        offset = tl.load(zero_point + i, mask=inside, other=0).to(tl.float32)
        low, high = low - offset, high - offset
    tl.store(packed + i, s, mask=inside)
    tl.store(packed + n + i, tl.div_rn(1.0, s), mask=inside)
    tl.store(packed + 2 * n + i, low, mask=inside)
    tl.store(packed + 3 * n + i, high, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _round_rows(weight, out, scale, rows, qmax, min_scale, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of ROWS rows of WIDTH values, each row by a scale of its own."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows)[:, None] & (i < WIDTH)
    at = r[:, None].to(tl.int64) * WIDTH + i
    x = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(tl.max((x != x).to(tl.int32), axis=1) != 0, float("nan"), largest)
    s = tl.div_rn(largest, qmax)
    s = tl.where(s < min_scale, min_scale, s)  # NaN stays
    tl.store(scale + r, s, mask=r < rows)
    tl.store(out + at, codes(x, tl.div_rn(1.0, s)[:, None], -qmax, qmax), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _round_rows_backward(weight, scale, grad, out, rows, qmax, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows)[:, None] & (i < WIDTH)
    at = r[:, None].to(tl.int64) * WIDTH + i
    x = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(scale + r, mask=r < rows, other=1.0))[:, None]
    g = tl.load(grad + at, mask=inside, other=0.0)
    g = tl.where(in_range(x, inverse, -qmax, qmax), g, 0.0) * inverse
    tl.store(out + at, g, mask=inside)


def update_range(observer: Observer, value: Tensor, scale: Tensor, zero_point: Tensor | None, min_scale: float) -> None:
    """See ``QuantizerKernels``; one scale, of a whole tensor of any shape and float dtype."""
    config, value, decay = observer.config, value.contiguous(), float(observer.config.ema_decay)
    number = min(triton.cdiv(value.numel(), _VALUES), _PROGRAMS * device_facts(value.device).processors)
    parts = value.new_empty((2, number), dtype=torch.float32)
    KernelCall(
        kernel=_extremes,
        grid=(number, 1, 1),
        io=(value, parts),
        static=(value.numel(), number * _VALUES),
        constants={"VALUES": _VALUES},
        warps=8,
    ).run()
    KernelCall(
        kernel=_update,
        grid=(1, 1, 1),
        io=(parts, observer.min_val, observer.max_val, observer.count, scale, zero_point),
        static=(number, decay, 1.0 - decay, min_scale, float(config.qmin), float(config.qmax)),
        constants={"PARTS": triton.next_power_of_2(number), "AVERAGES": isinstance(observer, EmaObserver)},
        portable=True,
    ).run()


def pack_grid(scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """See ``QuantizerKernels``."""
    packed = scale.new_empty((4, scale.numel()))
    KernelCall(
        kernel=_pack,
        grid=(triton.cdiv(scale.numel(), 512), 1, 1),
        io=(scale, zero_point, packed),
        static=(scale.numel(), float(qmin), float(qmax)),
        constants={"SCALES": min(512, triton.next_power_of_2(scale.numel()))},
        portable=True,
    ).run()
    return packed


def _tiling(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, min(16, _TILE // block)), "BLOCK": block}


class RoundedWeight(torch.autograd.Function):
    """Codes and scales of ``QuantizerKernels.round_weight``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: int, qmax: int, min_scale: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight = weight.contiguous()
        out, scale = torch.empty_like(weight, dtype=torch.float32), weight.new_empty(scales, dtype=torch.float32)
        tiling = _tiling(weight.numel() // scales)
        KernelCall(
            kernel=_round_rows,
            grid=(triton.cdiv(scales, tiling["ROWS"]), 1, 1),
            io=(weight, out, scale),
            static=(scales, float(qmax), min_scale),
            constants=tiling,
            portable=True,
        ).run()
        ctx.qmax = qmax
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(weight, scale)
        return out, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            inverse = torch.reciprocal(scale).view(-1, 1)
            code = torch.round(weight.detach().float().view(scale.numel(), -1) * inverse)
            rows = grad.reshape(scale.numel(), -1)
            found = torch.where(code.abs() <= ctx.qmax, rows, 0.0) * inverse
            return found.view(weight.shape).to(weight.dtype), None, None, None
        grad, scales = grad.contiguous().float(), scale.numel()
        out = torch.empty_like(grad)
        tiling = _tiling(weight.numel() // scales)
        KernelCall(
            kernel=_round_rows_backward,
            grid=(triton.cdiv(scales, tiling["ROWS"]), 1, 1),
            io=(weight, scale, grad, out),
            static=(scales, float(ctx.qmax)),
            constants=tiling,
            portable=True,
        ).run()
        return out.to(weight.dtype), None, None, None
