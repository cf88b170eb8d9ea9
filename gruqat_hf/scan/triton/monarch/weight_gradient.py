"""Gradients of factors' values: outer products of every block's outputs and inputs, summed over all rows of a finished scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import device_facts
from ..exchange_plan import cdiv, power_of_two
from ..family import KernelCall
from ..math import codes, count, load_grid, to_tf32
from .blocks import BlockRows, natural, place, rows_before

#: Fewest rows that are worth a program's sum.
_FEWEST_ROWS = 64


@dataclass(frozen=True)
class OuterProduct:
    """``out[g, k, o, i]``, the sum over rows r of ``left[r, g, k, o] * right[r, g, k, i]``.

    Attributes:
        left: of all gates, or of all but the last one.
        right: of as many gates, or of one for all.
        last: ``[R, H]``, of left's last gate where that lies elsewhere, in the same order.
        initial: right is what the states ``right`` were one step before, and this before the first step, ``[B, H]``; else None.
        reverse: the direction of steps.
        grid: packed grid that right goes through, or None.
        integer: take right's codes instead of its values.
        column_sums: of left, per gate and channel in natural order, are wanted as well.
    """

    left: BlockRows
    right: BlockRows
    last: Tensor | None = None
    initial: Tensor | None = None
    reverse: bool = False
    grid: Tensor | None = None
    integer: bool = False
    column_sums: bool = False

    @property
    def gates(self) -> int:
        return self.left.rows.shape[1] + (self.last is not None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.gates, self.left.block.size, self.left.element.size, self.right.element.size

    @property
    def channels(self) -> int:
        return self.left.block.size * self.left.element.size


class Tile(NamedTuple):
    """What a program takes: blocks, their outputs and inputs, and rows at a time."""

    blocks: int
    left: int
    right: int
    rows: int
    warps: int

    def programs(self, product: OuterProduct) -> int:
        """How many take a product's rows."""
        gates, *sizes = product.shape
        return gates * prod(cdiv(size, own) for size, own in zip(sizes, self[:3]))


