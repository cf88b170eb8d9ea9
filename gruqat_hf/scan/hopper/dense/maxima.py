"""The largest gradient of each row, which programs of a cluster tell each other now and then: half-precision gradients that they
exchange need a scale that all of them know. A message has a value for each thread, so it says so several times."""

from __future__ import annotations

from ..exchange import area_of, read_floats, send_floats, wait_for_round
from ..gluon import constexpr_function, gl, jit


@constexpr_function
def maxima_copies(PROGRAMS, ROWS, WARPS):
    """How many values of each row a program gets, of all programs."""
    return max(PROGRAMS, 32 * WARPS // ROWS)


@constexpr_function
def maxima_bytes(PROGRAMS, ROWS, WARPS):
    """Bytes of the slot that this takes."""
    return 4 * ROWS * max(PROGRAMS, 32 * WARPS // ROWS)


@constexpr_function
def maxima_layout(ROWS, WARPS):
    return gl.BlockedLayout([1, 1], [32 // ROWS, ROWS], [WARPS, 1], [1, 0])


@jit
def tell_largest(base, gradient, part, PROGRAMS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Send the largest of each row of ``gradient``, of program ``part``, to all programs."""
    ROWS: gl.constexpr = gradient.shape[1]
    MAXIMA: gl.constexpr = maxima_layout(ROWS, gl.num_warps())
    COPIES: gl.constexpr = maxima_copies(PROGRAMS, ROWS, gl.num_warps())
    copy = gl.arange(0, COPIES, layout=gl.SliceLayout(1, MAXIMA))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MAXIMA))[None, :]
    largest = gl.convert_layout(gl.max(gl.abs(gradient), axis=0), gl.SliceLayout(0, MAXIMA))
    area = area_of(copy % PROGRAMS + row * 0, base)
    largest, _ = gl.broadcast(largest[None, :], area)
    send_floats(largest, area, area + (copy // PROGRAMS * PROGRAMS + part) * (ROWS * 4) + row * 4, SLOT, AREA)


@jit
def hear_largest(
    base, count, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr, GATES: gl.constexpr
):
    """The largest of each row that all programs have told, for the ``count``-th time."""
    MAXIMA: gl.constexpr = maxima_layout(ROWS, gl.num_warps())
    COPIES: gl.constexpr = maxima_copies(PROGRAMS, ROWS, gl.num_warps())
    copy = gl.arange(0, COPIES, layout=gl.SliceLayout(1, MAXIMA))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MAXIMA))[None, :]
    wait_for_round(base, count, SLOT, AREA)
    largest = gl.max(read_floats(base + copy * (ROWS * 4) + row * 4, SLOT, AREA), axis=0)
    return gl.convert_layout(largest, gl.SliceLayout(0, GATES))
