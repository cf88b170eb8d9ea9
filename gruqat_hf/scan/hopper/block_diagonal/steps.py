"""What the backward scan needs of a step, on its way from global memory."""

from __future__ import annotations

from ..gluon import commit_copies, copy_to_shared, gl, jit
from ..layouts import copy_layout, ring_memory


@jit
def rings(SAVED: gl.constexpr, STATE: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Memory of steps on their way: saved gates; gradient of the output above the state before the step."""
    WIDE: gl.constexpr = ring_memory(BLOCK, ROWS, SAVED.primitive_bitwidth // 8)
    LAYOUT: gl.constexpr = ring_memory(BLOCK, ROWS, STATE.primitive_bitwidth // 8)
    saved = gl.allocate_shared_memory(SAVED, [SLOTS, ROWS, BLOCK], WIDE)
    return saved, gl.allocate_shared_memory(STATE, [SLOTS, 2 * ROWS, BLOCK], LAYOUT)


@jit
def _tile(LINES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, BYTES: gl.constexpr, first_row):
    """Line, row of the batch and channel of each element that is copied."""
    COPY: gl.constexpr = copy_layout(BLOCK, BYTES, gl.num_warps())
    line = gl.arange(0, LINES, layout=gl.SliceLayout(1, COPY))[:, None]
    return line, first_row + line % ROWS, gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))[None, :]


@jit
def saved_source(gates, first_row, first_channel, channels, T, B, H: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Where saved gates of the step at ``gates`` are copied from, and the step at which there are none any more."""
    _, b, s = _tile(ROWS, ROWS, BLOCK, gates.dtype.element_ty.primitive_bitwidth // 8, first_row)
    return gates + b * H + (first_channel + s), gl.where((b < B) & (s < channels), T, 0)


@jit
def pair_source(
    dstates, states, first_row, first_channel, channels, T, B, H: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr
):
    """The same for a step's gradient at ``dstates``, and for the state before it at ``states``, of which there is one less."""
    line, b, s = _tile(2 * ROWS, ROWS, BLOCK, states.dtype.element_ty.primitive_bitwidth // 8, first_row)
    offset = b * H + (first_channel + s)
    p = gl.where(line < ROWS, dstates + offset, states + offset)
    return p, gl.where((b < B) & (s < channels), T - line // ROWS, 0)


@jit
def fetch(memory, slot, i, saved_p, saved_end, pair_p, pair_end):
    """Set out for all that step ``i`` needs; what there is not becomes zero."""
    copy_to_shared(memory[0].index(slot), saved_p, mask=i < saved_end)
    copy_to_shared(memory[1].index(slot), pair_p, mask=i < pair_end)
    commit_copies()


@jit
def take(memory, slot, GATES: gl.constexpr):
    """A step's saved gates, gradient of its output and state before it."""
    ROWS: gl.constexpr = memory[0].shape[1]
    pair = memory[1].index(slot)
    d = pair.slice(0, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    h = pair.slice(ROWS, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    return memory[0].index(slot).permute([1, 0]).load(GATES), d, h
