"""How many tiles of rows take turns in a cluster.

A step of one tile is mostly waiting: for what the others send, for a product, for a barrier. Tiles that take turns wait for one
another's share only, so that a cluster with two takes little longer than with one. That pays where tiles are more than clusters
run at once, and others would have to wait for a second wave.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...triton.exchange_plan import cdiv
from ..cluster import clusters_at_once
from .layouts import ROWS


def tiles_of_cluster(rows: int, blocks: int, programs: int, device: torch.device, durations: Mapping[int, float]) -> int:
    """The number of tiles with which a launch is done first, given how long a step of so many takes."""
    at_once = max(1, clusters_at_once(programs, device.index))

    def launch(tiles: int) -> float:
        return cdiv(cdiv(rows, tiles * ROWS) * blocks, at_once) * durations[tiles]

    return min(durations, key=launch)
