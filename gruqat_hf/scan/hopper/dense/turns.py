"""How many tiles of rows take turns in a cluster, and how many rows of them are sent.

A step of one tile is half waiting for what the others send. Three that take turns do not wait for it, and take less than twice as
long as one. That pays where tiles are more than clusters run at once, and others would have to wait for a second wave.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...triton.exchange_plan import cdiv, power_of_two
from ..cluster import clusters_at_once
from .layouts import ROWS


def rows_sent(rows: int) -> int:
    """How many rows of a tile programs send one another, a power of two: fewer than it has, where a batch has no more."""
    return min(ROWS, power_of_two(rows))


def tiles_of_cluster(rows: int, blocks: int, programs: int, device: torch.device, durations: Mapping[int, float]) -> int:
    """The number of tiles with which a launch is done first, given how long a step of so many takes."""
    at_once = max(1, clusters_at_once(programs, device.index))

    def launch(tiles: int) -> float:
        # Of the small programs that share a block in eighths, with one tile, a processor runs two.
        beside = 2 if programs == 8 and tiles == 1 else 1
        return cdiv(cdiv(rows, tiles * ROWS) * blocks, at_once * beside) * durations[tiles]

    return min(durations, key=launch)
