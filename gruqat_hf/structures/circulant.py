"""One vector per gate."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..operands import BlockDiagonalOperand, Factor, Operand
from .base import Structure, require_square
from .config import StructureConfig


class CirculantStructure(Structure):
    """A circulant matrix per gate: column j is the first one turned down by j (Cheng et al. 2015, arXiv 1502.03436).

    Parameter ``weight`` ``[gates, size]``, the first columns. Starts as N(0, 1/size). The operand holds the matrix written out,
    a checkpoint the codes of the vector.
    """

    kind: ClassVar[str] = "circulant"
    invertible: ClassVar[bool] = True
    rows_share_values: ClassVar[bool] = True

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, config: StructureConfig) -> None:
        require_square(cls.kind, in_features, out_features, (in_features, out_features))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.gates, self.in_features)}

    def initial_parameters(self) -> dict[str, Tensor]:
        return {"weight": self.normal("weight", 1 / math.sqrt(self.in_features))}

    def lower(self) -> BlockDiagonalOperand:
        return BlockDiagonalOperand(blocks=Factor(_expand(self.weight)))

    def parameters_from(self, operand: Operand) -> dict[str, Tensor]:
        blocks = self.expect(operand, BlockDiagonalOperand).blocks.dequantize()
        return {"weight": _first_columns(blocks, "operand")}

    @classmethod
    def pack_codes(cls, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """``blocks`` ``[gates, 1, size, size]`` → its first columns ``[gates, size]``.

        Raises:
            ValueError: the codes are no circulant matrices.
        """
        return {**codes, "blocks": _first_columns(codes["blocks"], "blocks codes")}

    @classmethod
    def unpack_codes(cls, stored: dict[str, Tensor], in_features: int) -> dict[str, Tensor]:
        """``blocks`` ``[gates, size]`` → ``[gates, 1, size, size]``.

        Raises:
            ValueError: the stored vectors are not ``in_features`` long.
        """
        vectors = stored["blocks"]
        if vectors.dim() != 2 or vectors.shape[1] != in_features:
            raise ValueError(f"stored blocks codes of kind 'circulant' must be [gates, {in_features}], got {list(vectors.shape)}")
        return {**stored, "blocks": _expand(vectors)}


def _expand(vectors: Tensor) -> Tensor:
    """First columns ``[gates, size]`` → matrices ``[gates, 1, size, size]`` of those same values."""
    position = torch.arange(vectors.shape[1], device=vectors.device)
    turned = (position[:, None] - position[None, :]) % vectors.shape[1]
    return vectors[:, turned].unsqueeze(1)


def _first_columns(matrices: Tensor, what: str) -> Tensor:
    """The inverse of :func:`_expand`; ``what`` names the argument in the error for matrices that are not circulant."""
    if matrices.dim() != 4 or matrices.shape[1] != 1 or matrices.shape[2] != matrices.shape[3]:
        raise ValueError(f"{what} of kind 'circulant' must be [gates, 1, size, size], got {list(matrices.shape)}")
    vectors = matrices[:, 0, :, 0].contiguous()
    if not matrices.is_meta and not torch.equal(_expand(vectors), matrices):
        raise ValueError(f"{what} of kind 'circulant' must be circulant: every column the first one turned down by its number")
    return vectors
