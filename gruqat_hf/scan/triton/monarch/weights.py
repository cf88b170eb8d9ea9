"""What the backward pass computes over all rows at once: mid values before its scan, gradients of weights after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....operands import BlockDiagonalOperand, Factor
from ....quantization import Grid
from ...product import OperandProduct
from ...replay import before_steps
from ...spec import ScanSpec, is_integer, pack_grid
from ..precision import fp32_precision
from . import is_exact
from .blocks import by_block
from .mid_product import multiply
from .weight_gradient import OuterProduct, sum_products


class Orders(NamedTuple):
    """For which number of programs channels are in exchange order, see ``blocks.py``; 1 for natural order.

    Attributes:
        states: of the states and h0.
        mid: of mid values, their passes and their gradients.
        gates: of the gates' gradients.
    """

    states: int = 1
    mid: int = 1
    gates: int = 1


_NATURAL = Orders()


class MidValues(NamedTuple):
    """Attributes:
    values: between the factors as the second one reads them, ``[R, g, H]``; g is 1 or 3. Codes where that product is one of
        integers, else fp32; None if not wanted.
    passes: where their grid lets gradients through, ``[R, H]`` uint8 with bit i for the i-th of g; None without a grid.
    """

    values: Tensor | None
    passes: Tensor | None


def mid_values(
    spec: ScanSpec, states: Tensor, h0: Tensor, reverse: bool, want_values: bool = True, orders: Orders = _NATURAL
) -> MidValues:
    """The mid values of every step of a finished scan, from its states ``[T, B, H]`` and ``h0`` ``[B, H]``."""
    first, second, grids = spec.operand.factors["first"], spec.operand.factors["second"], spec.grids
    as_codes = is_integer(second, grids.mid)
    if is_exact(first, grids.h) or not spec.quantized:
        values, passes = multiply(
            first,
            grids.h,
            states.flatten(0, 1),
            fp32_precision(spec),
            h0=h0.to(states.dtype),
            reverse=reverse,
            mid_grid=grids.mid,
            as_codes=as_codes,
            want_values=want_values,
            programs=orders[:2],
        )
        return MidValues(values, passes)
    assert orders == _NATURAL
    return _general(spec, before_steps(states, h0, reverse).flatten(0, 1).float(), as_codes)


def _general(spec: ScanSpec, before: Tensor, as_codes: bool) -> MidValues:
    """The same for any product, of states ``[R, H]``: for sums beyond fp32, or of values of which one side is float."""
    first, grid = spec.operand.factors["first"], spec.grids.mid
    if not first.is_quantized:
        first = Factor(first.values.float())
    values = OperandProduct(BlockDiagonalOperand(first), spec.grids.h)(before)
    if grid is None:
        return MidValues(values, None)
    scale, inv_scale, low, high = (
        bound.reshape(1, -1, 1) if isinstance(bound, Tensor) else bound
        for bound in (grid.scale, grid.inv_scale, grid.low, grid.high)
    )
    values = values.mul_(inv_scale).round_()
    inside = ((values >= low) & (values <= high)).view(torch.uint8)
    passes = inside[:, 0]
    for gate in range(1, inside.shape[1]):
        passes = passes | (inside[:, gate] << gate)
    values = values.clamp_(low, high)
    return MidValues(values if as_codes else values.mul_(scale), passes)


def weight_gradients(
    spec: ScanSpec,
    states: Tensor,
    h0: Tensor,
    reverse: bool,
    mid: MidValues,
    dmid: Tensor,
    dgi: Tensor,
    dgh_n: Tensor,
    orders: Orders = _NATURAL,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of first, second and bias, ``[g, k, q, p]``, ``[3, l, s, r]`` and ``[3, H]``, in fp32.

    Args:
        states, h0: of the scan, ``[T, B, H]`` and ``[B, H]``.
        dmid: gradients of the mid values, ``[T, B, g, H]`` fp32, zero where ``mid.passes`` says so.
        dgi: gradients of the pre-activations of r, z and n, ``[T, B, 3, H]``; the hidden product's r and z have the same.
        dgh_n: that of the hidden product's n, ``[T, B, H]``.
    """
    first, second, grids = spec.operand.factors["first"], spec.operand.factors["second"], spec.grids
    assert mid.values is not None
    blocks, count = first.values.shape[1], second.values.shape[1]
    of_first = OuterProduct(
        left=by_block(dmid.flatten(0, 1), blocks, False, orders.mid),
        right=by_block(states.flatten(0, 1).unsqueeze(1), blocks, False, orders.states),
        initial=h0.to(states.dtype),
        reverse=reverse,
        grid=pack_grid(grids.h),
        integer=is_integer(first, grids.h),
    )
    of_second = OuterProduct(
        left=by_block(dgi.flatten(0, 1)[:, :2], count, True, orders.gates),
        right=by_block(mid.values, count, True, orders.mid),
        last=dgh_n.flatten(0, 1),
        column_sums=True,
    )
    (dfirst, _), (dsecond, dbias) = sum_products((of_first, of_second), fp32_precision(spec))
    assert dbias is not None
    return _of_values(first, dfirst, grids.h), _of_values(second, dsecond, grids.mid), dbias


def _of_values(factor: Factor, gradient: Tensor, grid: Grid | None) -> Tensor:
    """The gradient of a factor's values from the product with codes or values of its input."""
    if factor.scale is None:
        return gradient
    scale = factor.scale
    if is_integer(factor, grid):
        assert grid is not None
        scale = grid.scale.reshape(-1, 1, 1, 1) * scale
    return (gradient.unflatten(-1, (factor.groups, -1)) * scale.unsqueeze(-1)).flatten(-2)
