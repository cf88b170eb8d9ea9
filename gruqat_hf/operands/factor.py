"""One weight tensor of an operand, float or quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A weight tensor as a product reads it.

    Attributes:
        values: ``[gates, nblocks, out, in]`` (``[gates, size]`` for a diagonal). Float weights when ``scale`` is None; else
            the integer codes, held in int8 or, where gradients flow, in float32.
        scale: fp32, same rank as ``values``; each dimension is 1 or that of ``values``, the last one may also be the number
            of groups along the input dimension. None for a float weight.
        qmax: largest magnitude of a code; 0 for a float weight.
    """

    values: Tensor
    scale: Tensor | None = None
    qmax: int = 0

    @property
    def is_quantized(self) -> bool:
        return self.scale is not None

    @property
    def groups(self) -> int:
        """Number of groups along the input dimension; 1 unless the weight is quantized by group."""
        return 1 if self.scale is None else self.scale.shape[-1]

    def dequantize(self) -> Tensor:
        """The float weight, shape of ``values``."""
        if self.scale is None:
            return self.values
        grouped = self.values.to(torch.float32).unflatten(-1, (self.groups, -1))
        return (grouped * self.scale.unsqueeze(-1)).flatten(-2)
