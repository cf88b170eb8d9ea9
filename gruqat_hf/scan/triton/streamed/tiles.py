"""How streamed products are cut into tiles and dealt to programs, and operands as the kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device import DeviceFacts
from ..exchange_plan import power_of_two

#: Outputs of a tile, inputs that it takes at a time, and rows of the batch.
TILE, DEPTH, ROWS = 64, 64, 16


def pad_blocks(weight: Tensor, rows: int, columns: int, dtype: torch.dtype, factors: Tensor | None = None) -> Tensor:
    """``[gates, blocks, out, in]`` in ``dtype``, with zeros up to ``rows`` and ``columns``, times ``factors`` ``[gates, 1]`` if
    given; no copy where nothing changes."""
    gates, blocks, out, inputs = weight.shape
    fits, weight = (rows, columns) == (out, inputs), weight.detach()
    if fits and factors is None and weight.dtype == dtype:
        return weight.contiguous()
    padded = (torch.empty if fits else torch.zeros)((gates, blocks, rows, columns), dtype=dtype, device=weight.device)
    if factors is None:
        padded[..., :out, :inputs].copy_(weight)
    else:
        torch.mul(weight, factors[..., None, None], out=padded[..., :out, :inputs])
    return padded


def pad_weight(weight: Tensor, dtype: torch.dtype | None = None, factors: Tensor | None = None) -> Tensor:
    """The same with both sizes rounded up to whole tiles."""
    out, inputs = weight.shape[2:]
    return pad_blocks(weight, out + -out % TILE, inputs + -inputs % DEPTH, dtype or weight.dtype, factors)


class Programs(NamedTuple):
    """Attributes:
    slices: programs that share a tile of the batch, and one block of a block-diagonal operand.
    blocks: of a block-diagonal operand, which know nothing of one another; 1 for two factors.
    tiles: of the batch.
    """

    slices: int
    blocks: int
    tiles: int


def plan_programs(tasks: int, blocks: int, rows: int, facts: DeviceFacts) -> Programs:
    """Programs for ``tasks`` tiles of outputs: no more than run at once, unless each is alone."""
    tiles = -(-rows // ROWS)
    slices = max(1, min(tasks, facts.processors // (blocks * tiles)))
    slices = -(-tasks // -(-tasks // slices))
    return Programs(slices, blocks, tiles)


def stages(facts: DeviceFacts) -> int:
    return 3 if facts.shared_bytes > 1 << 17 else 1


def depth_of(inputs: int) -> int:
    """Inputs that a tile takes at a time, given how many share a scale."""
    return min(DEPTH, power_of_two(max(16, inputs)))


class StreamedFactor(NamedTuple):
    """A block-diagonal factor as the kernels read it.

    Attributes:
        weight: of :func:`pad_weight`, codes in fp16 or float weights; transposed for the backward scan.
        out, inputs: true sizes of a block.
        scale: of an integer product, ``[groups, gates, blocks * out]``, block by block; or None.
    """

    weight: Tensor
    out: int
    inputs: int
    scale: Tensor | None = None

    @property
    def tiles(self) -> int:
        """Tiles of a block's outputs."""
        return -(-self.out // TILE)

    @property
    def groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[0]

    @classmethod
    def of(cls, values: Tensor, scale: Tensor | None = None) -> StreamedFactor:
        """From ``[gates, blocks, out, in]``, and ``[gates, blocks, out, groups]`` if the product is one of codes."""
        if scale is not None:
            scale = scale.permute(3, 0, 1, 2).flatten(2).contiguous()
        return cls(pad_weight(values), *values.shape[2:], scale)


class StreamedWeights(NamedTuple):
    """Attributes:
    first: of two factors, or None.
    last: the second of two, or the only one.
    bias: ``[3, H]`` fp32.
    h_grid, mid_grid, state_grid, gates_grid: packed, or None.
    """

    first: StreamedFactor | None
    last: StreamedFactor
    bias: Tensor
    h_grid: Tensor | None
    mid_grid: Tensor | None
    state_grid: Tensor | None
    gates_grid: Tensor | None
    precision: str
    quantized: bool


def shape_of(first: StreamedFactor | None) -> tuple[int, int, int, int, int, int]:
    """Gates, blocks, outputs, inputs, and both padded, of the first of two factors."""
    if first is None:
        return 1, 1, 1, 1, 1, 1
    gates, blocks, rows, padded = first.weight.shape
    return gates, blocks, first.out, first.inputs, rows, padded
