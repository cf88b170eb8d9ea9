"""What the forward kernels of large blocks have in common: parameters of their channels, memory of a turn, inputs, results."""

from __future__ import annotations

from ...triton.math import pack_gates
from ..exchange import send_chunks
from ..gluon import commit_copies, copy_to_shared, gl, jit


@jit
def load_gates(pointer, c, own, H: gl.constexpr):
    """A value for each of three gates and each channel ``c`` of a program's ``own``, ``[CHANNELS, 1]``."""
    r = gl.load(pointer + c, mask=own, other=0.0)[:, None]
    z = gl.load(pointer + H + c, mask=own, other=0.0)[:, None]
    n = gl.load(pointer + 2 * H + c, mask=own, other=0.0)[:, None]
    return r, z, n


@jit
def turn_memory(
    PART: gl.constexpr, PARTS: gl.constexpr, SUM: gl.constexpr, OWN: gl.constexpr, INPUT: gl.constexpr, RING: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """What every other turn has for itself, so that one barrier parts a turn from the next: parts of three products, of type PART
    and shape PARTS, apart from one another, for which the compiler asks no barriers between them; the states to send; a ring of
    inputs on their way."""
    ROWS: gl.constexpr = PARTS[2]
    CHANNELS: gl.constexpr = PARTS[1]
    r = gl.allocate_shared_memory(PART, PARTS, SUM)
    z = gl.allocate_shared_memory(PART, PARTS, SUM)
    n = gl.allocate_shared_memory(PART, PARTS, SUM)
    own = gl.allocate_shared_memory(OWN, [ROWS, CHANNELS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    return (r, z, n), own, gl.allocate_shared_memory(INPUT, [SLOTS, 4 * ROWS, CHANNELS], RING)


@jit
def keep(product, parts):
    """Store the parts of three products."""
    parts[0].store(product[0])
    parts[1].store(product[1])
    parts[2].store(product[2])


@jit
def summed(parts, SUMS: gl.constexpr):
    """A product, fp32, as a tile of gates."""
    return gl.sum(parts.load(SUMS), axis=0).to(gl.float32)


@jit
def send(own, area, to, SLOT: gl.constexpr, AREA: gl.constexpr, SEND: gl.constexpr, chosen=None):
    """A program's slice of the state to all programs, itself as well; of it what is ``chosen``, unless that is None."""
    chunk = gl.expand_dims(own.load(gl.SliceLayout(0, SEND)), 0)
    chunk, _ = gl.broadcast(chunk, area)
    send_chunks(chunk, area, to, SLOT, AREA, chosen)


# Inputs come through a ring of slots ``[4 * ROWS, CHANNELS]``: lines of r, z, n, and a quarter that no one reads.


@jit
def lines_of_slot(
    ring, block, part, first_row, end, H: gl.constexpr, SIZE: gl.constexpr, COPY: gl.constexpr, TILES: gl.constexpr
):
    """Where a slot's lines lie in a step's inputs ``[B, 3, H]``, for slice ``part`` of a block, and which of them there are, of
    each of TILES tiles of rows before row ``end``; every tile's lie ROWS rows after those of the one before.
    """
    ROWS: gl.constexpr = ring.shape[1] // 4
    CHANNELS: gl.constexpr = ring.shape[2]
    line = gl.arange(0, 4 * ROWS, layout=gl.SliceLayout(1, COPY))
    channel = part * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, COPY))
    b = first_row + line % ROWS
    present = ()
    for k in gl.static_range(TILES):
        present = present + (((line < 3 * ROWS) & (b + k * ROWS < end))[:, None] & (channel < SIZE)[None, :],)
    return (b * (3 * H) + line // ROWS * H)[:, None] + (block * SIZE + channel)[None, :], present


@jit
def fetch_inputs(ring, slot, pointers, present):
    """Send for a tile's inputs of a step, to a slot."""
    copy_to_shared(ring.index(slot), pointers, mask=present)
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
