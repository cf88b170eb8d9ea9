"""Gradients of a two-factor operand's weights: batched products over all rows of a finished scan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....operands import BlockDiagonalOperand, Factor
from ...product import OperandProduct
from ...spec import ScanSpec, is_integer


class MidValues(NamedTuple):
    """Attributes:
    values: between the factors as the second one reads them, ``[R, g, H]`` fp32; g is 1 or 3.
    passes: where their grid lets gradients through, ``[R, H]`` uint8 with bit i for the i-th of g; None without a grid.
    """

    values: Tensor
    passes: Tensor | None


def mid_values(spec: ScanSpec, before: Tensor) -> MidValues:
    """The mid values of the states ``before`` ``[R, H]`` fp32."""
    first = spec.operand.factors["first"]
    if not first.is_quantized:
        first = Factor(first.values.float())
    values, grid = OperandProduct(BlockDiagonalOperand(first), spec.grids.h)(before), spec.grids.mid
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
    return MidValues(values.clamp_(low, high).mul_(scale), passes)


def _of_values(factor: Factor, gradient: Tensor, integer: bool) -> Tensor:
    """The gradient of a factor's values from that of the weights they stand for."""
    if not integer and factor.scale is None:
        return gradient
    assert factor.scale is not None
    return (gradient.unflatten(-1, (factor.groups, -1)) * factor.scale.unsqueeze(-1)).flatten(-2)


def weight_gradients(
    spec: ScanSpec, before: Tensor, mid: MidValues, dmid: Tensor, dgi: Tensor, dgh_n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of first, second and bias, ``[g, k, q, p]``, ``[3, l, s, r]`` and ``[3, H]``, in fp32.

    Args:
        before: states before each step, ``[R, H]`` fp32.
        dmid: gradients of the mid values, ``[R, g, H]`` fp32, zero where ``mid.passes`` says so.
        dgi: gradients of the pre-activations of r, z and n, ``[R, 3, H]``; the hidden product's r and z have the same.
        dgh_n: that of the hidden product's n, ``[R, H]``.
    """
    first, second = spec.operand.factors["first"], spec.operand.factors["second"]
    gates, blocks, out, size = first.values.shape
    _, count, width, rank = second.values.shape
    rows = before.shape[0]

    h = before if spec.grids.h is None else spec.grids.h.round_trip(before)
    h = h.view(rows, blocks, size).transpose(0, 1)
    dmid = dmid.view(rows, gates, blocks, out)
    dfirst = torch.stack([torch.bmm(dmid[:, g].permute(1, 2, 0), h) for g in range(gates)])

    # Blocks of the second factor take every `count`-th channel: bring each block's together, then multiply.
    dgh = dgi.new_empty((count, rows, 3, width), dtype=torch.float32)
    dgh[:, :, :2] = dgi[:, :2].view(rows, 2, width, count).permute(3, 0, 1, 2)
    dgh[:, :, 2] = dgh_n.view(rows, width, count).permute(2, 0, 1)
    values = mid.values.view(rows, gates, rank, count).permute(1, 3, 0, 2).contiguous()
    if gates == 1:
        dsecond = torch.bmm(dgh.flatten(2).transpose(1, 2), values[0])
        dsecond = dsecond.view(count, 3, width, rank).transpose(0, 1)
    else:
        dsecond = torch.stack([torch.bmm(dgh[:, :, g].transpose(1, 2), values[g]) for g in range(3)])
    dbias = dgh.sum(1).permute(1, 2, 0).flatten(1)
    return (
        _of_values(first, dfirst, is_integer(first, spec.grids.h)),
        _of_values(second, dsecond, is_integer(second, spec.grids.mid)).contiguous(),
        dbias,
    )
