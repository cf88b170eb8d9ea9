"""Products of integer codes, exact on every device."""

from __future__ import annotations

import torch
from torch import Tensor

#: fp32, and tf32 or bf16 tensor cores with fp32 accumulation, hold every integer up to here (design: exact products).
EXACT_LIMIT = 1 << 24


def integer_matmul(a: Tensor, b: Tensor, largest_product: int) -> Tensor:
    """``a @ b`` for integer-valued fp32 tensors, equal to the exact integer result rounded once to fp32.

    While no partial sum can reach 2**24 the order of summation cannot matter. Longer sums are cut into exact pieces, which are
    added in float64 (exact below 2**53).

    Args:
        a: ``[..., n, k]``; b: ``[..., k, m]``; integer values of at most 8 bits (9 for an affine activation).
        largest_product: largest absolute value of one product of codes.
    """
    k = a.shape[-1]
    piece = max(1, (EXACT_LIMIT - 1) // largest_product)
    if k <= piece:
        return torch.matmul(a, b)
    total = torch.matmul(a[..., :piece], b[..., :piece, :]).double()
    for start in range(piece, k, piece):
        total = total + torch.matmul(a[..., start : start + piece], b[..., start : start + piece, :]).double()
    return total.float()
