"""The integer grid: the one place where a value is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arithmetic import Elementwise, needs_function

#: Smallest scale: a range of nothing but zeros still has a grid, and 1/scale stays finite.
MIN_SCALE = 1e-12


class _RoundStraightThrough(Elementwise):
    """Round half to even; the gradient passes unchanged (straight-through estimator, Bengio et al. 2013)."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return torch.round(value)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class Grid:
    """An integer grid, with codes counted from the zero point: ``code = clamp(rint(v * inv_scale), low, high)``.

    An affine grid's ``q - zero_point`` is such a code as well, with ``low = qmin - zero_point`` and ``high = qmax -
    zero_point``, so that a product of codes is the integer product for both kinds.

    Attributes:
        scale, inv_scale: fp32, broadcastable to the values; ``inv_scale = 1 / scale`` rounded once.
        low, high: smallest and largest code; int, or fp32 tensors shaped like ``scale`` for an affine grid.
        magnitude: largest absolute value that a code can have.
        packed: the first four as one fp32 tensor ``[4, scales]``, as kernels take them, where they were made so.
    """

    scale: Tensor
    inv_scale: Tensor
    low: int | Tensor
    high: int | Tensor
    magnitude: int
    packed: Tensor | None = None

    @classmethod
    def build(cls, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Grid:
        """The grid of a scale and, if affine, a zero point shaped like it."""
        if zero_point is None:
            return cls(scale, torch.reciprocal(scale), qmin, qmax, qmax)
        offset = zero_point.to(torch.float32)
        return cls(scale, torch.reciprocal(scale), qmin - offset, qmax - offset, qmax - qmin)

    @classmethod
    def of_packed(cls, packed: Tensor, shape: tuple[int, ...], is_affine: bool, qmin: int, qmax: int) -> Grid:
        """The same of a packed one, its scale shaped ``shape``."""
        scale, inv_scale, low, high = packed.view(4, *shape).unbind(0)
        if is_affine:
            return cls(scale, inv_scale, low, high, qmax - qmin, packed)
        return cls(scale, inv_scale, qmin, qmax, qmax, packed)

    def codes(self, value: Tensor) -> Tensor:
        """Integer codes of ``value`` in fp32. Straight-through gradient inside the range, none beyond; NaN stays NaN."""
        scaled = value.to(torch.float32) * self.inv_scale
        rounded = _RoundStraightThrough.apply(scaled) if needs_function(scaled) else torch.round(scaled)
        return torch.clamp(rounded, self.low, self.high)

    def clips(self, value: Tensor) -> Tensor:
        """Whether a value lies beyond the grid's ends; bool, shaped like ``codes(value)``."""
        rounded = torch.round(value.to(torch.float32) * self.inv_scale)
        return (rounded < self.low) | (rounded > self.high)

    def round_trip(self, value: Tensor) -> Tensor:
        """``value`` as the grid represents it: ``codes(value) * scale``, fp32."""
        return self.codes(value) * self.scale

    def gates(self, start: int, stop: int) -> Grid:
        """The grid of gates ``start`` to ``stop`` where the scale's first dimension is the gate; this grid where it is not."""
        if self.scale.dim() == 0 or self.scale.shape[0] == 1:
            return self

        def part(bound: int | Tensor) -> int | Tensor:
            return bound[start:stop] if isinstance(bound, Tensor) else bound

        return Grid(self.scale[start:stop], self.inv_scale[start:stop], part(self.low), part(self.high), self.magnitude)
