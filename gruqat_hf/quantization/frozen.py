"""What an activation's fake-quantizer becomes when its model is frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fake_quantize import FakeQuantize, describe
from .fp32 import KeepsFloat32
from .grid import Grid


class FrozenGrid(KeepsFloat32, nn.Module):
    """A grid that no longer changes: ``scale`` fp32 and, if affine, ``zero_point`` int32; a dynamic one stores neither.

    Raises:
        RuntimeError: the quantizer has observed nothing yet.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.config, self.layout, self.name = quantizer.config, quantizer.layout, quantizer.name
        scale = zero_point = None
        if not quantizer.is_dynamic:
            with torch.no_grad():
                scale = quantizer.grid().scale.detach().clone()
            if quantizer.zero_point is not None:
                zero_point = quantizer.zero_point.detach().clone()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self._given = quantizer.given_values()
        # In a tuple, so that it is no submodule: a dynamic grid needs its rule, which has no tensors of its own.
        self._rule = (quantizer,) if quantizer.is_dynamic else ()

    @property
    def is_dynamic(self) -> bool:
        return bool(self._rule)

    def given_values(self) -> dict[str, Tensor]:
        """As :meth:`FakeQuantize.given_values`."""
        return self._given

    def grid(self, value: Tensor | None = None) -> Grid:
        """The grid; a dynamic one needs the ``value`` that it is for."""
        if self._rule:
            return self._rule[0].grid(value)
        assert self.scale is not None
        return Grid.build(self.scale, self.zero_point, self.config.qmin, self.config.qmax)

    def extra_repr(self) -> str:
        return describe(self.config, self.scale) + ", frozen"
