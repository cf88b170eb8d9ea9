"""Weights of a diagonal operand as its kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...spec import ScanSpec, grid_size, is_integer, pack_grid
from ..math import gate_factors


class DiagonalWeights(NamedTuple):
    """Attributes:
    weight: ``[3, H]`` fp32: codes where the product is one of integers; float otherwise, prescaled in the float state.
    scale: of an integer product, ``[3, H]``, or None.
    bias: ``[3, H]``, prescaled in the float state.
    h_grid, state_grid: packed, or None.
    quantized: whether gates are the portable ones.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor
    h_grid: Tensor | None
    state_grid: Tensor | None
    quantized: bool

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def tiling(self, block: int, unroll: int, stages: int, steps: int, reverse: bool) -> dict[str, Any]:
        """The constexprs that both kernels share, in their order."""
        hidden = self.hidden_size
        return {
            "H": hidden,
            "STATE_N": grid_size(self.state_grid),
            "BLOCK": min(block, triton.next_power_of_2(hidden)),
            "UNROLL": unroll,
            "STAGES": stages,
            "EVEN_STEPS": steps % unroll == 0,
            "REVERSE": reverse,
            "PORTABLE": self.quantized,
        }


def prepare(spec: ScanSpec) -> DiagonalWeights:
    """Once for each set of weights."""
    (factor,) = spec.operand.factors.values()
    grid = spec.grids.h
    scale = None
    if is_integer(factor, grid):
        weight = factor.values.float()
        scale = (grid.scale.reshape(-1, 1) * factor.scale).expand_as(weight).contiguous()
    else:
        weight = factor.dequantize().float()
    bias = torch.zeros_like(weight) if spec.bias is None else spec.bias.float()
    if not spec.quantized:
        factors = gate_factors(weight.device)
        weight, bias = weight * factors, bias * factors
    return DiagonalWeights(
        weight.contiguous(), scale, bias.contiguous(), pack_grid(grid), pack_grid(spec.grids.state), spec.quantized
    )
