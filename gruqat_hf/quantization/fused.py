"""A quantizer's work in one launch. In training it is made of many small operations, each of which a GPU waits for; where kernels
are registered that give the same bits, they do it. Without any, PyTorch does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .grid import MIN_SCALE, Grid
from .observers import DynamicObserver, EmaObserver, MinMaxObserver, Observer
from .ranks import is_distributed

if TYPE_CHECKING:
    from .fake_quantize import FakeQuantize

#: Most values that share a scale for a kernel to round them all at once.
_WIDEST_ROW = 8192


class QuantizerKernels(Protocol):
    """Kernels for tensors of some device."""

    def serve(self, value: Tensor) -> bool:
        """Whether they can read ``value`` now; not while a compiler is watching."""

    def update_range(self, observer: Observer, value: Tensor, scale: Tensor, zero_point: Tensor | None, min_scale: float) -> None:
        """Take ``value`` into the range of a min-max or EMA observer that has one, and set ``scale``, ``zero_point`` from it."""

    def pack_grid(self, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
        """Scale, 1 / scale, lowest and highest code, ``[4, scales]`` fp32; a copy."""

    def round_weight(self, weight: Tensor, scales: int, qmax: int, min_scale: float) -> tuple[Tensor, Tensor]:
        """fp32 codes of ``weight``, whose values make ``scales`` rows, with straight-through gradient, and the scale of each
        row's largest magnitude, ``[scales]``."""


#: The first that serves a tensor is taken; filled by the backends of scans.
KERNELS: list[QuantizerKernels] = []


def _kernels_for(value: Tensor) -> QuantizerKernels | None:
    return next((kernels for kernels in KERNELS if kernels.serve(value)), None)


def update_range(quantizer: FakeQuantize, value: Tensor) -> bool:
    """Take ``value`` into a range and set the scale from it, if that is what ``quantizer`` does; whether it is done."""
    observer = quantizer.observer
    usual = type(observer) in (EmaObserver, MinMaxObserver) and quantizer.computes_as_base("_set_scale", "scale_from_range")
    if not usual or quantizer.scale.numel() != 1 or (is_distributed() and not observer.replicated):
        return False
    if (kernels := _kernels_for(value)) is None:
        return False
    kernels.update_range(observer, value.detach(), quantizer.scale, quantizer.zero_point, MIN_SCALE)
    return True


def grid(quantizer: FakeQuantize) -> Grid | None:
    """The grid of a scale that is kept in a buffer, a copy; None where it is not to be had at once.

    A fixed one is made once, while its tensors are what they were.
    """
    if quantizer.is_dynamic or not quantizer.computes_as_base("current_scale"):
        return None
    scale, zero_point, config = quantizer.scale, quantizer.zero_point, quantizer.config
    if (kernels := _kernels_for(scale)) is None:
        return None
    key = None
    if config.observer == "fixed" and not (scale.is_inference() or torch.is_inference_mode_enabled()):
        # Tensors by their ids: a quantizer keeps what it is made of, so that no other one comes to have that.
        key = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in (scale, zero_point) if tensor is not None]
        if quantizer.kept_grid is not None and quantizer.kept_grid[0] == key:
            return quantizer.kept_grid[1]
    packed = kernels.pack_grid(scale, zero_point, config.qmin, config.qmax)
    found = Grid.of_packed(packed, tuple(scale.shape), zero_point is not None, config.qmin, config.qmax)
    # Made while a graph is captured, its values would be there only after a replay.
    if key is not None and not (scale.is_cuda and torch.cuda.is_current_stream_capturing()):
        quantizer.kept_grid = key, found, (scale, zero_point)
    return found


def round_weight(quantizer: FakeQuantize, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of ``quantize_weight``, if these are scales of whole rows, taken afresh; else None."""
    layout, config = quantizer.layout, quantizer.config
    usual = type(quantizer.observer) is DynamicObserver and quantizer.computes_as_base("current_scale", "scale_from_range")
    rows = layout.scale_shape[:-1] == layout.shape[:-1] and layout.values_per_scale <= _WIDEST_ROW
    if not (usual and rows and config.symmetric) or (kernels := _kernels_for(weight)) is None:
        return None
    codes, scale = kernels.round_weight(weight, quantizer.scale.numel(), config.qmax, MIN_SCALE)
    return codes, scale.view(layout.scale_shape)
