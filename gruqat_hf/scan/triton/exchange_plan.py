"""How programs that exchange the state share a batch; plain arithmetic, no import of triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .device import DeviceFacts

#: Batch rows of a program: matrix instructions take 8 at least, more than 32 do not fit the registers.
_BATCHES = (8, 16, 32)
#: Shared memory left for reductions and conversions between layouts.
_SPARE_BYTES = 8192


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()


def held_bytes(width: int, facts: DeviceFacts) -> int:
    """What a weight of ``width`` bytes takes in shared memory: before compute capability 8.0 Triton multiplies in fp32 alone."""
    return 4 if (0, 0) < facts.capability < (8, 0) else width


@dataclass(frozen=True)
class Launch:
    """Attributes:
    batch: rows of a program.
    tiles: of the batch, of which ``side_by_side`` are walked at once.
    resident: whether weights stay in shared memory; else every step reads them again from the cache.
    """

    batch: int
    tiles: int
    side_by_side: int
    resident: bool

    @property
    def warps(self) -> int:
        return 4 if self.batch == _BATCHES[0] else 8


def plan_launch(
    rows: int, programs: int, alone: bool, facts: DeviceFacts, exact: bool, shared_bytes: Callable[[int, bool], int]
) -> Launch | None:
    """How ``rows`` of a batch are walked, or None where no launch fits the device.

    Args:
        programs: for one tile of the batch.
        alone: whether programs wait for nobody, so that more of them may be launched than run at once.
        exact: whether products are split in three, for fp32's accuracy on matrix units; weights then stay in global memory.
        shared_bytes: of a program, given its batch rows and whether weights are resident.
    """
    side_by_side = rows if alone else facts.processors // programs
    if side_by_side < 1:
        return None
    wanted = next((batch for batch in _BATCHES if -(-rows // batch) <= side_by_side), _BATCHES[-1])
    for resident in (False,) if exact else (True, False):
        for batch in (batch for batch in reversed(_BATCHES) if batch <= wanted):
            if shared_bytes(batch, resident) + _SPARE_BYTES <= facts.shared_bytes:
                tiles = -(-rows // batch)
                return Launch(batch, tiles, min(tiles, side_by_side), resident)
    return None
