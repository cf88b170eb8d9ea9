"""One block-diagonal matrix per gate; dense is the case of a single block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .factor import Factor
from .operand import Operand


@dataclass(frozen=True)
class BlockDiagonalOperand(Operand):
    """``y[g, k] = blocks[g, k] @ x[k]`` for block k of the input; ``blocks`` is ``[gates, nblocks, out/nblocks, in/nblocks]``."""

    factor_names: ClassVar[tuple[str, ...]] = ("blocks",)
    blocks: Factor

    @property
    def in_features(self) -> int:
        return self.blocks.values.shape[1] * self.blocks.values.shape[3]

    @property
    def out_features(self) -> int:
        return self.blocks.values.shape[1] * self.blocks.values.shape[2]

    def to_dense(self) -> Tensor:
        return torch.stack([torch.block_diag(*gate) for gate in self.blocks.dequantize()])
