"""The fake-quantizer, one per quantization point."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import fused
from .config import QuantizerConfig
from .fp32 import KeepsFloat32
from .granularity import ScaleLayout
from .grid import MIN_SCALE, Grid
from .meter import SaturationMeter
from .observers import build_observer


class FakeQuantize(KeepsFloat32, nn.Module):
    """Puts a value on an integer grid while a network trains. Base of the schemes; by itself the scheme "observed".

    A new scheme is a subclass that overrides :meth:`scale_from_range` (where the scale comes from a range) or
    :meth:`current_scale` (where it comes from something else), and is added by :func:`register_scheme`.

    Args:
        config: bits, granularity, observer.
        layout: which values share a scale.
        known_range: largest magnitude that the values can have, where that is known before any were seen.
        name: quantization point, for messages.

    Attributes:
        scale: fp32, ``layout.scale_shape``; also ``zero_point``, int32 of the same shape, if the config is affine.
        observer_enabled: whether forward passes in training mode update the observer.
        calibrating: whether forward passes update the observer in eval mode too.
        fake_quant_enabled: whether forward passes in training mode round. In eval mode they always do, as the frozen model will.
        meter: given one, it counts the values that are clipped.
        range_follows_weights: whether ``known_range`` was taken from weights, so that no checkpoint's need be the same.
    """

    #: Whether all methods are those of this class, so that kernels may do their work at once; not in schemes made of it.
    computes_as_base: ClassVar[bool] = True

    scale: Tensor
    zero_point: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.computes_as_base = False

    def __init__(
        self,
        config: QuantizerConfig,
        layout: ScaleLayout,
        *,
        known_range: float | None = None,
        name: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.observer == "fixed" and config.scale is None and known_range is None:
            raise ValueError(
                f"{name}: observer 'fixed' needs QuantizerConfig(scale=...) here, where no range is known beforehand; "
                "or use observer 'ema', 'minmax' or 'percentile' and calibrate()"
            )
        self.config, self.layout, self.known_range, self.name = config, layout, known_range, name
        self.observer = build_observer(config, layout, device)
        self.observer_enabled = True
        self.calibrating = False
        self.fake_quant_enabled = True
        self.meter: SaturationMeter | None = None
        self.range_follows_weights = False
        self._calibrated: bool | None = None
        values = self.initial_values(device)
        self._register_scale(values["scale"])
        self.register_buffer("zero_point", values.get("zero_point"))

    def _register_scale(self, scale: Tensor) -> None:
        self.register_buffer("scale", scale)

    def initial_values(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Values of ``scale`` (and ``zero_point``) before anything was observed."""
        shape = self.layout.scale_shape
        if self.config.scale is not None:
            scale = torch.full(shape, self.config.scale, dtype=torch.float32, device=device)
            zero_point = torch.full(shape, self.config.zero_point or 0, dtype=torch.int32, device=device)
        else:
            bound = torch.full(shape, self.known_range or 1.0, dtype=torch.float32, device=device)
            scale, zero_point = self.scale_from_range(-bound, bound)
        return {"scale": scale} if self.config.symmetric else {"scale": scale, "zero_point": zero_point}

    def given_values(self) -> dict[str, Tensor]:
        """``scale`` (and ``zero_point``), on the CPU, where config and point alone say them; empty where data or weights do."""
        from_weights = self.range_follows_weights and self.config.scale is None
        if self.config.observer != "fixed" or from_weights or isinstance(self.scale, nn.Parameter):
            return {}
        return self.initial_values("cpu")

    def scale_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (fp32) of the grid that covers ``[low, high]``, and its zero point (int32) or None for a symmetric grid; each
        shaped ``layout.scale_shape``."""
        config = self.config
        if config.symmetric:
            return _divide(torch.maximum(-low, high), config.qmax).clamp_min(MIN_SCALE), None
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
        scale = _divide(high - low, config.qmax - config.qmin).clamp_min(MIN_SCALE)
        zero_point = torch.clamp(config.qmin - torch.round(low / scale), config.qmin, config.qmax)
        return scale, zero_point.to(torch.int32)

    @property
    def is_calibrated(self) -> bool:
        """Whether the grid rests on values that were seen, or on a range known beforehand. Reads the device once."""
        if self.is_dynamic or self.config.observer == "fixed" or self.known_range is not None:
            return True
        return self._has_observed

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale is taken afresh from each tensor."""
        return self.config.observer == "dynamic"

    @property
    def _has_observed(self) -> bool:
        if self._calibrated is None:
            self._calibrated = self.observer.count.device.type == "meta" or bool(self.observer.count > 0)
        return self._calibrated

    def forget_calibration_state(self) -> None:
        """Read again from the buffers whether anything was observed; to be called after they were loaded."""
        self._calibrated = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self.forget_calibration_state()

    @property
    def is_observing(self) -> bool:
        """Whether the coming forward pass updates the observer."""
        wanted = self.calibrating or (self.training and self.observer_enabled)
        return wanted and not self.is_dynamic and self.config.observer != "fixed"

    @property
    def is_active(self) -> bool:
        """Whether the coming forward pass rounds; otherwise it computes with the value as it is."""
        return self.fake_quant_enabled or not self.training

    @property
    def is_watching(self) -> bool:
        """Whether the coming forward pass must show this quantizer its value."""
        return self.is_observing or self.meter is not None

    def measure(self, value: Tensor) -> None:
        """If there is a meter and a scale, count the values ``[..., *layout.shape]`` that the present grid clips."""
        if self.meter is not None and self.is_calibrated:
            with torch.no_grad():
                self.meter.add(self._expanded(self.grid(value)).clips(value))

    def _expanded(self, grid: Grid) -> Grid:
        return Grid(grid.scale, self.layout.expand(grid.inv_scale), grid.low, grid.high, grid.magnitude)

    def initialise(self, value: Tensor) -> None:
        """Observe ``value`` once whatever the mode: for a weight, which is there before any batch."""
        calibrating, self.calibrating = self.calibrating, True
        self.observe(value)
        self.calibrating = calibrating

    def observe(self, value: Tensor) -> None:
        """If this quantizer is observing, take ``value`` ``[..., *layout.shape]`` into the range and set the scale from it."""
        if not self.is_observing:
            return
        with torch.no_grad():  # here, so that an exported program of one that does not observe has no such region
            self._observe(value)

    def _observe(self, value: Tensor) -> None:
        if not fused.update_range(self, value):
            self.observer.update(value)
            self._set_scale()
        if not self._calibrated:
            self.forget_calibration_state()

    def _set_scale(self) -> None:
        scale, zero_point = self.scale_from_range(self.observer.min_val, self.observer.max_val)
        if not self._calibrated:  # what was shown may have been left out
            seen = self.observer.count > 0
            scale = torch.where(seen, scale, self.scale)
            zero_point = None if zero_point is None else torch.where(seen, zero_point, self.zero_point)
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero_point)

    def current_scale(self, value: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for this forward pass; ``value`` is at hand only outside scans."""
        if self.is_dynamic:
            if value is None:
                raise ValueError(f"{self.name}: a dynamic observer needs the value that it scales")
            with torch.no_grad():
                seen = value.detach().to(torch.float32) if value.numel() else value.new_zeros(self.layout.shape).float()
                low, high = self.observer.range_of(seen)
                scale, zero_point = self.scale_from_range(low, high)
            return scale, None if self.config.symmetric else zero_point
        # A copy: observing may update the buffer in place before the backward pass of this forward has run.
        return self.scale if self.config.observer == "fixed" else self.scale.clone(), self.zero_point

    def grid(self, value: Tensor | None = None) -> Grid:
        """The grid for this forward pass, its scale shaped ``layout.scale_shape``.

        Raises:
            RuntimeError: nothing was observed yet, so that no scale exists.
        """
        if not self.is_calibrated:
            raise RuntimeError(
                f"quantizer {self.name!r} has observed nothing yet, so it has no scale; run a forward pass in training mode "
                "or calibrate(loader) first"
            )
        if (grid := fused.grid(self)) is not None:
            return grid
        scale, zero_point = self.current_scale(value)
        return Grid.build(scale, zero_point, self.config.qmin, self.config.qmax)

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """fp32 codes of a weight ``layout.shape``, with straight-through gradient, and the scales ``layout.scale_shape``; None
        where this quantizer only watches."""
        self.observe(weight)
        self.measure(weight)
        if not self.is_active:
            return None
        if (rounded := fused.round_weight(self, weight)) is not None:
            return rounded
        grid = self.grid(weight)
        return self._expanded(grid).codes(weight), grid.scale

    def extra_repr(self) -> str:
        if not self.fake_quant_enabled:
            return self._described() + ", not rounding in training"
        return self._described()

    def _described(self) -> str:
        if self.scale.device.type == "meta" or self.is_calibrated:
            return describe(self.config, None if self.is_dynamic else self.scale)
        return describe(self.config, None) + ", nothing observed yet"


def _divide(value: Tensor, by: int) -> Tensor:
    """``value / by``, rounded once on every device: CUDA multiplies by the reciprocal of a number, but divides by a tensor."""
    return value / torch.full_like(value, by)


def describe(config: QuantizerConfig, scale: Tensor | None) -> str:
    """Bits, granularity, where the scale comes from, and its value or range, on one line."""
    parts = [f"{config.bits} bits", f"per {config.granularity}"]
    if config.group_size is not None:
        parts[-1] += f" of {config.group_size}"
    parts.append("symmetric" if config.symmetric else "affine")
    parts.append(config.scheme if config.scheme != "observed" else config.observer)
    if scale is not None and scale.device.type != "meta":
        low, high = (float(bound) for bound in scale.detach().aminmax())
        parts.append(f"scale {low:.4g}" if low == high else f"scale {low:.4g} to {high:.4g}")
    return ", ".join(parts)
