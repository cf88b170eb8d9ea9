"""Weights of a diagonal operand as its kernels read them: tensors as they are, so that preparing them launches nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...spec import ScanSpec, grid_size, pack_gates_grid, pack_grid
from ..exchange_plan import power_of_two
from ..math import SIGMOID_FACTOR, TANH_FACTOR, code_product


class DiagonalWeights(NamedTuple):
    """Attributes:
    values, scale: of the factor: ``[3, H]``, floats or codes of any dtype, and ``[1 or 3, 1 or groups]`` fp32 or None.
    bias: ``[3, H]`` of any float dtype, or None.
    h_grid, state_grid, gates_grid: packed, or None.
    quantized: whether gates are the portable ones.
    """

    values: Tensor
    scale: Tensor | None
    bias: Tensor | None
    h_grid: Tensor | None
    state_grid: Tensor | None
    gates_grid: Tensor | None
    quantized: bool

    @property
    def static(self) -> tuple[Tensor | None, ...]:
        """The tensors that both kernels take, in their order."""
        return self.values, self.scale, self.bias, self.h_grid, self.state_grid, self.gates_grid

    def tiling(self, block: int, unroll: int, stages: int, steps: int, reverse: bool, portable: bool) -> dict[str, Any]:
        """The constexprs that both kernels share, in their order."""
        hidden = self.values.shape[1]
        return {
            "H": hidden,
            "SCALES": (1, 1) if self.scale is None else tuple(self.scale.shape),
            "INTEGER": self.scale is not None and self.h_grid is not None,
            "STATE_N": grid_size(self.state_grid),
            "GATES_SHAPE": None if self.gates_grid is None else tuple(self.gates_grid.shape[1:]),
            "BLOCK": min(block, power_of_two(hidden)),
            "UNROLL": unroll,
            "STAGES": stages,
            "EVEN_STEPS": steps % unroll == 0,
            "REVERSE": reverse,
            "PORTABLE": portable,
        }


def prepare(spec: ScanSpec) -> DiagonalWeights:
    """Once for each set of weights."""
    (factor,) = spec.operand.factors.values()
    return DiagonalWeights(
        factor.values.contiguous(),
        None if factor.scale is None else factor.scale.contiguous(),
        None if spec.bias is None else spec.bias.contiguous(),
        pack_grid(spec.grids.h),
        pack_grid(spec.grids.state),
        pack_gates_grid(spec.grids.gates),
        spec.quantized,
    )


@triton.jit
def load_values(values, gate: tl.constexpr, c, inside, H: tl.constexpr):
    """A gate's weights or codes of the channels ``c``."""
    return tl.load(values + gate * H + c, mask=inside, other=0).to(tl.float32)


@triton.jit
def load_scale(scale, gate: tl.constexpr, c, inside, H: tl.constexpr, SCALES: tl.constexpr):
    """By what they are multiplied; 1 for float weights."""
    if scale is None:
        return 1.0
    else:
        at = scale + (gate % SCALES[0]) * SCALES[1]
        if SCALES[1] == 1:
            return tl.load(at)
        else:
            return tl.load(at + c // (H // SCALES[1]), mask=inside, other=0.0)


@triton.jit
def load_gate(
    values, scale, bias, h_grid, gate: tl.constexpr, c, inside,
    H: tl.constexpr, SCALES: tl.constexpr, INTEGER: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Weight, scale of an integer product, and bias, as :func:`hidden_product` takes them; prescaled unless PORTABLE."""
    weight = load_values(values, gate, c, inside, H)
    unit = load_scale(scale, gate, c, inside, H, SCALES)
    if INTEGER:
        unit = tl.load(h_grid) * unit
    elif scale is not None:
        weight = weight * unit
    offset = tl.zeros_like(weight)
    if bias is not None:
        offset = tl.load(bias + gate * H + c, mask=inside, other=0.0).to(tl.float32)
    if not PORTABLE:
        FACTOR: tl.constexpr = TANH_FACTOR if gate == 2 else SIGMOID_FACTOR
        offset = offset * FACTOR
        if INTEGER:
            unit = unit * FACTOR
        else:
            weight = weight * FACTOR
    return weight, unit, offset


@triton.jit
def hidden_product(h, gate, INTEGER: tl.constexpr):
    """One gate's product of h, or INTEGER of its shifted codes, plus bias."""
    if INTEGER:
        return code_product(h, gate[0]) * gate[1] + gate[2]
    else:
        return h * gate[0] + gate[2]
