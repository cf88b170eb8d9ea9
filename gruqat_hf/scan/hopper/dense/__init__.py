"""Hopper kernels for blocks that one program cannot hold: a cluster of programs shares one, and exchanges its state each step."""

from __future__ import annotations

from ...inputs import ScanInputs
from ...triton import dense as portable
from ...triton.device import DeviceFacts
from ...triton.precision import spec_of
from ..cluster import refuses_clusters
from ..device import refuses_hopper
from ..products import refuses_products

SAVES_GATES = True
#: Half-precision gates are kept as ``[T, B, H, 4]``, as in the portable tier, whose backward kernel can read them.
PACKS_GATES = True
SUMS_WEIGHTS = False

#: Steps whose inputs a program has on their way, this one included.
STAGES = 4
#: Largest block whose weights fit the registers of a cluster.
_LARGEST = 512
#: Elements that 16 bytes hold at most: copies of a row go in such pieces.
_PIECE = 8


def padded_size(size: int) -> int:
    """Channels that a cluster computes for a block: 32 for each of its 8 or 16 programs."""
    return 256 if size <= 256 else 512


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None if they can."""
    if (reason := refuses_hopper(facts)) is not None:
        return reason
    (factor,) = inputs.operand.factors.values()
    size, columns = factor.values.shape[-2:]
    if size > _LARGEST or size % _PIECE != 0 or columns != size:
        return f"a cluster takes square blocks of at most {_LARGEST} channels, in multiples of {_PIECE}, not {size} x {columns}"
    if (reason := refuses_products(inputs)) is not None:
        return reason
    if spec_of(inputs).exact and (reason := portable.refuses(inputs, facts)) is not None:
        return f"gradients as exact as fp32 are the portable kernels', but {reason}"
    return refuses_clusters(padded_size(size) // 32, inputs.gi.device.index)
