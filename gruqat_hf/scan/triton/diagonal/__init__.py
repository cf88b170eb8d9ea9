"""Kernels for diagonal operands: every channel of every row is a recurrence of its own."""

from __future__ import annotations

from ...inputs import ScanInputs
from ..device import DeviceFacts

SAVES_GATES = False
SUMS_WEIGHTS = True


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None if they can."""
    return None
