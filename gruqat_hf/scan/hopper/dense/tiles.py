"""What the forward kernels of large blocks have in common: parameters of their channels, inputs on their way, results."""

from __future__ import annotations

from ...triton.math import pack_gates
from ..gluon import commit_copies, copy_to_shared, gl, jit


@jit
def load_gates(pointer, c, own, H: gl.constexpr):
    """A value for each of three gates and each channel ``c`` of a program's ``own``, ``[CHANNELS, 1]``."""
    r = gl.load(pointer + c, mask=own, other=0.0)[:, None]
    z = gl.load(pointer + H + c, mask=own, other=0.0)[:, None]
    n = gl.load(pointer + 2 * H + c, mask=own, other=0.0)[:, None]
    return r, z, n


# Inputs come through a ring of slots ``[4 * ROWS, CHANNELS]``: lines of r, z, n, and a quarter that no one reads.


@jit
def lines_of_slot(ring, block, part, first_row, B, H: gl.constexpr, SIZE: gl.constexpr, COPY: gl.constexpr):
    """Where a slot's lines lie in a step's inputs ``[B, 3, H]``, for slice ``part`` of a block, and which of them there are."""
    ROWS: gl.constexpr = ring.shape[1] // 4
    CHANNELS: gl.constexpr = ring.shape[2]
    line = gl.arange(0, 4 * ROWS, layout=gl.SliceLayout(1, COPY))
    channel = part * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, COPY))
    b = first_row + line % ROWS
    present = ((line < 3 * ROWS) & (b < B))[:, None] & (channel < SIZE)[None, :]
    return (b * (3 * H) + line // ROWS * H)[:, None] + (block * SIZE + channel)[None, :], present


@jit
def fetch_inputs(ring, t, gi, lines, present, T):
    """Send for the inputs of step ``t``, of T, which lie at ``gi``."""
    copy_to_shared(ring.index(t % ring.shape[0]), gi + lines, mask=present & (t < T))
    commit_copies()


@jit
def read_gate(ring, slot, gate: gl.constexpr, GATES: gl.constexpr):
    """A gate's inputs, of a slot."""
    ROWS: gl.constexpr = ring.shape[1] // 4
    return ring.index(slot).slice(gate * ROWS, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)


@jit
def store_gates(pointer, r, z, n, hn, mask, H: gl.constexpr):
    """What the backward pass needs of a step, as ``pointer``'s type has it: packed, or four planes."""
    if pointer.dtype.element_ty == gl.int64:
        gl.store(pointer, pack_gates(r, z, n, hn), mask=mask)
    else:
        gl.store(pointer, r, mask=mask)
        gl.store(pointer + H, z, mask=mask)
        gl.store(pointer + 2 * H, n, mask=mask)
        gl.store(pointer + 3 * H, hn, mask=mask)
