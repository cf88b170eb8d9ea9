"""How a monarch operand lies over programs; plain arithmetic and packing, no import of triton.

A program owns the second factor's blocks ``[c * L, (c + 1) * L)`` of ``l``: the channels v with ``v % l`` in that range. They are
the mid values that its blocks read as well as the outputs that they give, so both have one numbering: ``[chunks, rows]``
positions, chunk j holding the program's channels in ``[j * span, (j + 1) * span)``, a range of whole blocks of the first factor.
A mid value of chunk j depends on inputs of the same range alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import INTERPRETED, DeviceFacts
from ..exchange_plan import Launch, held_bytes, plan_launch, power_of_two

#: Channels of a program, about, and positions of a chunk: what a matrix instruction takes.
_CHANNELS = 64
_ROWS = 16


@dataclass(frozen=True)
class MonarchLayout:
    """Attributes:
    first_blocks, first_size, second_blocks, second_size: k, p, l, s.
    slices: programs.
    chunks, rows, span, depth: see above; ``depth`` is ``span`` rounded up to a power of two, as are chunks and rows.
    """

    first_blocks: int
    first_size: int
    second_blocks: int
    second_size: int
    slices: int
    chunks: int
    rows: int
    span: int
    depth: int

    @property
    def positions(self) -> int:
        return self.chunks * self.rows

    @property
    def blocks_per_slice(self) -> int:
        return -(-self.second_blocks // self.slices)

    def warps(self, launch: Launch) -> int:
        """Of a program: more for tiles that four warps' registers cannot hold."""
        return 8 if self.positions * max(self.positions, self.depth) > 8192 else launch.warps

    def channels(self, device: torch.device) -> Tensor:
        """The channel at each position, ``[slices, chunks, rows]`` int32, -1 where there is none."""
        return _channels(self, device)

    def pack_first(self, first: Tensor) -> Tensor:
        """``[g, k, p, p]`` → ``[slices, g, chunks, rows, depth]``."""
        size = first.shape[-1]
        channel = self.channels(first.device)
        row = channel.clamp(min=0).long()
        weight = first.flatten(1, 2)[:, row] * (channel >= 0).unsqueeze(-1)  # [g, slices, chunks, rows, p]
        held = self.span // size
        here = torch.arange(held, device=first.device) == (row // size - row // self.span * held).unsqueeze(-1)
        weight = (weight.unsqueeze(-2) * here.unsqueeze(-1)).flatten(-2)  # [g, slices, chunks, rows, span]
        return F.pad(weight, (0, self.depth - self.span)).transpose(0, 1).contiguous()

    def pack_second(self, second: Tensor) -> Tensor:
        """``[3, l, s, s]`` → ``[slices, 3, positions out, positions in]``."""
        gates, blocks, _, _ = second.shape
        channel = self.channels(second.device).flatten(1)
        position = channel.clamp(min=0).long()
        weight = second.transpose(1, 2).flatten(1, 2)[:, position]  # [3, slices, out, s]
        column = (position // blocks).unsqueeze(1).expand(-1, self.positions, -1)
        weight = weight.gather(-1, column.expand(gates, -1, -1, -1))
        same = position.unsqueeze(2) % blocks == position.unsqueeze(1) % blocks
        same = same & (channel >= 0).unsqueeze(2) & (channel >= 0).unsqueeze(1)
        return (weight * same).transpose(0, 1).contiguous()

    def launch(self, rows: int, gates: int, facts: DeviceFacts, width: int, exact: bool) -> Launch | None:
        """How ``rows`` of a batch are walked with weights of ``width`` bytes; see :func:`plan_launch`.

        Args:
            gates: of the first factor.
        """
        first, second = self.positions * self.depth, self.positions * self.positions

        def shared_bytes(batch: int, resident: bool) -> int:
            weights, inputs = gates * first + 3 * second if resident else max(first, second), self.chunks * self.depth * batch
            values = weights + inputs + gates * self.positions * batch
            # Exact products read inputs in two parts.
            return max(values, 2 * inputs if exact else 0) * held_bytes(width, facts)

        return plan_launch(rows, self.slices, self.slices == 1, facts, exact, shared_bytes)


@lru_cache(maxsize=64)
def _channels(layout: MonarchLayout, device: torch.device) -> Tensor:
    table = torch.full((layout.slices, layout.chunks, layout.rows), -1, dtype=torch.int32)
    channel = torch.arange(layout.second_blocks * layout.second_size)
    part = channel % layout.second_blocks // layout.blocks_per_slice
    for c in range(layout.slices):
        own = channel[part == c]
        for j in range(layout.chunks):
            here = own[own // layout.span == j]
            table[c, j, : len(here)] = here
    return table.to(device)


def layout_of(first: tuple[int, ...], second: tuple[int, ...]) -> MonarchLayout:
    """The layout for factors of shapes ``[g, k, p, p]`` and ``[3, l, s, s]``.

    In the interpreter, whose programs cannot wait for one another, one program takes it all.
    """
    _, first_blocks, first_size, _ = first
    _, second_blocks, second_size, _ = second
    together = second_blocks if INTERPRETED else min(second_blocks, max(1, _CHANNELS // second_size))
    slices = -(-second_blocks // together)
    together = -(-second_blocks // slices)
    wanted = max(1, together * second_size // _ROWS)
    held = -(-first_blocks // min(first_blocks, wanted))
    span = held * first_size
    chunks = -(-first_blocks // held)
    # In any run of `span` channels, at most this many belong to one program.
    rows = -(-span // second_blocks) * together
    return MonarchLayout(
        first_blocks,
        first_size,
        second_blocks,
        second_size,
        -(-second_blocks // together),
        power_of_two(chunks),
        power_of_two(max(_ROWS, rows)),
        span,
        power_of_two(max(16, span)),
    )
