"""Operands, grids and biases as the kernels read them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...operands import BlockDiagonalOperand, DiagonalOperand, Factor, MonarchOperand, Operand
from ...quantization import Grid
from ..inputs import LayerWeights
from .library import (
    BLOCKS,
    DIAGONAL,
    MONARCH,
    TILE,
    AdjointStruct,
    FactorStruct,
    GridStruct,
    LayerStruct,
    Library,
    OperandStruct,
    on_usable_threads,
)

_INT32_LIMIT = 1 << 31


class CannotPackError(ValueError):
    """The kernels have no form for this; the message says why."""


def padded(size: int) -> int:
    """``size`` up to a multiple of TILE."""
    return -(-size // TILE) * TILE


class LayerPack:
    """A layer's weights, repacked, and the struct that points to them.

    Args:
        weights: the layer; its input side is left out where ``scan_only``.

    Raises:
        CannotPackError: the kernels cannot run it.
    """

    @on_usable_threads()
    def __init__(self, library: Library, weights: LayerWeights, scan_only: bool = False) -> None:
        self.library = library
        self._kept: list[Tensor] = []
        hidden = weights.hidden.out_features
        self.struct = LayerStruct(hidden=hidden, padded=padded(hidden))
        self._pitch = padded(hidden)
        grids = weights.grids
        x = weights.x
        if not scan_only and weights.dynamic_x is not None:
            # Any call's grid but for its scale, which is multiplied in at each call.
            x = weights.dynamic_x(torch.zeros(1, weights.input.in_features, device="cpu", dtype=torch.float32))
            if isinstance(x.low, Tensor):
                raise CannotPackError("its input grid is both affine and dynamic")
            x = replace(x, scale=torch.ones_like(x.scale), inv_scale=torch.ones_like(x.scale))
        if not scan_only:
            self.struct.input = self._operand(weights.input, x, weights.mid_input, "input")
            self.struct.bias_input = self.features(weights.bias_input, 3)
        self.struct.recurrent = self._operand(weights.hidden, grids.h, grids.mid, "hidden")
        self.struct.bias_hidden = self.features(weights.bias_hidden, 3)
        self.struct.state_grid = self._grid_arrays(grids.state, (hidden,))
        self.struct.gates_grid = self._grid_arrays(grids.gates, (3, hidden))

    @property
    def input_scales(self) -> Tensor:
        """Scales of the input product's first factor."""
        return next(tensor for tensor in self._kept if tensor.data_ptr() == self.struct.input.first.scales)

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def features(self, values: Tensor | None, gates: int) -> int | None:
        """Address of ``[gates, H]`` as ``[gates, padded]`` and one TILE more, which the last block's vectors may read."""
        if values is None:
            return None
        if values.dtype != torch.float32:
            raise CannotPackError(f"its biases are {values.dtype}")
        flat = pad(values.detach().reshape(gates, -1), (0, self._pitch - values.shape[-1])).flatten()
        return self._keep(pad(flat, (0, TILE)))

    def _grid_arrays(self, grid: Grid | None, shape: tuple[int, ...]) -> int | None:
        """scale, inverse, low, high, each ``[*shape]`` padded."""
        if grid is None:
            return None
        rows = [torch.as_tensor(value, dtype=torch.float32, device="cpu").expand(shape) for value in _parts(grid)]
        return self._keep(pad(torch.stack(rows), (0, self._pitch - shape[-1])))

    def _operand(self, operand: Operand, grid: Grid | None, mid: Grid | None, side: str) -> OperandStruct:
        struct = OperandStruct(in_=operand.in_features, out=operand.out_features)
        if isinstance(operand, BlockDiagonalOperand):
            struct.kind = BLOCKS
            struct.first = self.factor(operand.blocks, grid, 1, side)
        elif isinstance(operand, DiagonalOperand):
            struct.kind = DIAGONAL
            struct.first = self._diagonal(operand.diagonal, grid, side)
        elif isinstance(operand, MonarchOperand):
            struct.kind = MONARCH
            sets = operand.first.values.shape[0]
            struct.first = self.factor(operand.first, grid, 1, side)
            struct.second = self.factor(operand.second, mid, sets, side)
        else:
            raise CannotPackError(f"its {side} operand is a {type(operand).__name__}")
        return struct

    def _diagonal(self, factor: Factor, grid: Grid | None, side: str) -> FactorStruct:
        integer = _is_integer(factor, grid, side)
        values = factor.values.detach().float()
        struct = FactorStruct(integer=integer, sets=1, columns=3, blocks=1, groups=1, out=values.shape[1], in_=values.shape[1])
        struct.weights = self.features(values, 3)
        if integer:
            struct.scales = self.features((grid.scale.reshape(-1, 1) * factor.scale).detach().expand(values.shape), 3)
            struct.grid[0] = grid_struct(grid, 0)
        return struct

    def factor(self, factor: Factor, grid: Grid | None, sets: int, side: str) -> FactorStruct:
        """A factor ``[sets * columns, blocks, out, in]``, each set of which has an input of its own."""
        integer = _is_integer(factor, grid, side)
        values = factor.values.detach()
        gates, blocks, out, width = values.shape
        columns, tiles = gates // sets, padded(out) // TILE
        groups, step = (factor.groups, self.library.pack) if integer else (1, 1)
        steps = -(-(width // groups) // step)
        struct = FactorStruct(integer=integer, sets=sets, columns=columns, blocks=blocks, in_=width, out=out)
        struct.tiles, struct.groups, struct.steps = tiles, groups, steps

        def tiled(tensor: Tensor) -> Tensor:
            """``[gates, blocks, out, groups, n]`` to ``[sets, blocks, tiles, groups, n, columns, TILE]``."""
            tensor = pad(tensor, (0, 0, 0, 0, 0, tiles * TILE - out))
            return tensor.reshape(sets, columns, blocks, tiles, TILE, groups, -1).permute(0, 2, 3, 5, 6, 1, 4)

        if not integer:
            struct.weights = self._keep(tiled(values.unsqueeze(3)))
            return struct
        assert grid is not None and factor.scale is not None
        values = values.reshape(gates, blocks, out, groups, -1)
        scales = (grid.scale.reshape(-1, 1, 1, 1) * factor.scale).detach().expand(gates, blocks, out, groups)
        if values.is_floating_point():
            # A NaN has no integer code; its sum is NaN, whatever it multiplies.
            lost = values.isnan()
            values, scales = values.masked_fill(lost, 0.0), scales.masked_fill(lost.any(-1), torch.nan)
        codes = values.to(torch.int8)
        packed = tiled(pad(codes, (0, steps * step - width // groups)))
        packed = packed.unflatten(4, (steps, step)).movedim(5, -1)
        struct.weights = self._keep(packed.to(self.library.weight_dtype))
        low = torch.as_tensor(grid.low, dtype=torch.float32, device="cpu").reshape(-1, 1, 1, 1, 1).to(torch.int32)
        struct.offsets = self._keep(tiled(low * codes.sum(-1, keepdim=True, dtype=torch.int32)))
        struct.scales = self._keep(tiled(scales.unsqueeze(-1)))
        for number in range(sets):
            struct.grid[number] = grid_struct(grid, number)
        return struct


def _parts(grid: Grid) -> tuple[Tensor, Tensor, int | Tensor, int | Tensor]:
    return grid.scale.detach(), grid.inv_scale.detach(), grid.low, grid.high


def grid_struct(grid: Grid, number: int) -> GridStruct:
    """The grid of one set; a grid that is shared has one scale."""
    values = (torch.as_tensor(part, dtype=torch.float32, device="cpu").reshape(-1) for part in _parts(grid))
    return GridStruct(*(float(value[number if value.numel() > 1 else 0]) for value in values))


def _is_integer(factor: Factor, grid: Grid | None, side: str) -> bool:
    """Whether the product is one of integers; False if all is float."""
    values = factor.values
    if factor.is_quantized != (grid is not None):
        which = "weights, but not what they multiply" if factor.is_quantized else "what the weights multiply, but not the weights"
        raise CannotPackError(f"its {side} product quantizes {which}")
    if grid is None:
        if values.dtype != torch.float32:
            raise CannotPackError(f"its {side} weights are {values.dtype}")
        return False
    if grid.magnitude > 255 or factor.qmax > 127:
        raise CannotPackError(f"its {side} product has codes of more than 8 bits")
    if factor.qmax * grid.magnitude * values.shape[-1] >= _INT32_LIMIT:
        raise CannotPackError(f"its {side} sums do not fit into 32 bits")
    return True


def check_operand(operand: Operand, grid: Grid | None, mid: Grid | None, side: str) -> None:
    """Refuse an operand that cannot be packed, by its form alone.

    Raises:
        CannotPackError: saying why.
    """
    if isinstance(operand, MonarchOperand):
        _is_integer(operand.first, grid, side)
        _is_integer(operand.second, mid, side)
    elif isinstance(operand, (BlockDiagonalOperand, DiagonalOperand)):
        _is_integer(next(iter(operand.factors.values())), grid, side)
    else:
        raise CannotPackError(f"its {side} operand is a {type(operand).__name__}")


class AdjointPack:
    """What the backward pass multiplies by: a packed layer's hidden operand transposed, in float."""

    @on_usable_threads()
    def __init__(self, pack: LayerPack, operand: Operand, grid: Grid | None, mid: Grid | None) -> None:
        self.struct = AdjointStruct()
        transposed = self.struct.transposed
        if isinstance(operand, DiagonalOperand):
            transposed.first.weights = pack.features(_rescaled(operand.diagonal, grid), 3)
        elif isinstance(operand, BlockDiagonalOperand):
            transposed.first = pack.factor(Factor(_joined(_rescaled(operand.blocks, grid))), None, 1, "hidden")
        elif isinstance(operand, MonarchOperand):
            second = _rescaled(operand.second, mid)
            sets = operand.first.values.shape[0]
            undo_second = _joined(second) if sets == 1 else second.transpose(-1, -2)
            transposed.first = pack.factor(Factor(undo_second), None, sets, "hidden")
            transposed.second = pack.factor(Factor(_joined(_rescaled(operand.first, grid))), None, 1, "hidden")
        self._pack = pack


def _joined(weights: Tensor) -> Tensor:
    """``[gates, blocks, out, in]`` transposed, the gates' outputs joined: ``[1, blocks, in, gates * out]``."""
    return weights.permute(1, 3, 0, 2).flatten(2).unsqueeze(0)


def _rescaled(factor: Factor, grid: Grid | None) -> Tensor:
    """The float weights, times what passing its input's grid and back does to a gradient."""
    values = factor.dequantize().detach()
    if grid is None:
        return values
    return values * (grid.scale * grid.inv_scale).detach().reshape(-1, *(1,) * (values.dim() - 1))
