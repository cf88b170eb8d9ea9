"""The input product of a whole sequence in training: one matrix product forward, with all around it in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ...operands import BlockDiagonalOperand, Operand
from ...quantization import Grid
from ..replay import column_sums
from ..spec import is_integer, pack_grid
from .device import refuses_device
from .family import needs_operators


def _integer_product(
    rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, grid: Tensor, wide: bool
) -> tuple[Tensor, Tensor]:
    """``rows`` ``[R, I]`` by codes ``weight`` ``[N, I]``, ``scale`` ``[groups, N]``, ``bias`` ``[N]``; and the codes of ``rows``.

    wide: codes of rows go beyond int8.
    """
    from .input_product import integer_calls

    codes, out = _empty(rows, weight, scale, bias, grid, wide)[::-1]
    for call in integer_calls(rows, codes, rows.new_empty(rows.shape[0]), out, weight.to(codes.dtype), scale, bias, grid):
        call.run()
    return out, codes


def _empty(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, grid: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(rows, dtype=torch.float16 if wide else torch.int8)
    return rows.new_empty((rows.shape[0], weight.shape[0])), codes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, weight, scale, _, grid, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows if ctx.needs_input_grad[0] else None, weight, scale, grid, output[1])


def _backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, weight, scale, grid, codes = ctx.saved_tensors
    needs_rows, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    drows = dweight = dbias = None
    if gradient is None:
        return (None,) * 6
    if needs_weight:
        product = gradient.t() @ codes.to(gradient.dtype)
        dweight = (product.unflatten(1, (scale.shape[0], -1)) * scale.t().unsqueeze(-1)).flatten(1)
    if needs_rows:
        scaled = (weight.unflatten(1, (scale.shape[0], -1)) * scale.t().unsqueeze(-1)).flatten(1)
        _, inverse, low, high = grid
        code = torch.round(rows * inverse)
        drows = torch.where((code >= low) & (code <= high), (gradient @ scaled) * inverse, 0.0)
    if needs_bias:
        dbias = column_sums(gradient)
    return drows, dweight, None, dbias, None, None


triton_integer_product = torch.library.custom_op(
    "gruqat_hf::triton_integer_product",
    _integer_product,
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor scale, Tensor? bias, Tensor grid, bool wide) -> (Tensor, Tensor)",
)
triton_integer_product.register_fake(_empty)
torch.library.register_autograd("gruqat_hf::triton_integer_product", _backward, setup_context=_setup_context)


class _IntegerProduct(torch.autograd.Function):
    """The operator without its dispatch."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = _integer_product(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _backward(ctx, gradient, _)


def dense_product(operand: Operand, grid: Grid | None, bias: Tensor | None, rows: Tensor) -> Tensor | None:
    """``rows`` ``[R, I]`` → ``[R, gates, H]`` with ``bias`` ``[gates, H]``; None where the general product is to be taken.

    It is there for dense weights: float ones, and codes whose scales need no gradient.
    """
    if not isinstance(operand, BlockDiagonalOperand) or operand.blocks.values.shape[1] != 1 or rows.shape[0] == 0:
        return None
    if refuses_device(rows.device) is not None or torch.is_autocast_enabled(rows.device.type):
        return None
    factor = operand.blocks
    weight, gates = factor.values.flatten(0, 2), factor.values.shape[0]
    flat = None if bias is None else bias.reshape(-1)
    if grid is None and factor.scale is None:
        return linear(rows, weight, flat).unflatten(1, (gates, -1))
    if grid is None or not is_integer(factor, grid):
        return None
    if grid.scale.requires_grad or factor.scale.requires_grad or rows.dtype != torch.float32:
        return None
    scale = (grid.scale.reshape(-1, 1, 1, 1) * factor.scale).expand(*factor.values.shape[:3], -1)
    scale = scale.reshape(-1, scale.shape[-1]).t().contiguous()
    run = triton_integer_product if needs_operators(rows) else _IntegerProduct.apply
    out, _ = run(rows.contiguous(), weight, scale, flat, pack_grid(grid), grid.magnitude > 127)
    return out.unflatten(1, (gates, -1))
