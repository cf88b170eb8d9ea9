"""Few large blocks, each spread over many programs that exchange the state after every step."""

from __future__ import annotations

from ...inputs import ScanInputs
from ..device import DeviceFacts
from ..precision import spec_of
from .layout import layout_of

#: Blocks that one program computes as fast by itself.
_SMALL = 128

SAVES_GATES = True
SUMS_WEIGHTS = False
PACKS_GATES = True


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None."""
    factor = inputs.operand.factors["blocks"]
    _, blocks, size, columns = factor.values.shape
    if size <= _SMALL:
        return f"blocks of up to {_SMALL} fit one program"
    if columns != size:
        return f"dense kernels take square blocks, not {size} x {columns}"
    for groups in {1, factor.groups}:
        if layout_of(size, groups).launch(inputs.gi.shape[1], blocks, facts, 4, spec_of(inputs).exact) is None:
            return f"{blocks} blocks of {size} need more programs at once, or more shared memory, than the GPU has"
    return None
