"""Hopper kernels for block-diagonal operands: one program walks all steps of one block for a few rows of the batch."""

from __future__ import annotations

from ...inputs import ScanInputs
from ...triton.device import DeviceFacts
from ..device import refuses_hopper
from ..products import refuses_products

SAVES_GATES = True
#: Half-precision gates are kept as ``[T, B, H, 4]``, as in the portable tier, whose backward kernel can read them.
PACKS_GATES = True
SUMS_WEIGHTS = True

#: Steps whose inputs are on their way to a program; even.
STAGES = 8
#: Largest block whose weights fit a program's registers.
LARGEST = 128
#: Registers of a thread at most: one program runs on a processor, so that sparing them gains nothing, and makes products wait.
REGISTERS = 255
#: Elements that 16 bytes hold at most: copies of a row of a block go in such pieces.
_PIECE = 8


def rows_of_tile(blocks: int, rows: int, processors: int) -> int:
    """Rows of the batch that a program takes: 4 for the shortest step, 8 where that makes programs wait for a processor."""
    return 4 if blocks * -(-rows // 4) <= processors else 8


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None if they can."""
    if (reason := refuses_hopper(facts)) is not None:
        return reason
    (factor,) = inputs.operand.factors.values()
    size = factor.values.shape[-1]
    if size > LARGEST or size % _PIECE != 0:
        return f"blocks must be of at most {LARGEST} channels, in multiples of {_PIECE}, and are of {size}"
    return refuses_products(inputs)
