"""One block-diagonal factor per gate."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ..operands import BlockDiagonalOperand, Factor, Operand
from .base import Structure, require_nblocks
from .config import StructureConfig


class BlockDiagonalStructure(Structure):
    """A block-diagonal matrix per gate: the units fall into ``nblocks`` groups (Kuchaiev & Ginsburg 2017, arXiv 1703.10722).

    Parameter ``weight`` ``[gates, nblocks, out/nblocks, in/nblocks]``. Starts as U(±1/sqrt(in/nblocks)).
    """

    kind: ClassVar[str] = "blockdiag"
    invertible: ClassVar[bool] = True

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        require_nblocks(cls.kind, in_features, out_features, config.nblocks)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        nblocks = self.config.nblocks
        return {"weight": (self.gates, nblocks, self.out_features // nblocks, self.in_features // nblocks)}

    def initial_parameters(self) -> dict[str, Tensor]:
        return {"weight": self.uniform("weight", math.sqrt(self.config.nblocks / self.in_features))}

    def lower(self) -> BlockDiagonalOperand:
        return BlockDiagonalOperand(blocks=Factor(self.weight))

    def parameters_from(self, operand: Operand) -> dict[str, Tensor]:
        return {"weight": self.expect(operand, BlockDiagonalOperand).blocks.dequantize()}
