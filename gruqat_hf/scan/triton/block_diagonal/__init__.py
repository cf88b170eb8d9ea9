"""Kernels for block-diagonal operands: one program walks all steps of one block for a few rows of the batch."""

from __future__ import annotations

from ...inputs import ScanInputs
from ..device import DeviceFacts
from ..exchange_plan import held_bytes

SAVES_GATES = True
#: Half-precision gates are kept as ``[T, B, H, 4]``.
PACKS_GATES = True
SUMS_WEIGHTS = True


#: Rows of the batch in a program's tile.
ROWS = 4
#: Steps unrolled and pipeline stages, best first.
_TILINGS = ((4, 4), (2, 4), (1, 4), (1, 2))
#: What the backward kernel's loads amount to in unrolled steps of the forward kernel's.
BACKWARD_UNROLL = 2


def padded_size(size: int) -> int:
    """The size of the tile that holds a block: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def _shared_bytes(size: int, exact: bool, unroll: int, stages: int, facts: DeviceFacts) -> int:
    """Shared memory of a program: three gates' weights (fp16, or fp32 in two parts), inputs on their way, some for reordering."""
    padded = padded_size(size)
    return 3 * padded**2 * (8 if exact else held_bytes(2, facts)) + 12 * padded * ROWS * unroll * (stages - 1) + 4096


def tiling(size: int, exact: bool, masked: bool, facts: DeviceFacts) -> tuple[int, int] | None:
    """Steps to unroll and pipeline stages of the forward kernel; None where a block of ``size`` does not fit one program.

    With a mask, the compiler would keep the weights once for every unrolled step.
    """
    for unroll, stages in _TILINGS:
        if unroll > (1 if masked else 2 if padded_size(size) > 64 else 4):
            continue
        if _shared_bytes(size, exact, unroll, stages, facts) <= facts.shared_bytes:
            return unroll, stages
    return None


def backward_stages(size: int, exact: bool, facts: DeviceFacts) -> int | None:
    """Pipeline stages of the backward kernel; None where a block does not fit one program."""
    for stages in (4, 2):
        if _shared_bytes(size, exact, BACKWARD_UNROLL, stages, facts) <= facts.shared_bytes:
            return stages
    return None


def is_resident(size: int, exact: bool, facts: DeviceFacts) -> bool:
    """Whether the weights of a block of ``size`` stay with one program for all steps; ``exact``: in fp32 instead of fp16.

    Blocks beyond the limits would fit some GPUs, but not their registers.
    """
    if size > (64 if exact else 128):
        return False
    return tiling(size, exact, True, facts) is not None and backward_stages(size, exact, facts) is not None


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None if they can."""
    return None
