"""One diagonal matrix per gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .factor import Factor
from .operand import Operand


@dataclass(frozen=True)
class DiagonalOperand(Operand):
    """``y[g] = diagonal[g] * x``; ``diagonal`` is ``[gates, size]``."""

    factor_names: ClassVar[tuple[str, ...]] = ("diagonal",)
    diagonal: Factor

    @property
    def in_features(self) -> int:
        return self.diagonal.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.diagonal.values.shape[1]

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal.dequantize())
