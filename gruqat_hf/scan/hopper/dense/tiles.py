"""What the forward kernels of large blocks have in common: parameters of their channels, inputs on their way, results."""

from __future__ import annotations

from ...triton.math import pack_gates
from ..gluon import gl, jit


@jit
def load_gates(pointer, c, own, H: gl.constexpr):
    """A value for each of three gates and each channel ``c`` of a program's ``own``, ``[CHANNELS, 1]``."""
    r = gl.load(pointer + c, mask=own, other=0.0)[:, None]
    z = gl.load(pointer + H + c, mask=own, other=0.0)[:, None]
    n = gl.load(pointer + 2 * H + c, mask=own, other=0.0)[:, None]
    return r, z, n


@jit
def read_gate(ring, slot, gate: gl.constexpr, GATES: gl.constexpr):
    """A gate's inputs, of a slot ``[4 * ROWS, CHANNELS]``: r, z, n, and a quarter that no one reads."""
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
