"""What the dense backward kernels hold in shared memory: steps on their way from global memory; and, as the block-diagonal one
does too, operands of the products."""

from __future__ import annotations

from .gluon import commit_copies, copy_to_shared, gl, jit
from .layouts import copy_layout, operand_memory, ring_memory


@jit
def rings(SAVED: gl.constexpr, STATE: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Memory for steps on their way: saved gates, gradient of the output, state before the step."""
    WIDE: gl.constexpr = ring_memory(BLOCK, ROWS, SAVED.primitive_bitwidth // 8)
    LAYOUT: gl.constexpr = ring_memory(BLOCK, ROWS, STATE.primitive_bitwidth // 8)
    saved = gl.allocate_shared_memory(SAVED, [SLOTS, ROWS, BLOCK], WIDE)
    grad = gl.allocate_shared_memory(STATE, [SLOTS, ROWS, BLOCK], LAYOUT)
    state = gl.allocate_shared_memory(STATE, [SLOTS, ROWS, BLOCK], LAYOUT)
    return saved, grad, state


@jit
def operands(BLOCK: gl.constexpr):
    """Memory of three products' right sides; apart from one another, for which the compiler asks no barriers between them."""
    LAYOUT: gl.constexpr = operand_memory(BLOCK)
    x_r = gl.allocate_shared_memory(gl.float16, [BLOCK, 8], LAYOUT)
    x_z = gl.allocate_shared_memory(gl.float16, [BLOCK, 8], LAYOUT)
    x_n = gl.allocate_shared_memory(gl.float16, [BLOCK, 8], LAYOUT)
    return x_r, x_z, x_n


@jit
def _fetch(ring, slot, base, first_row, first_channel, channels, runs, end, H: gl.constexpr):
    """Copy a step's tile of ``base``, which points at the step; zero where it does not run."""
    BLOCK: gl.constexpr = ring.shape[2]
    COPY: gl.constexpr = copy_layout(BLOCK, base.dtype.element_ty.primitive_bitwidth // 8, gl.num_warps())
    b = first_row + gl.arange(0, ring.shape[1], layout=gl.SliceLayout(1, COPY))[:, None]
    s = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))[None, :]
    copy_to_shared(ring.index(slot), base + b * H + (first_channel + s), mask=(b < end) & (s < channels) & runs)


@jit
def fetch_step(memory, slot, gates, dstates, states, at, step, first_row, first_channel, channels, i, T, end, H: gl.constexpr):
    """Set out for all that step ``i`` needs, which lies at ``at``, of a program's ``channels`` from ``first_channel`` on and rows
    from ``first_row`` to ``end``."""
    _fetch(memory[0], slot, gates + at, first_row, first_channel, channels, i < T, end, H)
    _fetch(memory[1], slot, dstates + at, first_row, first_channel, channels, i < T, end, H)
    _fetch(memory[2], slot, states + (at + step), first_row, first_channel, channels, i + 1 < T, end, H)
    commit_copies()


@jit
def read(ring, slot, GATES: gl.constexpr):
    return ring.index(slot).permute([1, 0]).load(GATES)
