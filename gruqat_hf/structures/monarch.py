"""Two block-diagonal factors per gate with a transpose between them."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ..operands import Factor, MonarchOperand, Operand
from .base import Structure, require_nblocks
from .config import StructureConfig


class MonarchStructure(Structure):
    """A Monarch matrix per gate (Dao et al. 2022, arXiv 2204.00595); its product is written out in :class:`MonarchOperand`.

    Parameters ``first`` ``[1, nblocks, in/nblocks, in/nblocks]``, shared by the gates, or ``[gates, ...]`` with the option
    ``per_gate``; ``second`` ``[gates, nblocks, out/nblocks, in/nblocks]``.

    An entry of a gate's product with ``x`` is a sum over (in/nblocks)² pairs of a weight of either factor. Both start uniform
    with the variance v for which ``(in/nblocks)² v²`` is the 1/3 that a dense matrix of U(±1/sqrt(in)) has. Sharing the first
    factor changes no gate's own distribution, only correlates the gates.
    """

    kind: ClassVar[str] = "monarch"
    invertible: ClassVar[bool] = True

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        require_nblocks(cls.kind, in_features, out_features, config.nblocks)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        nblocks = self.config.nblocks
        rows, columns = self.out_features // nblocks, self.in_features // nblocks
        return {
            "first": (self.gates if self.config.per_gate else 1, nblocks, columns, columns),
            "second": (self.gates, nblocks, rows, columns),
        }

    def initial_parameters(self) -> dict[str, Tensor]:
        variance = self.config.nblocks / (math.sqrt(3) * self.in_features)
        bound = math.sqrt(3 * variance)
        return {"first": self.uniform("first", bound), "second": self.uniform("second", bound)}

    def lower(self) -> MonarchOperand:
        return MonarchOperand(first=Factor(self.first), second=Factor(self.second))

    def parameters_from(self, operand: Operand) -> dict[str, Tensor]:
        monarch = self.expect(operand, MonarchOperand)
        return {"first": monarch.first.dequantize(), "second": monarch.second.dequantize()}
