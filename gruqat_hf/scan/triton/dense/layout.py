"""How a block's channels lie over programs; plain arithmetic and packing, no import of triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..device import INTERPRETED, DeviceFacts
from ..exchange_plan import Launch, held_bytes, plan_launch, power_of_two

#: Output channels of a program: what a matrix instruction takes.
_ROWS = 16


@dataclass(frozen=True)
class DenseLayout:
    """Attributes:
    size: of a block.
    slices: programs that share a block, ``rows`` output channels each.
    groups: of weights along the input dimension, each with ``inputs`` inputs, rounded up to a power of two.
    """

    size: int
    slices: int
    rows: int
    groups: int
    inputs: int

    def splits(self, launch: Launch) -> int:
        """In how many parts a group is summed, one by each warp; a matrix instruction sums over 16 inputs."""
        return min(launch.warps, self.inputs // 16)

    def pack(self, weight: Tensor) -> Tensor:
        """``[gates, blocks, out, in]`` → ``[blocks, slices, groups, gates, rows, inputs]``, padded with zeros."""
        gates, blocks = weight.shape[:2]
        inputs = self.size // self.groups
        weight = weight.reshape(gates, blocks, self.size, self.groups, inputs)
        weight = F.pad(weight, (0, self.inputs - inputs, 0, 0, 0, self.slices * self.rows - self.size))
        weight = weight.view(gates, blocks, self.slices, self.rows, self.groups, self.inputs)
        return weight.permute(1, 2, 4, 0, 3, 5).contiguous()

    def launch(self, rows: int, blocks: int, facts: DeviceFacts, width: int, exact: bool) -> Launch | None:
        """How ``rows`` of a batch are walked with weights of ``width`` bytes; see :func:`plan_launch`."""

        def shared_bytes(batch: int, resident: bool) -> int:
            tiles = 3 * self.groups if resident else 1
            columns = max(tiles * self.rows + batch, 2 * batch if exact else 0)  # exact products read inputs in two parts
            return self.inputs * columns * held_bytes(width, facts)

        return plan_launch(rows, self.slices * blocks, self.slices == 1, facts, exact, shared_bytes)


def layout_of(size: int, groups: int) -> DenseLayout:
    """The layout of a block; in the interpreter, whose programs cannot wait for one another, one program takes all of it."""
    rows = power_of_two(size) if INTERPRETED else _ROWS
    return DenseLayout(size, -(-size // rows), rows, groups, power_of_two(max(16, size // groups)))
