"""Weights of a two-factor operand as the cluster kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import ScanSpec, pack_grid
from ...triton.math import gate_factors
from ...triton.monarch.backward import Prepared as PortableWeights
from ...triton.monarch.backward import prepare as portable_weights
from .layout import pack_first, pack_first_back, pack_second, pack_second_back, programs_of


class MonarchWeights(NamedTuple):
    """Attributes:
    first, second: ``[g, C, BLOCK, BLOCK]`` and ``[3, C, BLOCK, BLOCK]`` fp16, see :mod:`.layout`: codes, or weights,
        of the second factor prescaled.
    first_scale, second_scale: of integer products, ``[g, H]`` and ``[3, H]``, or None.
    bias: ``[3, H]``, prescaled in the float state.
    h_grid, mid_grid, state_grid: packed, or None.
    quantized: whether gates are the portable ones.
    """

    first: Tensor
    second: Tensor
    first_scale: Tensor | None
    second_scale: Tensor | None
    bias: Tensor
    h_grid: Tensor | None
    mid_grid: Tensor | None
    state_grid: Tensor | None
    quantized: bool


def forward_weights(spec: ScanSpec) -> MonarchWeights:
    """Once for each set of weights."""
    first, second = spec.operand.factors["first"], spec.operand.factors["second"]
    grids, values = spec.grids, [first.values, second.values]
    programs = programs_of(tuple(first.values.shape), tuple(second.values.shape))
    assert programs is not None
    bias = torch.zeros(3, spec.hidden_size, device=first.values.device) if spec.bias is None else spec.bias.float()
    first_scale = second_scale = None
    if spec.quantized:
        assert grids.h is not None and grids.mid is not None and first.scale is not None and second.scale is not None
        first_scale = (grids.h.scale * first.scale).expand(*first.values.shape[:3], 1).flatten(1).contiguous()
        second_scale = (grids.mid.scale.reshape(-1, 1, 1, 1) * second.scale).expand(*second.values.shape[:3], 1)
        second_scale = second_scale.transpose(1, 2).flatten(1).contiguous()
    else:
        factors = gate_factors(bias.device)
        values[1] = values[1].float() * factors[..., None, None]
        bias = bias * factors
    return MonarchWeights(
        pack_first(values[0].to(torch.float16), programs),
        pack_second(values[1].to(torch.float16), programs),
        first_scale,
        second_scale,
        bias.contiguous(),
        pack_grid(grids.h),
        pack_grid(grids.mid),
        pack_grid(grids.state),
        spec.quantized,
    )


class BackwardWeights(NamedTuple):
    """Attributes:
    first, second: ``[g, C, BLOCK, BLOCK]`` and ``[3, C, BLOCK, BLOCK]`` fp16, see :mod:`.layout`.
    h_grid: packed, or None.
    portable: the weights of the portable kernels, which serve products as exact as fp32; None where they are not wanted.
    """

    spec: ScanSpec
    first: Tensor | None
    second: Tensor | None
    h_grid: Tensor | None
    portable: PortableWeights | None


def backward_weights(spec: ScanSpec) -> BackwardWeights:
    """Once for each set of weights."""
    if spec.exact:
        return BackwardWeights(spec, None, None, None, portable_weights(spec))
    first, second = (spec.operand.factors[name].dequantize().to(torch.float16) for name in ("first", "second"))
    programs = programs_of(tuple(first.shape), tuple(second.shape))
    assert programs is not None
    tiles = pack_first_back(first, programs), pack_second_back(second, programs)
    return BackwardWeights(spec, *tiles, pack_grid(spec.grids.h), None)
