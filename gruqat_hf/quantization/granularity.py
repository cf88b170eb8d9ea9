"""Which values share a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .config import QuantizerConfig


@dataclass(frozen=True)
class ScaleLayout:
    """How the scales of a value of shape ``shape`` (leading batch dimensions left out) lie over it.

    Attributes:
        shape: feature shape of the value, for example ``(3, nblocks, out, in)`` for a weight.
        scale_shape: same rank; each dimension divides that of ``shape``, and neighbours share a scale.
    """

    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]

    @classmethod
    def of_weight(cls, config: QuantizerConfig, shape: tuple[int, ...], rows_share_values: bool, name: str) -> ScaleLayout:
        """Layout over a factor ``[gates, ..., in]``.

        Args:
            rows_share_values: True where a gate's rows hold the same values (diagonal, circulant): channel and group mean gate.
            name: of the weight, for the error.

        Raises:
            ValueError: a group size that does not divide the row.
        """
        granularity = config.granularity
        if rows_share_values and granularity in ("channel", "group"):
            granularity = "gate"
        ones = (1,) * (len(shape) - 1)
        if granularity == "tensor":
            return cls(shape, (1, *ones))
        if granularity == "gate":
            return cls(shape, (shape[0], *ones))
        row = shape[-1]
        size = row if config.group_size is None or config.group_size >= row else config.group_size
        if row % size:
            divisors = ", ".join(str(d) for d in range(1, row + 1) if row % d == 0)
            raise ValueError(
                f"group_size={size} does not divide the rows of {name}, which hold {row} weights; "
                f"group sizes that do: {divisors} (a larger one means one group a row)"
            )
        return cls(shape, (*shape[:-1], row // size))

    @classmethod
    def of_activation(cls, config: QuantizerConfig, shape: tuple[int, ...]) -> ScaleLayout:
        """Layout over an activation ``[features]`` or ``[gates, ..., features]``."""
        if config.granularity == "gate":
            return cls(shape, (shape[0], *(1,) * (len(shape) - 1)))
        if config.granularity == "channel":
            return cls(shape, shape)
        return cls(shape, (1,) * len(shape))

    @property
    def values_per_scale(self) -> int:
        return math.prod(self.shape) // math.prod(self.scale_shape)

    def group(self, value: Tensor) -> Tensor:
        """``[..., *shape]`` → ``[*scale_shape, values]``: those that share a scale together in the last dimension."""
        split: list[int] = []
        for size, scales in zip(self.shape, self.scale_shape):
            split += [scales, size // scales]
        rank = len(self.shape)
        scale_dims = [1 + 2 * i for i in range(rank)]
        order = scale_dims + [0] + [dim + 1 for dim in scale_dims]
        return value.reshape(-1, *split).permute(order).reshape(*self.scale_shape, -1)

    def expand(self, scale: Tensor) -> Tensor:
        """``scale`` as a tensor that broadcasts against ``[..., *shape]``."""
        for dim, (size, scales) in enumerate(zip(self.shape, self.scale_shape)):
            if scales not in (1, size):
                scale = scale.repeat_interleave(size // scales, dim=dim)
        return scale
