"""How many values a grid clips."""

from __future__ import annotations

import torch
from torch import Tensor


class SaturationMeter:
    """Counts over one or more forward passes.

    Attributes:
        counts: int64 ``[2]``: values clipped and values seen; None before the first pass. Never read here, so that nothing
            waits for the device.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, clipped: Tensor) -> None:
        """Take in one forward pass; ``clipped`` is bool, one entry a value."""
        seen = torch.full((), clipped.numel(), dtype=torch.int64, device=clipped.device)
        counts = torch.stack([clipped.sum(), seen])
        self.counts = counts if self.counts is None else self.counts + counts
