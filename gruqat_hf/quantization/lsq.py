"""Learned step size quantization (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..arithmetic import Elementwise
from .fake_quantize import FakeQuantize
from .grid import MIN_SCALE


class _ScaleGradient(Elementwise):
    """Identity whose gradient is multiplied by ``factor`` (Esser et al. 2020, §2.2)."""

    @staticmethod
    def forward(value: Tensor, factor: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None  # type: ignore[attr-defined]


class LearnedStepSize(FakeQuantize):
    """The scale is a parameter, trained with the gradient of the rounding.

    Its first value is the range known beforehand, or what the observer makes of the first tensor seen. Its gradient is multiplied
    by ``1 / sqrt(values per scale * qmax)``.
    """

    def _register_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale)

    @property
    def is_dynamic(self) -> bool:
        return False

    @property
    def is_observing(self) -> bool:
        return super().is_observing and not self.is_calibrated

    def _set_scale(self) -> None:
        if getattr(self, "_is_fsdp_managed_module", False):
            raise RuntimeError(
                f"quantizer {self.name!r} learns its scale and has none to start from, and here it is spread over the ranks; "
                "call calibrate(loader) before fully_shard()"
            )
        super()._set_scale()

    def current_scale(self, value: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 1.0 / math.sqrt(self.layout.values_per_scale * self.config.qmax)
        return _ScaleGradient.apply(self.scale, factor).abs().clamp_min(MIN_SCALE), self.zero_point
