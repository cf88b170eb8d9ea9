"""Low displacement rank with learned subdiagonal operators."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..arithmetic import is_transformed
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
        displaced = _displaced if is_transformed() else _Displaced.apply
        left, right = self.left.unsqueeze(-1), self.right.unsqueeze(-2)
        total = left[:, 0] * right[:, 0]
        for rank in range(1, self.config.rank):
            total = total + left[:, rank] * right[:, rank]
        return BlockDiagonalOperand(blocks=Factor(displaced(total, self.subdiagonal_a, self.subdiagonal_b).unsqueeze(1)))


def _displaced(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``sum over i of A^i C (B.T)^i`` from ``C``, ``total`` ``[gates, size, size]``, and the subdiagonals of A and B
    ``[gates, size - 1]``."""
    shift, size = 1, total.shape[-1]
    while shift < size:
        # The entries of A^shift, from row `shift` on, and of B^shift.
        moved = a.unsqueeze(-1) * b.unsqueeze(-2) * total[:, :-shift, :-shift]
        total = total + pad(moved, (shift, 0, shift, 0))
        a, b = a[:, :-shift] * a[:, shift:], b[:, :-shift] * b[:, shift:]
        shift *= 2
    return total


class _Displaced(torch.autograd.Function):
    """The same with a gradient of its own: by autograd the many slices would cost several times what the sums do."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        totals, powers = [], [_pair(a, b)]
        shift, size = 1, total.shape[-1]
        while shift < size:
            totals.append(total)
            # The entries of A^shift, from row `shift` on, and of B^shift.
            power = powers[-1]
            moved = power[0].unsqueeze(-1) * power[1].unsqueeze(-2) * total[:, :-shift, :-shift]
            total = total.clone()
            total[:, shift:, shift:] += moved
            powers.append(power[..., :-shift] * power[..., shift:])
            shift *= 2
        ctx.save_for_backward(*totals, *powers[: len(totals)])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: checkpoints give them once
        count = len(saved) // 2
        totals, powers = saved[:count], saved[count:]
        gradient, dpower = gradient.clone(), None
        for level in reversed(range(count)):
            shift, power, total = 1 << level, powers[level], totals[level]
            later = gradient[:, shift:, shift:]
            weighted = later * total[:, :-shift, :-shift]
            found = _pair((weighted * power[1].unsqueeze(-2)).sum(-1), (weighted * power[0].unsqueeze(-1)).sum(-2))
            if dpower is not None:  # of the next power, which is the product of two slices of this one
                found[..., :-shift].addcmul_(dpower, power[..., shift:])
                found[..., shift:].addcmul_(dpower, power[..., :-shift])
            dpower = found
            # The product is a tensor of its own: both sides overlap.
            gradient[:, :-shift, :-shift] += power[0].unsqueeze(-1) * power[1].unsqueeze(-2) * later
        da, db = torch.zeros_like(gradient[:, 0, 1:]).expand(2, -1, -1) if dpower is None else dpower
        return gradient, da, db


def _pair(a: Tensor, b: Tensor) -> Tensor:
    """What torch.stack gives, which autocast refuses to do for float64."""
    pair = a.new_empty((2, *a.shape))
    pair[0], pair[1] = a, b
    return pair
