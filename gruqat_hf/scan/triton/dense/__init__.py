"""Few large blocks, each spread over many programs that exchange the state after every step."""

from __future__ import annotations

from ...inputs import ScanInputs
from ...spec import sums_floats
from ..device import DeviceFacts
from ..precision import spec_of
from .layout import layout_of

#: Blocks that one program computes as fast by itself.
_SMALL = 128
#: Block beyond which products accurate to fp32 do not fit the registers.
_MOST_EXACT = 1024
#: Groups of weights beyond which a step, which has them one after the other, would take too long to compile.
_MOST_GROUPS = 16

SAVES_GATES = True
SUMS_WEIGHTS = False
SUMS_BIAS = False
PACKS_GATES = True


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None."""
    factor = inputs.operand.factors["blocks"]
    _, blocks, size, columns = factor.values.shape
    if sums_floats(inputs.operand, inputs.grids, inputs.quantized):
        return "a product has one side in float"
    if size <= _SMALL:
        return f"blocks of up to {_SMALL} fit one program"
    if columns != size:
        return f"dense kernels take square blocks, not {size} x {columns}"
    if factor.groups > _MOST_GROUPS:
        return f"dense kernels take up to {_MOST_GROUPS} groups of weights"
    if size > _MOST_EXACT and not inputs.quantized and spec_of(inputs).exact:
        return f"in fp32, dense kernels take blocks of up to {_MOST_EXACT}"
    for groups in {1, factor.groups}:
        if layout_of(size, groups).launch(inputs.gi.shape[1], blocks, facts, 4, spec_of(inputs).exact) is None:
            return f"{blocks} blocks of {size} need more programs at once, or more shared memory, than the GPU has"
    return None
