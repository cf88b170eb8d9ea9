"""The largest gradient of each row, which programs of a cluster tell each other now and then.

They all must know by which power of two a row is scaled. Each warp tells the largest of its 16 channels, and looks at all that
was told: nobody waits at a barrier for that.
"""

from __future__ import annotations

from ..exchange import read_floats, send_floats, wait_for_round
from ..gluon import constexpr_function, gl, jit


@constexpr_function
def maxima_bytes(BLOCK, ROWS):
    """Bytes of the slot: a value for each channel and row, since each thread sends as many values as it has gradients."""
    return 4 * BLOCK * ROWS


@constexpr_function
def _copies(PROGRAMS):
    """How often a warp tells each program."""
    return 16 // PROGRAMS


@constexpr_function
def _heard_layout(TOLD, ROWS, WARPS):
    """Of all that was told ``[TOLD, ROWS]``, in each warp: a lane has values of the row that its gradients are of."""
    registers = [[1 << bit, 0] for bit in range(3, TOLD.bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (WARPS.bit_length() - 1), [], [TOLD, ROWS])


@jit
def program_told(u, PROGRAMS: gl.constexpr):
    """Which program is told by the thread that has channel ``u``."""
    return u % PROGRAMS


@jit
def tell_largest(gradient, u, area, part, PROGRAMS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Send the largest of each row of ``gradient`` to all programs, from ``part``; ``area`` is that of :func:`program_told`."""
    BLOCK: gl.constexpr = gradient.shape[0]
    ROWS: gl.constexpr = gradient.shape[1]
    COPIES: gl.constexpr = _copies(PROGRAMS)
    by_warp = gl.abs(gradient).reshape([BLOCK // 16, 16, ROWS])
    largest, _ = gl.broadcast(gl.max(by_warp, axis=1, keep_dims=True), by_warp)
    largest = gl.convert_layout(largest.reshape([BLOCK, ROWS]), gradient.type.layout, assert_trivial=True)
    j = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gradient.type.layout))[None, :]
    told = (part * (BLOCK // 16) + u // 16) * COPIES + u % 16 // PROGRAMS
    send_floats(largest, area, area + (told[:, None] * ROWS + j) * 4, SLOT, AREA)


@jit
def hear_largest(
    base, count, PROGRAMS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr,
    GATES: gl.constexpr,
):  # fmt: skip
    """The largest of each row that all programs have told, for the ``count``-th time."""
    TOLD: gl.constexpr = PROGRAMS * (BLOCK // 16)
    HEARD: gl.constexpr = _heard_layout(TOLD, ROWS, BLOCK // 16)
    told = gl.arange(0, TOLD, layout=gl.SliceLayout(1, HEARD))[:, None] * _copies(PROGRAMS)
    j = gl.arange(0, ROWS, layout=gl.SliceLayout(0, HEARD))[None, :]
    wait_for_round(base, count, SLOT, AREA)
    largest = gl.max(read_floats(base + (told * ROWS + j) * 4, SLOT, AREA), axis=0)
    return gl.convert_layout(largest, gl.SliceLayout(0, GATES), assert_trivial=True)
