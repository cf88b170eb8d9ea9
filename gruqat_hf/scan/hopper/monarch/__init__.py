"""Hopper kernels for two-factor operands: a program of a cluster has a block of either factor, and all exchange twice a step."""

from __future__ import annotations

import torch

from ....operands import Operand
from ...inputs import ScanInputs
from ...triton import monarch as portable
from ...triton.device import DeviceFacts
from ...triton.exchange_plan import cdiv
from ...triton.precision import is_exact
from ..cluster import clusters_at_once, refuses_clusters
from ..device import refuses_hopper
from ..products import refuses_products
from .layout import programs_of

SAVES_GATES = True
#: Half-precision gates are kept as ``[T, B, H, 4]``, as in the portable tier, whose backward kernel reads them.
PACKS_GATES = True
SUMS_WEIGHTS = True
#: Rows of the batch that a cluster takes. With 8 a step takes longer than two waves of clusters with 4.
TILE_ROWS = 4
#: Steps on their way from global memory, a power of two: some 2 µs of them.
STEPS = 4
#: Registers of a thread at most, and of a processor. Left alone, the compiler uses fewer for the sake of more programs on a
#: processor, and for that lines up products one after another; with the second number three programs of 4 warps share one.
_REGISTERS, _PROCESSOR_REGISTERS = (255, 168), 1 << 16


def registers(rows: int, programs: int, warps: int, device: torch.device) -> int:
    """Of a thread, for a launch of so many rows: fewer where so many more programs run at once that it takes fewer waves."""
    at_once = max(1, clusters_at_once(programs, device.index))

    def waves(most: int) -> int:
        beside = max(1, _PROCESSOR_REGISTERS // (32 * warps * most))
        return cdiv(cdiv(rows, TILE_ROWS), at_once * beside)

    return min(_REGISTERS, key=waves)


def interleaved_programs(operand: Operand) -> int:
    """How many programs take channels in turn: ``gi`` and states of a launch, and 16-bit gates, are in their exchange order."""
    programs = programs_of(*(tuple(factor.values.shape) for factor in operand.factors.values()))
    assert programs is not None
    return programs


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None if they can."""
    if (reason := refuses_hopper(facts)) is not None:
        return reason
    first, second = inputs.operand.factors["first"], inputs.operand.factors["second"]
    shapes = tuple(first.values.shape), tuple(second.values.shape)
    if shapes[0][2] != shapes[0][3] or shapes[1][2] != shapes[1][3] or (programs := programs_of(*shapes)) is None:
        return f"factors {shapes[0]} and {shapes[1]} are not 4, 8 or 16 blocks of 32, 64 or 128 channels"
    if (reason := refuses_products(inputs)) is not None:
        return reason
    mid = inputs.grids.mid
    if mid is not None and mid.scale.numel() > shapes[0][0]:
        return "the grid of mid has a scale for each gate, but the gates share the first factor"
    if is_exact(inputs) and inputs.needs_grad and (reason := portable.refuses(inputs, facts)) is not None:
        return f"gradients as exact as fp32 are the portable kernels', but {reason}"
    return refuses_clusters(programs, inputs.gi.device.index)
