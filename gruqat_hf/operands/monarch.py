"""Two block-diagonal factors with a transpose between them (Dao et al. 2022, arXiv 2204.00595)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .factor import Factor
from .operand import Operand


@dataclass(frozen=True)
class MonarchOperand(Operand):
    """A Monarch matrix per gate.

    ``first`` is ``[1 or gates, k, q, p]`` (1: all gates share it) and ``second`` ``[gates, l, s, r]`` with ``k*q == l*r``.
    For input ``x[k, p]``: ``mid[k, q] = first[k] @ x[k]``; read flat as ``[r, l]`` and transposed it is the input of the second
    factor, ``y[l, s] = second[l] @ mid[:, l]``; the output is ``y`` transposed and flattened, ``out[s * l_count + l]``.
    """

    factor_names: ClassVar[tuple[str, ...]] = ("first", "second")
    first: Factor
    second: Factor

    @property
    def in_features(self) -> int:
        return self.first.values.shape[1] * self.first.values.shape[3]

    @property
    def out_features(self) -> int:
        return self.second.values.shape[1] * self.second.values.shape[2]

    def to_dense(self) -> Tensor:
        first, second = self.first.dequantize(), self.second.dequantize()
        gates, blocks, _, rank = second.shape
        mid = torch.stack([torch.block_diag(*gate) for gate in first])  # [1 or gates, k*q, in]
        mid = mid.unflatten(1, (rank, blocks)).expand(gates, -1, -1, -1)
        out = torch.einsum("glsr,grli->gsli", second, mid)
        return out.flatten(1, 2)
