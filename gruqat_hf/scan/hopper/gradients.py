"""What a step of a backward scan needs besides its products."""

from __future__ import annotations

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
    (A gate that was NaN is some number here: what its row then gives is of no use, as that of ``unpack_gates`` is.)
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
