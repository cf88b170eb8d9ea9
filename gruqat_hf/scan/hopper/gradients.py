"""What a step of a backward scan needs besides its products."""

from __future__ import annotations

from ..triton.math import gru_gradients, unpack_gates
from .exchange import area_of, read_floats, send_floats, wait_for_round
from .gluon import constexpr_function, gl, jit


@jit
def coefficients(saved, h, runs):
    """What multiplies a step's gradient: for the products of r, z, n, for the input's n, and for the state directly.

    A step that does not run hands its gradient on, one that its grid clipped takes none.
    """
    r, z, n, hn = unpack_gates(saved)
    kept = gl.where((z >= 0.0) & runs, 1.0, 0.0)
    c_r, c_z, c_n, c_hn, direct = gru_gradients(kept, r, z, n, hn, h)
    return c_r, c_z, c_hn, c_n, gl.where(runs, direct, 1.0)


@jit
def powers(largest, TARGET: gl.constexpr):
    """For each row, the power of two that brings its largest gradient near 2**TARGET, and its inverse; both finite and not 0."""
    exponent = gl.minimum(gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 30), 253)
    up = ((254 + TARGET - exponent) << 23).to(gl.float32, bitcast=True)
    return up, ((exponent - TARGET) << 23).to(gl.float32, bitcast=True)


# Half-precision gradients that programs of a cluster exchange need a scale that all of them know. Now and then each tells all
# others the largest gradient that it has in each row. A message has a value for each thread, so it says so several times.


@constexpr_function
def maxima_copies(PROGRAMS, ROWS, WARPS):
    """How many values of each row a program gets, of all programs."""
    return max(PROGRAMS, 32 * WARPS // ROWS)


@constexpr_function
def maxima_bytes(PROGRAMS, ROWS, WARPS):
    """Bytes of the slot that this takes."""
    return 4 * ROWS * max(PROGRAMS, 32 * WARPS // ROWS)


@constexpr_function
def _maxima_layout(ROWS, WARPS):
    return gl.BlockedLayout([1, 1], [32 // ROWS, ROWS], [WARPS, 1], [1, 0])


@jit
def tell_largest(gradient, part, PROGRAMS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Send the largest of each row of ``gradient``, of program ``part``, to all programs."""
    ROWS: gl.constexpr = gradient.shape[1]
    MAXIMA: gl.constexpr = _maxima_layout(ROWS, gl.num_warps())
    COPIES: gl.constexpr = maxima_copies(PROGRAMS, ROWS, gl.num_warps())
    copy = gl.arange(0, COPIES, layout=gl.SliceLayout(1, MAXIMA))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MAXIMA))[None, :]
    largest = gl.convert_layout(gl.max(gl.abs(gradient), axis=0), gl.SliceLayout(0, MAXIMA))
    area = area_of(copy % PROGRAMS + row * 0)
    largest, _ = gl.broadcast(largest[None, :], area)
    send_floats(largest, area, area + (copy // PROGRAMS * PROGRAMS + part) * (ROWS * 4) + row * 4, SLOT, AREA)


@jit
def hear_largest(count, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr, GATES: gl.constexpr):
    """The largest of each row that all programs have told, for the ``count``-th time."""
    MAXIMA: gl.constexpr = _maxima_layout(ROWS, gl.num_warps())
    COPIES: gl.constexpr = maxima_copies(PROGRAMS, ROWS, gl.num_warps())
    copy = gl.arange(0, COPIES, layout=gl.SliceLayout(1, MAXIMA))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MAXIMA))[None, :]
    wait_for_round(count, SLOT, AREA)
    largest = gl.max(read_floats(copy * (ROWS * 4) + row * 4, SLOT, AREA), axis=0)
    return gl.convert_layout(largest, gl.SliceLayout(0, GATES))
