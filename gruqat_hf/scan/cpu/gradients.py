"""Gradients of weights and bias: one product over all rows of a finished scan."""

from __future__ import annotations

import torch
from torch import Tensor

from ...operands import BlockDiagonalOperand, DiagonalOperand, Factor
from ...quantization import Grid
from ..product import OperandProduct
from ..replay import before_steps
from ..spec import ScanSpec, SpecTensors, flatten, restore


def product_gradients(
    spec: ScanSpec, wanted: SpecTensors, h0: Tensor, states: Tensor, reverse: bool, dgi: Tensor, dgh_n: Tensor
) -> SpecTensors:
    """Gradients of the values of both factors and of the bias, where wanted, by straight-through rounding.

    Args:
        dgi: gradients of the hidden product's r and z, and of the input product's n, ``[T, B, 3, H]``.
        dgh_n: of the hidden product's n, ``[T, B, H]``.
    """
    dgh = torch.cat([dgi[:, :, :2], dgh_n.unsqueeze(2)], dim=2).flatten(0, 1)
    before = before_steps(states, h0, reverse).flatten(0, 1)
    operand, grid = spec.operand, spec.grids.h
    found = SpecTensors(*(None,) * len(wanted))  # type: ignore[arg-type]
    if wanted.first and isinstance(operand, DiagonalOperand):
        product = (dgh * _codes(before, grid).unsqueeze(1)).sum(0)
        found = found._replace(first=product if grid is None else product * (grid.scale.reshape(-1, 1) * operand.diagonal.scale))
    elif wanted.first and isinstance(operand, BlockDiagonalOperand):
        found = found._replace(first=_block_gradient(operand.blocks, grid, before, dgh))
    elif wanted.first or wanted.second:
        found = _replay(spec, wanted, before, dgh)
    return found._replace(bias=dgh.sum(0) if wanted.bias else None)


def _codes(value: Tensor, grid: Grid | None) -> Tensor:
    return value if grid is None else grid.codes(value)


def _block_gradient(factor: Factor, grid: Grid | None, x: Tensor, dy: Tensor) -> Tensor:
    """Of a factor ``[gates, blocks, out, in]`` with ``y [rows, gates, blocks * out] = factor * codes(x [rows, blocks * in])``."""
    gates, blocks, out, width = factor.values.shape
    codes = _codes(x, grid).unflatten(-1, (blocks, width)).transpose(0, 1)  # [blocks, rows, in]
    rows = dy.unflatten(-1, (blocks, out)).permute(2, 1, 3, 0).flatten(1, 2)  # [blocks, gates * out, rows]
    gradient = torch.matmul(rows, codes).unflatten(1, (gates, out)).transpose(0, 1)
    if grid is None or factor.scale is None:
        return gradient
    scale = grid.scale.reshape(-1, 1, 1, 1) * factor.scale
    return (gradient.unflatten(-1, (factor.groups, -1)) * scale.unsqueeze(-1)).flatten(-2)


def _replay(spec: ScanSpec, wanted: SpecTensors, before: Tensor, dgh: Tensor) -> SpecTensors:
    """By autograd through the product of all rows."""
    tensors, limits = flatten(spec)
    with torch.enable_grad():
        leaves = SpecTensors(
            *(
                None if tensor is None else tensor.detach().requires_grad_(bool(want))
                for tensor, want in zip(tensors, wanted._replace(bias=False))
            )
        )
        again = restore(leaves, limits, spec.quantized, spec.exact)
        out = OperandProduct(again.operand, again.grids.h, again.grids.mid)(before)
        asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        gradients = iter(torch.autograd.grad(out, asked, dgh))
    return SpecTensors(*(next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves))
