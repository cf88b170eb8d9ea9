"""Low displacement rank with learned subdiagonal operators."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operands import BlockDiagonalOperand, Factor
from .base import Structure, require_square
from .config import StructureConfig


class LDRStructure(Structure):
    """A matrix of low displacement rank per gate (Thomas et al. 2018, arXiv 1810.02309).

    Parameters ``subdiagonal_a``, ``subdiagonal_b`` ``[gates, size - 1]``, the only nonzero entries of the operators A and B, and
    ``left``, ``right`` ``[gates, rank, size]``. The matrix is the sum over ranks of ``K(A, left[r]) @ K(B, right[r]).T``, where
    column i of the Krylov matrix ``K(A, v)`` is ``A^i v``. Subdiagonals start at 1, left and right as N(0, 1/(rank * size)).

    Equally, with ``C = left.T @ right``, the matrix is ``sum over i of A^i C (B.T)^i``, and that is how it is computed: sums of
    1, 2, 4, ... terms, each from the one before, by elementwise products and sums alone (``A^i`` shifts down by i and scales).
    This takes size² log2(size) operations, divides by nothing, and eager PyTorch rounds it alike on every device.
    """

    kind: ClassVar[str] = "ldr"
    invertible: ClassVar[bool] = False

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        require_square(cls.kind, in_features, out_features, (in_features, out_features))
        if config.rank > in_features:
            raise ValueError(
                f"StructureConfig.rank={config.rank} exceeds the size {in_features} of the matrix; 1 to {in_features} would work"
            )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        subdiagonal = (self.gates, self.in_features - 1)
        generator = (self.gates, self.config.rank, self.in_features)
        return {"subdiagonal_a": subdiagonal, "subdiagonal_b": subdiagonal, "left": generator, "right": generator}

    def initial_parameters(self) -> dict[str, Tensor]:
        std = 1 / math.sqrt(self.config.rank * self.in_features)
        return {
            "subdiagonal_a": torch.ones_like(self.subdiagonal_a, requires_grad=False),
            "subdiagonal_b": torch.ones_like(self.subdiagonal_b, requires_grad=False),
            "left": self.normal("left", std),
            "right": self.normal("right", std),
        }

    def lower(self) -> BlockDiagonalOperand:
        size = self.in_features
        left, right = self.left.unsqueeze(-1), self.right.unsqueeze(-2)
        total = left[:, 0] * right[:, 0]
        for rank in range(1, self.config.rank):
            total = total + left[:, rank] * right[:, rank]
        # The entries of A^shift, from row `shift` on.
        power_a, power_b = self.subdiagonal_a, self.subdiagonal_b
        shift = 1
        while shift < size:
            scale = power_a.unsqueeze(-1) * power_b.unsqueeze(-2)
            total = total + F.pad(scale * total[:, :-shift, :-shift], (shift, 0, shift, 0))
            power_a = power_a[:, :-shift] * power_a[:, shift:]
            power_b = power_b[:, :-shift] * power_b[:, shift:]
            shift *= 2
        return BlockDiagonalOperand(blocks=Factor(total.unsqueeze(1)))
