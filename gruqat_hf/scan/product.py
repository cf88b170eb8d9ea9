"""The product of an operand with rows of activations: float, or exact in integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arithmetic.integer_matmul import integer_matmul
from ..operands import BlockDiagonalOperand, DiagonalOperand, Factor, MonarchOperand, Operand
from ..quantization import Grid

#: Called with a quantization point's name and its value before rounding, ``[rows, ...]``.
Tap = Callable[[str, Tensor], None]

#: Gives the grid, or None, for a value that is at hand whole.
GridOf = Callable[[Tensor], "Grid | None"]


class _BlockProduct:
    """One block-diagonal factor ``[gates, blocks, out, in]`` times ``[rows, 1 or gates, blocks, in]``.

    With both sides quantized, group j of the input gives the exact integer ``acc_j``, and
    ``y = acc_0 * (s_x * s_w0) + acc_1 * (s_x * s_w1) + ...`` in this order, each operation rounded on its own.
    """

    def __init__(self, factor: Factor, grid: Grid | None) -> None:
        self.grid = grid
        self.is_integer = factor.is_quantized and grid is not None
        values = factor.values if self.is_integer else factor.dequantize()
        self.gates, self.blocks, self.out, _ = values.shape
        self.weight = (values.float() if self.is_integer else values).permute(1, 3, 0, 2)  # [blocks, in, gates, out]
        self.groups = factor.groups if self.is_integer else 1
        if grid is not None and factor.scale is not None:
            self.largest_product = factor.qmax * grid.magnitude
            # An activation has one scale, or one per gate: align it with the gates of [gates, blocks, out, groups].
            scale_x = grid.scale.reshape(-1, 1, 1, 1)
            self.scales = (scale_x * factor.scale).movedim(-1, 0).transpose(1, 2)  # [groups, blocks, gates, out]

    def __call__(self, x: Tensor) -> Tensor:
        if self.grid is not None:
            x = self.grid.codes(x) if self.is_integer else self.grid.round_trip(x)
        if not self.is_integer:
            return self._matmul(x, self.weight)
        width = x.shape[-1] // self.groups
        total: Tensor | None = None
        for j in range(self.groups):
            part = slice(j * width, (j + 1) * width)
            # [rows, gates, blocks, out] is how the result leaves; scales are [blocks, gates, out].
            term = self._matmul(x[..., part], self.weight[:, part]) * self.scales[j].transpose(0, 1)
            total = term if total is None else total + term
        assert total is not None
        return total

    def _matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """``[rows, 1 or gates, blocks, in]`` with ``[blocks, in, gates, out]`` → ``[rows, gates, blocks, out]``."""
        if x.shape[1] == 1:
            product = self._dot(x[:, 0].transpose(0, 1), weight.flatten(2))  # [blocks, rows, gates*out]
            return product.unflatten(-1, (self.gates, self.out)).permute(1, 2, 0, 3)
        product = self._dot(x.permute(1, 2, 0, 3), weight.permute(2, 0, 1, 3))  # [gates, blocks, rows, out]
        return product.permute(2, 0, 1, 3)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return integer_matmul(a, b, self.largest_product) if self.is_integer else torch.matmul(a, b)


class _DiagonalProduct:
    """A diagonal factor ``[gates, size]`` times ``[rows, size]``: one product each, exact in integers."""

    def __init__(self, factor: Factor, grid: Grid | None) -> None:
        self.grid = grid
        self.is_integer = factor.is_quantized and grid is not None
        self.weight = factor.values.float() if self.is_integer else factor.dequantize()
        if grid is not None and factor.scale is not None:
            self.scale = grid.scale.reshape(-1, 1) * factor.scale

    def __call__(self, x: Tensor) -> Tensor:
        if self.grid is not None:
            x = self.grid.codes(x) if self.is_integer else self.grid.round_trip(x)
        product = x.unsqueeze(1) * self.weight
        return product * self.scale if self.is_integer else product


class OperandProduct:
    """``y[gate] = W[gate] x`` for an operand, prepared once and applied to many rows.

    Args:
        operand: the weights, float or quantized.
        grid: of the input; None leaves it in float.
        mid_grid: of the value between the factors of a monarch operand, or a function that gives it (or None) for the value at
            hand, ``[rows, 1 or gates, blocks, rank]``.

    Calling it with ``[rows, in_features]`` gives ``[rows, gates, out_features]``.
    """

    def __init__(self, operand: Operand, grid: Grid | None, mid_grid: Grid | GridOf | None = None) -> None:
        self.operand, self.mid_grid = operand, mid_grid
        self._diagonal = self._first = self._second = None
        if isinstance(operand, DiagonalOperand):
            self._diagonal = _DiagonalProduct(operand.diagonal, grid)
        elif isinstance(operand, BlockDiagonalOperand):
            self._first = _BlockProduct(operand.blocks, grid)
        elif isinstance(operand, MonarchOperand):
            self._first = _BlockProduct(operand.first, grid)
            if not callable(mid_grid):
                self._second = _BlockProduct(operand.second, mid_grid)
        else:
            raise TypeError(f"no product for operand {type(operand).__name__}; known: block-diagonal, diagonal, monarch")

    def __call__(self, x: Tensor, tap: Tap | None = None) -> Tensor:
        if self._diagonal is not None:
            return self._diagonal(x)
        y = self.first_product(x)
        if not isinstance(self.operand, MonarchOperand):
            return y.flatten(2)
        if tap is not None:
            tap("mid_hidden", y)
        second = self._second
        if second is None:
            assert callable(self.mid_grid)
            second = _BlockProduct(self.operand.second, self.mid_grid(y))
        mid = y.flatten(2).unflatten(-1, (-1, second.blocks)).transpose(-1, -2)  # [rows, 1 or gates, blocks, in]
        return second(mid).transpose(-1, -2).flatten(2)

    def first_product(self, x: Tensor) -> Tensor:
        """``x`` ``[rows, in_features]`` times the first block-diagonal factor, ``[rows, 1 or gates, blocks, rank]``."""
        assert self._first is not None
        return self._first(x.unflatten(-1, (1, self._first.blocks, -1)))
