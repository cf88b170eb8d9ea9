"""Programs that walk one sequence together: each owns some channels, and after every step all wait for all.

The programs of a group hand their part of the state round through global memory. They must all be on the GPU at once, or they
would wait for ever: kernels that use this are launched cooperatively (the driver starts all programs together or none), and
never with more programs than there are processors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import MOST_MARKED
from .math import codes, gru_gates, gru_gradients, on_grid, pack_gates, unpack_gates
from .memory import put

#: Counters lie this many int32 apart, each in a cache line of its own.
COUNTER_STRIDE = 32
_COUNTER_STRIDE = tl.constexpr(COUNTER_STRIDE)
_MOST_MARKED = tl.constexpr(MOST_MARKED)


def new_counters(groups: int, device: torch.device) -> Tensor:
    """Counters for :func:`group_barrier`; every launch needs fresh ones."""
    return torch.zeros(groups * COUNTER_STRIDE, dtype=torch.int32, device=device)


def new_exchange(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for what a group's programs hand round, ``[steps, ...]``: two steps at least, one to read and one to write."""
    return torch.empty(shape, dtype=dtype, device=device)


def gate_planes(gates: Tensor | None) -> tuple[Tensor | None, int]:
    """Saved gates as kernels read them, and in how many planes: fp16 ones are packed, a channel's r, z, n and hn in one int64."""
    if gates is None or gates.dtype != torch.float16:
        return gates, 4
    return gates.view(-1).view(torch.int64), 1


@triton.jit
def group_barrier(counters, group, arrivals, PROGRAMS: tl.constexpr):
    """Wait until the programs of a group have come here ``arrivals`` times in sum; then all see what each has stored before."""
    tl.debug_barrier()
    if PROGRAMS > 1:
        counter = counters + group * _COUNTER_STRIDE
        tl.atomic_add(counter, 1, sem="release")
        seen = tl.atomic_add(counter, 0, sem="acquire")
        while seen < arrivals:
            seen = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def load_tiles(pointer, at, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """``COUNT`` tiles of weights, ``STRIDE`` elements apart, as a tuple."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(pointer + i * STRIDE + at),)
    return tiles


@triton.jit
def load_planes(pointer, ok, COUNT: tl.constexpr, H: tl.constexpr):
    """``COUNT`` values of each channel, ``H`` elements apart, in fp32."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(pointer + i * H, mask=ok, other=0.0).to(tl.float32),)
    return values


@triton.jit
def store_planes(pointer, values, ok, H: tl.constexpr):
    """The counterpart of :func:`load_planes`."""
    for i in tl.static_range(len(values)):
        put(pointer + i * H, values[i].to(pointer.dtype.element_ty), ok)


@triton.jit
def load_gates(pointer, ok, PLANES: tl.constexpr, H: tl.constexpr):
    """r, z, n and hn of each channel: one packed value, or four planes."""
    if PLANES == 1:
        return unpack_gates(tl.load(pointer, mask=ok, other=0))
    else:
        return load_planes(pointer, ok, 4, H)


@triton.jit
def store_gates(pointer, values, ok, PLANES: tl.constexpr, H: tl.constexpr):
    """The counterpart of :func:`load_gates`."""
    if PLANES == 1:
        put(pointer, pack_gates(values[0], values[1], values[2], values[3]), ok)
    else:
        store_planes(pointer, values, ok, H)


@triton.jit
def load_grid(grid, channel, live, CHANNELS: tl.constexpr):
    """Scale, 1 / scale, lowest and highest code of a packed grid ``[4, 1 or CHANNELS]``, as columns where it has channels."""
    values = ()
    for i in tl.static_range(4):
        if CHANNELS == 1:
            values = values + (tl.load(grid + i),)
        else:
            values = values + (tl.load(grid + i * CHANNELS + channel, mask=live, other=1.0)[:, None],)
    return values


@triton.jit
def to_operand(h, grid, INTEGER: tl.constexpr):
    """The state as the product reads it: its codes, or itself."""
    if INTEGER:
        return codes(h, grid[1], grid[2], grid[3])
    else:
        return h


@triton.jit
def next_state(gi, gh, h, grid, HAS_GRID: tl.constexpr, PORTABLE: tl.constexpr, gate_grids=None):
    """``(r, z, n, hn, next)`` of one step; z is -1 where the carried state's grid clips."""
    r, z, n, hn, new = gru_gates(gi[0], gi[1], gi[2], gh[0], gh[1], gh[2], h, PORTABLE, gate_grids)
    if HAS_GRID:
        new, z = on_grid(new, z, grid, True)
    return r, z, n, hn, new


@triton.jit
def step_gradients(grad, gates, h, MARKED: tl.constexpr = False):
    """:func:`gru_gradients` of a step whose ``gates`` are r, z, n, hn, with no gradient where the carried state was clipped."""
    r, z, n, hn = gates
    if MARKED:  # a smaller z < 0 is a mark
        grad = tl.where(z < -_MOST_MARKED, 0.0, grad)
    else:
        grad = tl.where(z < 0.0, 0.0, grad)
    return gru_gradients(grad, r, z, n, hn, h, MARKED)


@triton.jit
def sum_parts(parts, COUNT: tl.constexpr):
    """The sum over the first dimension, a power of two. Unlike ``tl.sum``, it leaves every element with one thread alone."""
    total = tl.permute(parts, (1, 2, 0))
    if COUNT >= 8:
        total = _sum_pairs(total, 8)
    if COUNT >= 4:
        total = _sum_pairs(total, 4)
    if COUNT >= 2:
        total = _sum_pairs(total, 2)
    return tl.reshape(total, (parts.shape[1], parts.shape[2]))


@triton.jit
def _sum_pairs(values, COUNT: tl.constexpr):
    """``[m, n, count]`` → ``[m, n, count / 2]``."""
    even, odd = tl.split(tl.reshape(values, (values.shape[0], values.shape[1], COUNT // 2, 2)))
    return even + odd
