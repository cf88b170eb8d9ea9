"""Observers: what range of values a quantizer should cover."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import QuantizerConfig
from .fp32 import KeepsFloat32
from .granularity import ScaleLayout
from .ranks import is_distributed

#: A percentile is taken over at most this many values in all, evenly spaced: torch.quantile has a limit, and time has one too.
_PERCENTILE_SAMPLE = 1 << 22


class Observer(KeepsFloat32, nn.Module, ABC):
    """Keeps a range ``[min_val, max_val]`` per scale, in fp32, from the whole tensors that it is shown.

    Subclasses define :meth:`merge`. Under torch.distributed the ranges of all ranks are reduced before they are merged, so that
    every rank holds the same range.

    Attributes:
        replicated: whether all ranks are shown the same tensors, as with a weight, so that there is nothing to reduce.
    """

    min_val: Tensor
    max_val: Tensor
    count: Tensor

    def __init__(self, config: QuantizerConfig, layout: ScaleLayout, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.replicated = False
        for name, value in self.initial_values(device).items():
            self.register_buffer(name, value)

    def initial_values(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Values of the buffers before anything was observed."""
        shape = self.layout.scale_shape
        return {
            "min_val": torch.zeros(shape, dtype=torch.float32, device=device),
            "max_val": torch.zeros(shape, dtype=torch.float32, device=device),
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }

    def range_of(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Range of one tensor ``[..., *layout.shape]``, per scale."""
        low, high = self.layout.group(value).aminmax(dim=-1)
        return low, high

    def over_ranks(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range of all ranks; a rank that saw nothing holds ``(inf, -inf)``."""
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        return low, high

    @abstractmethod
    def merge(self, past: Tensor, new: Tensor, side: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Bound after ``new`` was seen; ``side`` is torch.minimum for the lower bound, torch.maximum for the upper."""

    @torch.no_grad()
    def update(self, value: Tensor) -> None:
        """Take ``value`` ``[..., *layout.shape]`` into the range.

        An empty tensor, and one with NaN or infinity in it, is left out. Every rank of a distributed run must make the call,
        unless the tensors are replicated: it waits for the others.
        """
        if value.numel():
            low, high = self.range_of(value.detach().to(torch.float32))
        else:
            low, high = torch.full_like(self.min_val, torch.inf), torch.full_like(self.max_val, -torch.inf)
        if is_distributed() and not self.replicated:
            low, high = self.over_ranks(low.contiguous(), high.contiguous())
        seen = ((high - low).abs() < torch.inf).all()  # False for NaN as well, and for the range of nothing, (inf, -inf)
        first = self.count == 0
        for past, new, side in ((self.min_val, low, torch.minimum), (self.max_val, high, torch.maximum)):
            merged = torch.where(first, new, self.merge(past, new, side))
            past.copy_(torch.where(seen, merged, past))
        self.count.add_(seen)


class DynamicObserver(Observer):
    """The range of the tensor at hand, nothing else."""

    def merge(self, past: Tensor, new: Tensor, side: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return new


class MinMaxObserver(Observer):
    """The extremes ever seen."""

    def merge(self, past: Tensor, new: Tensor, side: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return side(past, new)


class EmaObserver(Observer):
    """Exponential moving average of each tensor's extremes, ``ema_decay`` being the weight of the past."""

    def merge(self, past: Tensor, new: Tensor, side: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        decay = self.config.ema_decay
        return past * decay + new * (1.0 - decay)


class PercentileObserver(EmaObserver):
    """Moving average of the range that holds ``percentile`` per cent of each tensor's values, cut on both sides alike."""

    def range_of(self, value: Tensor) -> tuple[Tensor, Tensor]:
        tail = (1.0 - self.config.percentile / 100.0) / 2.0

        values = self.layout.group(value)
        values = values[..., :: -(-values.numel() // _PERCENTILE_SAMPLE)]
        return torch.quantile(values, tail, dim=-1), torch.quantile(values, 1.0 - tail, dim=-1)

    def over_ranks(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the ranks' ranges."""
        saw = torch.isfinite(low).all().to(low.dtype)
        stacked = torch.stack([low.nan_to_num(0.0, 0.0, 0.0) * saw, high.nan_to_num(0.0, 0.0, 0.0) * saw, saw.expand_as(low)])
        dist.all_reduce(stacked)
        return stacked[0] / stacked[2], stacked[1] / stacked[2]


class FixedObserver(Observer):
    """Observes nothing: the scale was given or is known beforehand."""

    def merge(self, past: Tensor, new: Tensor, side: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return past

    def update(self, value: Tensor) -> None:
        return None


_OBSERVERS: dict[str, type[Observer]] = {
    "dynamic": DynamicObserver,
    "minmax": MinMaxObserver,
    "ema": EmaObserver,
    "percentile": PercentileObserver,
    "fixed": FixedObserver,
}


def register_observer(name: str, cls: type[Observer]) -> type[Observer]:
    """Make ``QuantizerConfig(observer=name)`` use ``cls``.

    Raises:
        ValueError: the name is taken by another class.
    """
    if _OBSERVERS.setdefault(name, cls) is not cls:
        raise ValueError(f"observer {name!r} is {_OBSERVERS[name].__name__} already; choose another name")
    return cls


def build_observer(config: QuantizerConfig, layout: ScaleLayout, device: torch.device | str | None = None) -> Observer:
    """The observer that ``config.observer`` names.

    Raises:
        ValueError: unknown name.
    """
    if config.observer not in _OBSERVERS:
        raise ValueError(f"QuantizerConfig.observer is {config.observer!r}; known: {', '.join(sorted(_OBSERVERS))}")
    return _OBSERVERS[config.observer](config, layout, device)
