"""One weight per hidden unit and gate."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..operands import DiagonalOperand, Factor, Operand
from .base import Structure, require_square
from .config import StructureConfig


class DiagonalStructure(Structure):
    """A diagonal matrix per gate: units do not see each other (as in IndRNN, Li et al. 2018, arXiv 1803.04831).

    Parameter ``weight`` ``[gates, size]``. Starts as U(±1): each row has one entry, and this gives its product the variance
    (a third of the input's) that the ``size`` entries of U(±1/sqrt(size)) give a row of ``torch.nn.GRU``. It is also what
    blockdiag has at blocks of size 1.
    """

    kind: ClassVar[str] = "diagonal"
    invertible: ClassVar[bool] = True
    rows_share_values: ClassVar[bool] = True

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        require_square(cls.kind, in_features, out_features, (in_features, out_features))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.gates, self.in_features)}

    def initial_parameters(self) -> dict[str, Tensor]:
        return {"weight": self.uniform("weight", 1.0)}

    def lower(self) -> DiagonalOperand:
        return DiagonalOperand(diagonal=Factor(self.weight))

    def parameters_from(self, operand: Operand) -> dict[str, Tensor]:
        return {"weight": self.expect(operand, DiagonalOperand).diagonal.dequantize()}
