"""A quantizer's work in training, one launch for each part of it; see :mod:`gruqat_hf.quantization.fused`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...arithmetic import is_transformed
from ..dispatch import BACKEND_VARIABLE
from .device import refuses_device
from .family import needs_operators

if TYPE_CHECKING:
    from ...quantization.observers import Observer


def serve(value: Tensor) -> bool:
    """Whether kernels outside of scans can read ``value`` now, and the environment forces no other backend."""
    if value.numel() == 0 or needs_operators(value) or is_transformed() or refuses_device(value.device) is not None:
        return False
    return os.environ.get(BACKEND_VARIABLE, "auto") in ("auto", "triton", "hopper")


class TritonQuantizers:
    """``QuantizerKernels`` on whatever runs the portable kernels."""

    def serve(self, value: Tensor) -> bool:
        return serve(value)

    def update_range(self, observer: Observer, value: Tensor, scale: Tensor, zero_point: Tensor | None, min_scale: float) -> None:
        from .quantizer_kernels import update_range

        update_range(observer, value, scale, zero_point, min_scale)
        for changed in (observer.min_val, observer.max_val, observer.count, scale, zero_point):
            if changed is not None:  # kernels do not count: plans prepared from these tensors would not notice
                torch.autograd.graph.increment_version(changed)

    def pack_grid(self, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
        from .quantizer_kernels import pack_grid

        return pack_grid(scale, zero_point, qmin, qmax)

    def round_weight(self, weight: Tensor, scales: int, qmax: int, min_scale: float) -> tuple[Tensor, Tensor]:
        from .quantizer_kernels import RoundedWeight

        return RoundedWeight.apply(weight, scales, qmax, min_scale)
