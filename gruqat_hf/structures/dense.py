"""An ordinary matrix per gate."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ..operands import BlockDiagonalOperand, Factor, Operand
from .base import Structure


class DenseStructure(Structure):
    """The full matrices of a GRU (Cho et al. 2014, arXiv 1406.1078).

    Parameter ``weight`` ``[gates, 1, out, in]``. Starts as ``torch.nn.GRU`` does: U(±1/sqrt(out)) for either matrix, out being
    the hidden size.
    """

    kind: ClassVar[str] = "dense"
    invertible: ClassVar[bool] = True

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.gates, 1, self.out_features, self.in_features)}

    def initial_parameters(self) -> dict[str, Tensor]:
        return {"weight": self.uniform("weight", 1 / math.sqrt(self.out_features))}

    def lower(self) -> BlockDiagonalOperand:
        return BlockDiagonalOperand(blocks=Factor(self.weight))

    def parameters_from(self, operand: Operand) -> dict[str, Tensor]:
        return {"weight": self.expect(operand, BlockDiagonalOperand).blocks.dequantize()}
