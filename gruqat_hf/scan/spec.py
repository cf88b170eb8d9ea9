"""All of a scan but its sequence: weights and grids as kernels take them, and the same as flat tensors for operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..operands import BlockDiagonalOperand, DiagonalOperand, Factor, MonarchOperand, Operand
from ..quantization import Grid
from .inputs import ScanGrids

#: Saved gates are marked where a grid clipped: the pre-activations of r and z by their sign, that of n, without which hn has no
#: gradient, by an infinite hn; the carried state by z = -1. A z beyond this, which 16 bits might not tell from that, needs no
#: mark: the gradient of its pre-activation has the factor z * (1 - z).
MOST_MARKED = 0.99997


class SpecTensors(NamedTuple):
    """A spec as an operator takes it, None for what is absent; grids are ``[4, n]``: scale, 1 / scale, lowest, highest code; that
    of the pre-activations ``[4, 1 or 3, 1 or H]``."""

    first: Tensor
    first_scale: Tensor | None
    second: Tensor | None
    second_scale: Tensor | None
    bias: Tensor | None
    h_grid: Tensor | None
    mid_grid: Tensor | None
    state_grid: Tensor | None
    gates_grid: Tensor | None = None


@dataclass(frozen=True)
class ScanSpec:
    """All of a scan but its sequence.

    Attributes:
        operand: hidden weights.
        bias: ``[3, H]`` or None.
        grids: of the points inside the scan.
        quantized: whether gates are the portable ones.
        exact: whether a float product must be accurate to fp32 (``torch.get_float32_matmul_precision() == "highest"``).
    """

    operand: Operand
    bias: Tensor | None
    grids: ScanGrids
    quantized: bool
    exact: bool

    @property
    def hidden_size(self) -> int:
        return self.operand.out_features

    @property
    def gates_dtype(self) -> torch.dtype:
        """In which saved gates are kept."""
        return torch.float32 if self.exact else torch.float16


def is_integer(factor: Factor, grid: Grid | None) -> bool:
    """Whether a factor's product is one of integer codes, which is then scaled."""
    return factor.is_quantized and grid is not None


def sums_floats(operand: Operand, grids: ScanGrids, quantized: bool) -> bool:
    """Whether a quantized scan has a product over values of which one side was left in float: its sums are fp32, in any order."""
    if not quantized or isinstance(operand, DiagonalOperand):
        return False
    return not all(is_integer(factor, grid) for factor, grid in zip(operand.factors.values(), (grids.h, grids.mid)))


def pack_grid(grid: Grid | None) -> Tensor | None:
    """A grid as ``[4, n]``: scale, inv_scale, low, high; differentiable in the first two."""
    if grid is None or grid.packed is not None:
        return None if grid is None else grid.packed
    scale = grid.scale.reshape(-1)
    low, high = (
        bound.reshape(-1) if isinstance(bound, Tensor) else torch.full_like(scale, bound, requires_grad=False)
        for bound in (grid.low, grid.high)
    )
    return torch.stack([scale, grid.inv_scale.reshape(-1), low, high])


def pack_gates_grid(grid: Grid | None) -> Tensor | None:
    """The grid of the pre-activations as ``[4, 1 or 3, 1 or H]``."""
    packed = pack_grid(grid)
    return None if grid is None or packed is None else packed.view(4, *grid.scale.shape)


def unpack_grid(packed: Tensor | None, magnitude: int, shape: tuple[int, ...] = (-1,)) -> Grid | None:
    """The grid of a packed one, its scale in ``shape``."""
    if packed is None:
        return None
    scale, inv_scale, low, high = packed.reshape(4, *shape).unbind(0)
    return Grid(scale, inv_scale, low, high, magnitude, packed)


def flatten(spec: ScanSpec) -> tuple[SpecTensors, list[int]]:
    """The spec's tensors, and its limits: qmax of both factors, largest codes of h and mid."""
    first, *rest = spec.operand.factors.values()
    second = rest[0] if rest else None
    grids = spec.grids
    tensors = SpecTensors(
        first.values,
        first.scale,
        None if second is None else second.values,
        None if second is None else second.scale,
        spec.bias,
        pack_grid(grids.h),
        pack_grid(grids.mid),
        pack_grid(grids.state),
        pack_gates_grid(grids.gates),
    )
    magnitudes = [0 if grid is None else grid.magnitude for grid in (grids.h, grids.mid)]
    return tensors, [first.qmax, 0 if second is None else second.qmax, *magnitudes]


def restore(tensors: SpecTensors, limits: list[int], quantized: bool, exact: bool) -> ScanSpec:
    """The spec that was flattened."""
    first = Factor(tensors.first, tensors.first_scale, limits[0])
    operand: Operand
    if tensors.second is not None:
        operand = MonarchOperand(first, Factor(tensors.second, tensors.second_scale, limits[1]))
    elif tensors.first.dim() == 2:
        operand = DiagonalOperand(first)
    else:
        operand = BlockDiagonalOperand(first)
    grids = ScanGrids(
        h=unpack_grid(tensors.h_grid, limits[2]),
        mid=unpack_grid(tensors.mid_grid, limits[3], (-1, 1, 1)),
        gates=None if tensors.gates_grid is None else unpack_grid(tensors.gates_grid, 0, tuple(tensors.gates_grid.shape[1:])),
        state=unpack_grid(tensors.state_grid, 0),
    )
    return ScanSpec(operand, tensors.bias, grids, quantized, exact)


def grid_size(packed: Tensor | None) -> int:
    """How many scales a packed grid has; 1 for none."""
    return 1 if packed is None else packed.shape[1]
