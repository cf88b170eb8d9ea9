"""Rows of channels as blocks of a factor's elements, in natural order or in that of an exchange.

Natural is the order of the layer's output. In the exchange order of C programs, channel ``u * C + p`` lies at ``p * H / C + u``:
what a program of a cluster has is in a row. A factor's blocks and their elements then are numbers with two strides.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Axis(NamedTuple):
    """A factor's blocks, or the elements of a block: the ``i``-th lies at ``i // count * outer + i % count * inner``.

    Attributes:
        size: how many there are; ``count == size`` where one stride does.
        natural_outer, natural_inner: the same for which one it is by the factor's own numbers.
    """

    size: int
    count: int
    outer: int
    inner: int
    natural_outer: int
    natural_inner: int

    @classmethod
    def single(cls, size: int, stride: int) -> Axis:
        return cls(size, size, 0, stride, 0, 1)

    def split_like(self, other: Axis) -> Axis:
        """This axis, numbered as ``other`` of the same size is if that has two strides."""
        if other.count == other.size or self[:2] + self[4:] == other[:2] + other[4:]:
            return self
        assert self.count == self.size, "two orders of blocks that do not go together"
        outer, inner = other.natural_outer, other.natural_inner
        return Axis(self.size, other.count, self.inner * outer, self.inner * inner, outer, inner)


class BlockRows(NamedTuple):
    """``rows`` ``[R, gates, H]`` as ``[R, gates, blocks, elements]``; interleaved: channels of a block are ``blocks`` apart."""

    rows: Tensor
    block: Axis
    element: Axis
    interleaved: bool


def by_block(rows: Tensor, blocks: int, interleaved: bool, programs: int = 1) -> BlockRows:
    """``rows`` ``[R, gates, H]``, the last dimension contiguous, as blocks of an equal size; see :func:`axes`."""
    return BlockRows(rows, *axes(rows.shape[-1], blocks, interleaved, programs), interleaved)


@lru_cache(maxsize=256)
def axes(channels: int, blocks: int, interleaved: bool, programs: int) -> tuple[Axis, Axis]:
    """Where blocks, and elements of a block, lie in ``channels`` channels.

    Args:
        interleaved: a block takes every ``blocks``-th channel, as those of a second factor do; else channels in a row.
        programs: whose exchange order the channels are in; 1 for natural order.
    """
    size, run = channels // blocks, channels // programs
    if programs == 1:
        strides = (1, blocks) if interleaved else (size, 1)
        return Axis.single(blocks, strides[0]), Axis.single(size, strides[1])
    if interleaved:
        inner = blocks // programs
        block = Axis(blocks, inner, run, 1, 1, programs) if inner > 1 else Axis.single(blocks, run)
        return block, Axis.single(size, inner)
    if size % programs == 0:
        inner = size // programs
        return Axis.single(blocks, inner), Axis(size, inner, run, 1, 1, programs) if inner > 1 else Axis.single(size, run)
    together = programs // size
    return Axis(blocks, blocks // together, size * run, 1, 1, together), Axis.single(size, run)


@triton.jit
def place(i, AXIS: tl.constexpr):
    """Where the ``i``-th of an axis lies."""
    if AXIS[1] == AXIS[0]:
        return i * AXIS[3]
    else:
        return i // AXIS[1] * AXIS[2] + i % AXIS[1] * AXIS[3]


@triton.jit
def natural(i, AXIS: tl.constexpr):
    """Its number in the factor."""
    if AXIS[1] == AXIS[0]:
        return i
    else:
        return i // AXIS[1] * AXIS[4] + i % AXIS[1] * AXIS[5]


@triton.jit
def rows_before(states, h0, n, R, B, STATES_ROW: tl.constexpr, H0_ROW: tl.constexpr, REVERSE: tl.constexpr):
    """Pointers to the states before rows ``n`` = step * B + batch of a scan: those of one step earlier, or ``h0``. None for
    ``h0``: to the rows themselves."""
    if h0 is None:
        return states + n * STATES_ROW
    else:
        if REVERSE:
            before = n + B
            initial = n - (R - B)
        else:
            before = n - B
            initial = n
        is_first = (before < 0) | (before >= R)
        return tl.where(is_first, h0 + initial * H0_ROW, states + before * STATES_ROW)
