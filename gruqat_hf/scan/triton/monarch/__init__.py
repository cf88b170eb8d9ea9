"""Two-factor operands, spread over programs that exchange the state after every step, with weights on chip where they fit."""

from __future__ import annotations

from ...inputs import ScanInputs
from ...spec import ScanSpec, sums_floats
from ..device import DeviceFacts
from ..precision import spec_of
from .layout import layout_of

SAVES_GATES = True
SUMS_WEIGHTS = True
PACKS_GATES = True

#: Channels of a program beyond which its tiles do not fit.
_MOST_POSITIONS = 128
_EXACT_LIMIT = 1 << 24


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
