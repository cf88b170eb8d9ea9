"""Two-factor operands, spread over programs that exchange the state after every step, with weights on chip where they fit."""

from __future__ import annotations

import torch
from torch import Tensor

from ....operands import Factor, MonarchOperand, Operand
from ....quantization import Grid
from ...inputs import ScanInputs
from ...spec import ScanSpec, is_integer, sums_floats
from ..device import DeviceFacts, refuses_device
from ..family import needs_operators
from ..precision import spec_of
from .layout import layout_of

SAVES_GATES = True
SUMS_WEIGHTS = True
PACKS_GATES = True

#: Channels of a program beyond which its tiles do not fit.
_MOST_POSITIONS = 128
#: Integers up to here are exact in fp16, and sums below this in fp32.
_HALF, _EXACT_LIMIT = 1 << 11, 1 << 24


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None. Float factors that do not stay on chip are better multiplied out."""
    first, mid = inputs.operand.factors["first"], inputs.grids.mid
    if mid is not None and mid.scale.numel() > first.values.shape[0]:
        return "the grid of mid has a scale for each gate, but the gates share the first factor"
    return None if inputs.quantized else streams(spec_of(inputs), facts)


def streams(spec: ScanSpec, facts: DeviceFacts) -> str | None:
    """Why weights cannot stay with programs for all steps, so that they must be read anew at each; None if they can."""
    first, second = spec.operand.factors["first"], spec.operand.factors["second"]
    for name, values in (("first", first.values), ("second", second.values)):
        if values.shape[2] != values.shape[3]:
            return f"monarch kernels take square blocks, but those of {name} are {values.shape[2]} x {values.shape[3]}"
    if spec.grids.gates is not None:
        return "gate pre-activations are quantized"
    if sums_floats(spec.operand, spec.grids, spec.quantized):
        return "a product has one side in float"
    if (mid := spec.grids.mid) is not None:
        sums = (
            first.qmax * spec.grids.h.magnitude * first.values.shape[3],
            second.qmax * mid.magnitude * second.values.shape[3],
        )
        if max(sums) >= _EXACT_LIMIT:
            return "integer sums pass 2**24"
    layout = layout_of(tuple(first.values.shape), tuple(second.values.shape))
    if layout.positions > _MOST_POSITIONS:
        return f"blocks of {first.values.shape[3]} and {second.values.shape[3]} make tiles beyond {_MOST_POSITIONS} channels"
    if layout.launch(1, first.values.shape[0], facts, 4, spec.exact) is None:
        return "they need more programs at once, or more shared memory, than the GPU has"
    return None


def is_exact(factor: Factor, grid: Grid | None) -> bool:
    """Whether a factor's product is one of codes that fp16 holds, with sums that fp32 does."""
    if grid is None or not is_integer(factor, grid):
        return False
    sums = factor.qmax * grid.magnitude * factor.values.shape[-1]
    return max(factor.qmax, grid.magnitude) <= _HALF and sums < _EXACT_LIMIT and grid.scale.numel() == 1


def first_product(operand: Operand, grid: Grid | None, rows: Tensor) -> Tensor | None:
    """``rows`` ``[R, in]`` times the first factor of a quantized two-factor operand, ``[R, g, blocks, rank]``, without gradients.
    None where the general product is to be taken."""
    if not isinstance(operand, MonarchOperand) or rows.numel() == 0 or rows.dtype != torch.float32:
        return None
    if refuses_device(rows.device) is not None or needs_operators(rows) or not is_exact(operand.first, grid):
        return None
    from .mid_product import multiply

    values, _ = multiply(operand.first, grid, rows.contiguous(), "tf32")
    assert values is not None
    return values.unflatten(2, operand.first.values.shape[1:3])