def plan_tile(product: OuterProduct, precision: str) -> Tile:
    """The tile of a product.

    Blocks whose elements alternate in memory are taken together, so that whole sectors are read; programs that share what they
    read do so through the second-level cache.
    """
    block, element = product.left.block, product.left.element
    sides = [min(64, max(16, power_of_two(axis.size))) for axis in (element, product.right.element)]
    if precision != "tf32":
        sides = [min(32, side) for side in sides]
    alternate = power_of_two(block.count) if element.inner > 1 and block.inner == 1 else 1
    left, right = sides
    # Warps share blocks out among them, and several on one block would repeat each other's work.
    if alternate >= 8:
        together = min(alternate, max(8, 4096 // (left * right)))
        if left * right > 2048:
            left //= 2
        return Tile(together, left, right, min(64, max(16, 4096 // (together * max(left, right)))), 8)
    together = min(power_of_two(block.size), max(1, 4096 // (left * right)), 4)
    # A thread has 64 values of either side on their way, products in fp32 registers for fewer.
    values = 8192 if precision == "tf32" else 2048
    return Tile(together, left, right, min(128, max(16, values // (together * max(left, right)))), 4)


@triton.jit
def _load(rows, ok, first_block, element, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ELEMENT: tl.constexpr):
    """fp32 values of the rows at pointers ``rows``, ``[BLOCKS, elements, rows]``, or ``[elements, rows]`` of a single block.

    What is contiguous in memory is the last dimension of the load, which gets its layout from that; only then are blocks brought
    apart.
    """
    block = first_block + tl.arange(0, BLOCKS)
    at_block = place(block, BLOCK)
    at_element = place(element, ELEMENT)
    if BLOCKS == 1:
        inside = ok[:, None] & (element < ELEMENT[0])[None, :]
        at = rows[:, None] + (at_element + place(first_block, BLOCK))[None, :]
        values = tl.trans(tl.load(at, mask=inside, other=0.0))
    elif ELEMENT[3] == 1:
        inside = (block < BLOCK[0])[:, None, None] & ok[None, :, None] & (element < ELEMENT[0])[None, None, :]
        at = rows[None, :, None] + (at_block[:, None, None] + at_element[None, None, :])
        values = tl.permute(tl.load(at, mask=inside, other=0.0), (0, 2, 1))
    else:
        inside = (element < ELEMENT[0])[:, None, None] & ok[None, :, None] & (block < BLOCK[0])[None, None, :]
        at = rows[None, :, None] + (at_element[:, None, None] + at_block[None, None, :])
        values = tl.permute(tl.load(at, mask=inside, other=0.0), (2, 0, 1))
    return values.to(tl.float32)


@triton.jit(do_not_specialize=["R", "B", "CHUNK"])
def _kernel(
    left, last, right, initial, grid, parts, R, B, CHUNK,
    GATES: tl.constexpr, STRIDES: tl.constexpr, BLOCK: tl.constexpr, LEFT: tl.constexpr,
    RIGHT_STRIDES: tl.constexpr, RIGHT_BLOCK: tl.constexpr, RIGHT: tl.constexpr,
    PART: tl.constexpr, SUMS: tl.constexpr, REVERSE: tl.constexpr, INTEGER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Program (tile, j): a tile of one gate's blocks, of rows j * CHUNK and on, into ``parts[j]``.

    STRIDES, RIGHT_STRIDES: of rows and gates, and of rows of ``last`` or ``initial``. BLOCK, LEFT, RIGHT_BLOCK, RIGHT: axes of
    blocks and elements. PART: size of a part. SUMS: where in a part column sums begin, and how far apart those of gates, blocks
    and elements lie; None for none. FOLD: so many rows of a tile are with as many threads, the rest with the same ones.
    """
    out_tiles: tl.constexpr = (LEFT[0] + OUTS - 1) // OUTS
    in_tiles: tl.constexpr = (RIGHT[0] + INS - 1) // INS
    tile = tl.program_id(0)
    g = tile % GATES
    i = tile // GATES % in_tiles * INS + tl.arange(0, INS)
    o = tile // (GATES * in_tiles) % out_tiles * OUTS + tl.arange(0, OUTS)
    first_block = tile // (GATES * in_tiles * out_tiles) * BLOCKS
    left += g * STRIDES[1]
    left_row = STRIDES[0]
    if last is not None:
        left = tl.where(g == GATES - 1, last, left)
        left_row = tl.where(g == GATES - 1, STRIDES[2], STRIDES[0])
    right += g * RIGHT_STRIDES[1]
    if grid is not None:
        scale, inv, low, high = load_grid(grid, 0, 1)
    if BLOCKS == 1:
        total = tl.zeros((OUTS, INS), tl.float32)
        sums = tl.zeros((OUTS, FOLD), tl.float32)
    else:
        total = tl.zeros((BLOCKS, OUTS, INS), tl.float32)
        sums = tl.zeros((BLOCKS, OUTS, FOLD), tl.float32)
    begin = tl.cast(tl.program_id(1), tl.int64) * CHUNK
    for start in tl.range(0, count(CHUNK), ROWS, num_stages=1):
        n = begin + start + tl.arange(0, ROWS)
        ok = (start + tl.arange(0, ROWS) < CHUNK) & (n < R)
        x = _load(left + n * left_row, ok, first_block, o, BLOCKS, BLOCK, LEFT)
        right_rows = rows_before(right, initial, n, R, B, RIGHT_STRIDES[0], RIGHT_STRIDES[2], REVERSE)
        y = _load(right_rows, ok, first_block, i, BLOCKS, RIGHT_BLOCK, RIGHT)
        if grid is not None:
            y = codes(y, inv, low, high)
            if not INTEGER:
                y = y * scale
        if BLOCKS == 1:
            if SUMS is not None:
                sums += tl.sum(tl.reshape(x, (OUTS, ROWS // FOLD, FOLD)), 1)
            y = tl.trans(to_tf32(y, PRECISION))
        else:
            if SUMS is not None:
                sums += tl.sum(tl.reshape(x, (BLOCKS, OUTS, ROWS // FOLD, FOLD)), 2)
            y = tl.permute(to_tf32(y, PRECISION), (0, 2, 1))
        total = tl.dot(to_tf32(x, PRECISION), y, total, input_precision=PRECISION)
    parts += tl.cast(tl.program_id(1), tl.int64) * PART
    k = first_block + tl.arange(0, BLOCKS)
    own_o = o < LEFT[0]
    own_i = i < RIGHT[0]
    own_k = k < BLOCK[0]
    k = natural(k, BLOCK)
    o = natural(o, LEFT)
    i = natural(i, RIGHT)
    if BLOCKS == 1:
        total = tl.reshape(total, (1, OUTS, INS))
        sums = tl.reshape(sums, (1, OUTS, FOLD))
    out_at = ((g * BLOCK[0] + k) * LEFT[0])[:, None] + o[None, :]
    own = own_k[:, None] & own_o[None, :]
    tl.store(parts + out_at[:, :, None] * RIGHT[0] + i[None, None, :], total, mask=own[:, :, None] & own_i[None, None, :])
    if SUMS is not None:
        sums_at = parts + SUMS[0] + g * SUMS[1] + k[:, None] * SUMS[2] + o[None, :] * SUMS[3]
        tl.store(sums_at, tl.sum(sums, 2), mask=own & (tile // GATES % in_tiles == 0))


def _fill(product: OuterProduct, tile: Tile, parts: Tensor, offset: int, chunk: int, precision: str) -> None:
    """Fill a product's place in ``parts`` ``[chunks, sizes of all products]``, from ``offset`` on."""
    left, right, last, initial = product.left.rows, product.right.rows, product.last, product.initial
    right_block = product.right.block.split_like(product.left.block)
    block = product.left.block.split_like(right_block)
    gates, blocks, outs, ins = product.shape
    sums = None
    if product.column_sums:
        strides = (1, blocks) if product.left.interleaved else (outs, 1)
        sums = (gates * blocks * outs * ins, product.channels, *strides)
    # What a thread loads at once, both sides alike.
    run = min(product.left.element.count, tile.left) if product.left.element.inner == 1 else min(block.count, tile.blocks)
    vector = min(16 // min(left.element_size(), right.element_size()), power_of_two(run))
    KernelCall(
        kernel=_kernel,
        grid=(tile.programs(product), len(parts), 1),
        io=(left, last, right, initial),
        static=(product.grid, parts[:, offset:], left.shape[0], 0 if initial is None else initial.shape[0], chunk),
        constants={
            "GATES": gates,
            "STRIDES": (left.stride(0), left.stride(1), 0 if last is None else last.stride(0)),
            "BLOCK": tuple(block),
            "LEFT": tuple(product.left.element),
            "RIGHT_STRIDES": (
                right.stride(0),
                right.stride(1) if right.shape[1] > 1 else 0,
                0 if initial is None else initial.stride(0),
            ),
            "RIGHT_BLOCK": tuple(right_block),
            "RIGHT": tuple(product.right.element),
            "PART": parts.shape[1],
            "SUMS": sums,
            "REVERSE": product.reverse,
            "INTEGER": product.integer,
            "PRECISION": precision,
            "BLOCKS": tile.blocks,
            "OUTS": tile.left,
            "INS": tile.right,
            "ROWS": tile.rows,
            "FOLD": min(tile.rows, max(1, 32 * tile.warps * vector // (tile.blocks * tile.left))),
        },
        warps=tile.warps,
    ).run()


def sum_products(products: Sequence[OuterProduct], precision: str) -> list[tuple[Tensor, Tensor | None]]:
    """Each product ``[gates, blocks, outs, ins]`` and, where wanted, its column sums ``[gates, channels]``, in fp32.

    Programs take rows in equal shares, and what they find is added up after them, in a fixed order.
    """
    rows, device = products[0].left.rows.shape[0], products[0].left.rows.device
    tiles = [plan_tile(product, precision) for product in products]
    fewest = min(tile.programs(product) for product, tile in zip(products, tiles))
    wanted = max(1, min(rows // _FEWEST_ROWS, 2 * device_facts(device).processors // fewest))
    chunk = cdiv(cdiv(rows, wanted), _FEWEST_ROWS) * _FEWEST_ROWS
    sizes = [
        size
        for product in products
        for size in (
            product.gates * product.channels * product.shape[3],
            product.gates * product.channels if product.column_sums else 0,
        )
    ]
    parts = torch.empty((cdiv(rows, chunk), sum(sizes)), dtype=torch.float32, device=device)
    offset = 0
    for product, tile, size, own in zip(products, tiles, sizes[::2], sizes[1::2]):
        _fill(product, tile, parts, offset, chunk, precision)
        offset += size + own
    found = (parts.sum(0) if len(parts) > 1 else parts[0]).split(sizes)
    return [
        (gradient.view(product.shape), sums.view(product.gates, -1) if product.column_sums else None)
        for product, gradient, sums in zip(products, found[::2], found[1::2])
    ]
