"""How many rows a tile has, and how many tiles take turns in a cluster.

What programs send one another takes a fifth to a third of a step, if a tile has all 8 rows: small batches are spread over as many
clusters as run at once.

A step of one tile is half waiting for what the others send. Three that take turns do not wait for it, and take less than twice as
long as one. That pays where tiles are more than clusters run at once, and others would have to wait for a second wave.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...triton.exchange_plan import cdiv
from ..cluster import clusters_at_once
from .layouts import ROWS


def rows_taken(rows: int, blocks: int, programs: int, device: torch.device, least: int = 1) -> int:
    """The number of rows, a power of two and at least ``least``, that each cluster takes of the ROWS that it has columns for: as
    few as still find a cluster each at once, one program to a processor."""
    at_once = max(1, clusters_at_once(programs, device.index))
    fewer = (taken for taken in (1, 2, 4) if taken >= least and cdiv(rows, taken) * blocks <= at_once)
    return next(fewer, ROWS)


def tiles_of_cluster(rows: int, blocks: int, programs: int, device: torch.device, durations: Mapping[int, float]) -> int:
    """The number of tiles with which a launch is done first, given how long a step of so many takes."""
    at_once = max(1, clusters_at_once(programs, device.index))

    def launch(tiles: int) -> float:
        # Of the small programs that share a block in eighths, with one tile, a processor runs two.
        beside = 2 if programs == 8 and tiles == 1 else 1
        return cdiv(cdiv(rows, tiles * ROWS) * blocks, at_once * beside) * durations[tiles]

    return min(durations, key=launch)
