"""Weights of a block-diagonal operand as its kernels read them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import ScanSpec, is_integer, pack_gates_grid, pack_grid, sums_floats
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
    """Once for each set of weights; streamed ones where a block does not fit a program, a product has one side in float, or
    pre-activations have a grid."""
    (factor,) = spec.operand.factors.values()
    scale, grids = product_scale(spec), spec.grids
    values = factor.values if scale is not None else factor.dequantize()
    gates, blocks, size, _ = values.shape
    factors = None if spec.quantized else gate_factors(values.device)
    if spec.bias is None:
        bias = torch.zeros((gates, blocks * size), dtype=torch.float32, device=values.device)
    else:
        bias = spec.bias.float().contiguous() if factors is None else spec.bias.float() * factors
    floats = sums_floats(spec.operand, grids, spec.quantized)
    exact = floats or (spec.exact and not spec.quantized)
    dtype = torch.float32 if exact else torch.float16
    precision = fp32_precision(replace(spec, exact=True) if floats else spec)
    h_grid, state_grid, gates_grid = pack_grid(grids.h), pack_grid(grids.state), pack_gates_grid(grids.gates)
    if floats or gates_grid is not None or not is_resident(size, exact, device_facts(values.device)):
        last = streamed.StreamedFactor(streamed.pad_weight(values, dtype, factors), size, size, scale)
        return streamed.StreamedWeights(None, last, bias, h_grid, None, state_grid, gates_grid, precision, spec.quantized)
    weight = streamed.pad_blocks(values, padded_size(size), padded_size(size), dtype, factors)
    return BlockWeights(weight, scale, bias, h_grid, state_grid, size, precision, spec.quantized)


def packed(gates: Tensor | None) -> Tensor | None:
    """Saved gates as kernels take them: fp16 ones four to an int64."""
    return gates.view(-1).view(torch.int64) if gates is not None and gates.dtype == torch.float16 else gates
