"""What a step of a backward scan needs besides its products."""

from __future__ import annotations

from .exchange import area_of, read_floats, send_floats, wait_for_round
from .gluon import constexpr_function, gl, jit

#: What gates in 16-bit fixed point count.
_FIXED = gl.constexpr(1.0 / 32767.0)


@constexpr_function
def _permutation(ORDER):
    return f"prmt.b32 $0, $1, 0x3f, {ORDER};"


@jit
def _bytes(word, ORDER: gl.constexpr):
    """Four bytes, highest first: 0 to 3 are the word's, 4 is 0x3f, 5 is 0."""
    INSTRUCTION: gl.constexpr = _permutation(ORDER)
    return gl.inline_asm_elementwise(INSTRUCTION, "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@jit
def coefficients(saved, h, runs, CLIPPED: gl.constexpr):
    """What multiplies a step's gradient: for the products of r, z, n, for the input's n, and for the state directly.

    A step that does not run, of which ``runs`` tells unless it is None, hands its gradient on. CLIPPED: one that its grid
    clipped, with a negative z, takes none.

    Gates are unpacked as ``unpack_gates`` does it, to the bit, but not by the slow unit that converts 16-bit integers: in bits 8
    to 23 of 0.5 they add 1 / 65536 each, so that one operation more gives the gate; r and z are not negative, but for that mark.
    """
    low = saved.to(gl.int32)
    high = (saved >> 32).to(gl.int32)
    r = gl.fma(_bytes(low, 0x4105).to(gl.float32, bitcast=True), _FIXED * 65536.0, _FIXED * -32768.0)
    z = gl.fma(_bytes(low, 0x4325).to(gl.float32, bitcast=True), _FIXED * 65536.0, _FIXED * -32768.0)
    n = _bytes(high, 0x1055).to(gl.float32) * (_FIXED / 65536.0)
    hn = (saved >> 48).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
    slope = 1.0 - n * n
    if CLIPPED:
        z = gl.where(low >= 0, z, 0.0)
        slope = gl.where(low >= 0, slope, 0.0)
    if runs is not None:
        z = gl.where(runs, z, 1.0)
    c_n = slope - z * slope
    c_hn = c_n * r
    return c_hn * (hn - hn * r), (h - n) * (z - z * z), c_hn, c_n, z


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
def tell_largest(base, gradient, part, PROGRAMS: gl.constexpr, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Send the largest of each row of ``gradient``, of program ``part``, to all programs."""
    ROWS: gl.constexpr = gradient.shape[1]
    MAXIMA: gl.constexpr = _maxima_layout(ROWS, gl.num_warps())
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
    MAXIMA: gl.constexpr = _maxima_layout(ROWS, gl.num_warps())
    COPIES: gl.constexpr = maxima_copies(PROGRAMS, ROWS, gl.num_warps())
    copy = gl.arange(0, COPIES, layout=gl.SliceLayout(1, MAXIMA))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MAXIMA))[None, :]
    wait_for_round(base, count, SLOT, AREA)
    largest = gl.max(read_floats(base + copy * (ROWS * 4) + row * 4, SLOT, AREA), axis=0)
    return gl.convert_layout(largest, gl.SliceLayout(0, GATES))
