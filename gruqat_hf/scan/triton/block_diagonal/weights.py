"""Weights of a block-diagonal operand as its kernels read them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...spec import ScanSpec, is_integer, pack_grid, sums_floats
from .. import streamed
from ..device import device_facts
from ..math import gate_factors
from ..precision import fp32_precision
from . import is_resident, padded_size


class BlockWeights(NamedTuple):
    """Attributes:
    weight: ``[3, nblocks, BLOCK, BLOCK]`` (out, in), zero beyond the block's own size. Codes in fp16 where quantized; in the
        float state prescaled, in fp32 where its accuracy is wanted and fp16 otherwise.
    scale: of an integer product, ``[groups, 3, H]``, or None.
    bias: ``[3, H]``, prescaled in the float state.
    h_grid, state_grid: packed, or None.
    size: of a block.
    precision: of fp32 dots.
    quantized: whether gates are the portable ones.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor
    h_grid: Tensor | None
    state_grid: Tensor | None
    size: int
    precision: str
    quantized: bool

    @property
    def padded(self) -> int:
        return self.weight.shape[-1]

    @property
    def blocks(self) -> int:
        return self.weight.shape[1]


def product_scale(spec: ScanSpec) -> Tensor | None:
    """``s_h * s_w`` of an integer product, ``[groups, 3, H]``; None where the product is one of floats."""
    (factor,) = spec.operand.factors.values()
    grid = spec.grids.h
    if not is_integer(factor, grid):
        return None
    scale = grid.scale.reshape(-1, 1, 1, 1) * factor.scale
    scale = scale.expand(*factor.values.shape[:3], -1)
    return scale.permute(3, 0, 1, 2).reshape(scale.shape[-1], scale.shape[0], -1).contiguous()


def prepare(spec: ScanSpec) -> BlockWeights | streamed.StreamedWeights:
    """Once for each set of weights; streamed ones where a block does not fit a program, or a product has one side in float."""
    (factor,) = spec.operand.factors.values()
    scale = product_scale(spec)
    weight = (factor.values if scale is not None else factor.dequantize()).float()
    gates, blocks, size, _ = weight.shape
    bias = weight.new_zeros(gates, blocks * size) if spec.bias is None else spec.bias.float()
    if not spec.quantized:
        factors = gate_factors(weight.device)
        weight, bias = weight * factors[..., None, None], bias * factors
    floats = sums_floats(spec.operand, spec.grids, spec.quantized)
    if (not spec.exact or spec.quantized) and not floats:
        weight = weight.to(torch.float16)
    grids = pack_grid(spec.grids.h), pack_grid(spec.grids.state)
    precision = fp32_precision(replace(spec, exact=True) if floats else spec)
    if floats or not is_resident(size, weight.dtype == torch.float32, device_facts(weight.device)):
        factor = streamed.StreamedFactor(streamed.pad_weight(weight), size, size, scale)
        return streamed.StreamedWeights(None, factor, bias.contiguous(), grids[0], None, grids[1], precision, spec.quantized)
    extra = padded_size(size) - size
    weight = pad(weight, (0, extra, 0, extra)).contiguous()
    return BlockWeights(weight, scale, bias.contiguous(), *grids, size, precision, spec.quantized)


def packed(gates: Tensor | None) -> Tensor | None:
    """Saved gates as kernels take them: fp16 ones four to an int64."""
    return gates.view(-1).view(torch.int64) if gates is not None and gates.dtype == torch.float16 else gates
