"""A quantizer's work in one launch. In training it is made of many small operations, each of which a GPU waits for; where kernels
are registered that give the same bits, they do it. Without any, PyTorch does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

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
        """Take ``value`` into the one range of a MinMaxObserver or EmaObserver, and set ``scale``, ``zero_point`` from it."""

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
    if not quantizer.computes_as_base or type(observer) not in (EmaObserver, MinMaxObserver):
        return False
    if quantizer.scale.numel() != 1 or (is_distributed() and not observer.replicated):
        return False
    if (kernels := _kernels_for(value)) is None:
        return False
    kernels.update_range(observer, value.detach(), quantizer.scale, quantizer.zero_point, MIN_SCALE)
    return True


def grid(quantizer: FakeQuantize) -> Grid | None:
    """The grid of a scale that is kept in a buffer, a copy; None where it is not to be had at once."""
    scale, zero_point, config = quantizer.scale, quantizer.zero_point, quantizer.config
    if not quantizer.computes_as_base or quantizer.is_dynamic or scale.requires_grad:
        return None
    if (kernels := _kernels_for(scale)) is None:
        return None
    packed = kernels.pack_grid(scale, zero_point, config.qmin, config.qmax)
    return Grid.of_packed(packed, tuple(scale.shape), zero_point is not None, config.qmin, config.qmax)


def round_weight(quantizer: FakeQuantize, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of ``quantize_weight``, if these are scales of whole rows, taken afresh; else None."""
    layout, config = quantizer.layout, quantizer.config
    usual = quantizer.computes_as_base and type(quantizer.observer) is DynamicObserver
    rows = layout.scale_shape[:-1] == layout.shape[:-1] and layout.values_per_scale <= _WIDEST_ROW
    if not (usual and rows and config.symmetric) or (kernels := _kernels_for(weight)) is None:
        return None
    codes, scale = kernels.round_weight(weight, quantizer.scale.numel(), config.qmax, MIN_SCALE)
    return codes, scale.view(layout.scale_shape)
