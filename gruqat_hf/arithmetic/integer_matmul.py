"""Products of integer codes, exact on every device."""

from __future__ import annotations

import torch
from torch import Tensor

#: fp32, and tf32 or bf16 tensor cores with fp32 accumulation, hold every integer up to here (design: exact products).
EXACT_LIMIT = 1 << 24

#: Wider codes are cut into a high and a low part, ``256 * high + low``, that tensor cores hold exactly.
_BYTE = 256

#: So many weights of int8 become fp32 at a time on a CPU, as stay in its cache until they are multiplied.
_BLOCK = 1 << 18


def integer_matmul(a: Tensor, b: Tensor, largest_product: int) -> Tensor:
    """``a @ b`` for integer-valued fp32 tensors, equal to the exact integer result rounded once to fp32.

    While no partial sum can reach 2**24 the order of summation cannot matter. Longer sums are cut into exact pieces, which are
    added in float64 (exact below 2**53).

    Args:
        a: ``[..., n, k]``; b: ``[..., k, m]``; integer values of at most 8 bits (9 for an affine activation); ``b`` may be
            held in int8 where it is ``[k, m]``.
        largest_product: largest absolute value of one product of codes.
    """
    k = a.shape[-1]
    piece = max(1, (EXACT_LIMIT - 1) // largest_product)
    if k <= piece:
        return _product(a, b)
    total = _product(a[..., :piece], b[..., :piece, :]).double()
    for start in range(piece, k, piece):
        total = total + _product(a[..., start : start + piece], b[..., start : start + piece, :]).double()
    return total.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; a wide ``b`` ``[k, m]`` of int8 becomes fp32 a block of columns at a time, with no copy of it in fp32."""
    if b.dtype != torch.int8:
        return torch.matmul(a, b)
    k, columns = b.shape
    width = max(1, _BLOCK // k)
    if a.device.type != "cpu" or columns <= width or torch.compiler.is_compiling():
        return torch.matmul(a, b.float())
    out = a.new_empty(*a.shape[:-1], columns)
    for start in range(0, columns, width):
        block = slice(start, start + width)
        out[..., block] = torch.matmul(a, b[:, block].float())
    return out


class _WideProduct(torch.autograd.Function):
    """``a @ b`` with codes of more than 8 bits in ``a``; the gradient is that of the float product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, largest_a: int, largest_b: int) -> Tensor:
        return split_matmul(a, b, largest_a, largest_b)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b = ctx.saved_tensors  # type: ignore[attr-defined]
        of_a = grad @ b.mT.to(grad.dtype) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        of_b = a.mT @ grad if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        return of_a, of_b, None, None


def split_matmul(a: Tensor, b: Tensor, largest_a: int, largest_b: int) -> Tensor:
    """:func:`wide_integer_matmul` without gradients: ``a`` is cut into parts that tensor cores hold exactly, in one product that
    reads ``b`` once."""
    high = torch.round(a * (1.0 / _BYTE))
    parts = torch.cat([high, a - high * _BYTE])
    halves = 2, a.shape[0]
    largest_part = max((largest_a + _BYTE // 2) // _BYTE, _BYTE // 2)
    if a.shape[-1] * largest_part * largest_b < EXACT_LIMIT:
        # Both sums are exact, and so is the high one times 256: adding them rounds the exact result, once.
        of_high, of_low = _product(parts, b).unflatten(0, halves)
        return (of_high * _BYTE).add_(of_low)
    total = a.new_zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float64)
    piece = max(1, (EXACT_LIMIT - 1) // (largest_part * largest_b))
    for start in range(0, a.shape[-1], piece):
        part = slice(start, start + piece)
        of_high, of_low = _product(parts[:, part], b[part]).double().unflatten(0, halves)
        total += of_high * _BYTE + of_low
    return total.float()


def wide_integer_matmul(a: Tensor, b: Tensor, largest_a: int, largest_b: int) -> Tensor:
    """``a @ b`` for integer-valued fp32 tensors, equal to the exact integer result rounded once to fp32.

    As :func:`integer_matmul`, with codes of 16 bits (17 for an affine activation) in ``a``: neither tf32 nor bf16 hold these, nor
    fp32 sums of their products.

    Args:
        a: ``[n, k]`` in fp32; b: ``[k, m]`` in fp32 or int8; integer values.
        largest_a, largest_b: largest magnitudes of a code in each.
    """
    if largest_a <= _BYTE:
        return integer_matmul(a, b, largest_a * largest_b)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _WideProduct.apply(a, b, largest_a, largest_b)
    return split_matmul(a, b, largest_a, largest_b)
