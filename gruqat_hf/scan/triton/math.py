"""Arithmetic inside kernels: grids, the portable gates bit for bit, and fast gates for the float state.

A kernel that takes a quantized state is launched with ``enable_fp_fusion=False``: every operation is then rounded on its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...arithmetic import gates as portable
from ..capture import is_capturing
from ..spec import MOST_MARKED
from .device import INTERPRETED

#: Inline PTX for exp2 and reciprocal; elsewhere (interpreter, AMD) Triton's own.
PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)
_INTERPRETED = tl.constexpr(INTERPRETED)

#: Float gates are exp2 of a prescaled pre-activation: the factors are folded into weights and biases.
SIGMOID_FACTOR = tl.constexpr(-1.4426950408889634)
TANH_FACTOR = tl.constexpr(-2.8853900817779268)


_factors: dict[torch.device, torch.Tensor] = {}


def gate_factors(device: torch.device) -> torch.Tensor:
    """What weights and biases of r, z and n are multiplied by in the float state, ``[3, 1]``; kept for each device."""
    if (found := _factors.get(device)) is not None:
        return found
    if is_capturing(device):
        # Not to be kept: it holds nothing until the graph runs. Nor can values come from the host meanwhile.
        factors = torch.full((3, 1), SIGMOID_FACTOR.value, device=device)
        factors[2].fill_(TANH_FACTOR.value)
        return factors
    with torch.inference_mode(False):
        values = [[SIGMOID_FACTOR.value], [SIGMOID_FACTOR.value], [TANH_FACTOR.value]]
        _factors[device] = torch.tensor(values, dtype=torch.float32, device=device)
    return _factors[device]


def _squared(value: float) -> float:
    """In fp32, whatever PyTorch's defaults are."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").square().item()


_SIGMOID_CLAMP = tl.constexpr(portable.SIGMOID_CLAMP)
_SIGMOID_CLAMP_SQUARED = tl.constexpr(_squared(portable.SIGMOID_CLAMP))
_SIGMOID_P = tl.constexpr(portable.SIGMOID_NUMERATOR)
_SIGMOID_Q = tl.constexpr((*portable.SIGMOID_DENOMINATOR[0], *portable.SIGMOID_DENOMINATOR[1]))
_TANH_CLAMP = tl.constexpr(portable.TANH_CLAMP)
_TANH_CLAMP_SQUARED = tl.constexpr(_squared(portable.TANH_CLAMP))
_TANH_P = tl.constexpr(portable.TANH_NUMERATOR)
_TANH_Q = tl.constexpr((*portable.TANH_DENOMINATOR[0], *portable.TANH_DENOMINATOR[1]))
_SEED = tl.constexpr(portable.RECIPROCAL_SEED)
_CENTRE = tl.constexpr(portable.RECIPROCAL_CENTRE)

#: 1.5 * 2**23: adding and subtracting it rounds a float below 2**22 to the nearest integer, half to even.
_ROUNDER = tl.constexpr(12582912.0)

_MOST_MARKED = tl.constexpr(MOST_MARKED)


@triton.jit
def count(n):
    """A run-time integer as the bound of ``tl.range``: the interpreter's one-element arrays are no integers for numpy >= 2.4."""
    if _INTERPRETED:
        return n.handle.data.item()
    else:
        return n


@triton.jit
def clamp(x, low, high):
    """``x`` within ``[low, high]``; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def shifted_codes(x, inv_scale, low, high):
    """The sum of :func:`codes` and ``_ROUNDER``."""
    return clamp(x * inv_scale, low, high) + _ROUNDER


@triton.jit
def codes(x, inv_scale, low, high):
    """Integer codes of ``x``, in fp32; equal to ``Grid.codes``, whose bounds are integers, so that clamping may come first."""
    return shifted_codes(x, inv_scale, low, high) - _ROUNDER


@triton.jit
def unshifted(shifted):
    """The codes of :func:`shifted_codes`."""
    return shifted - _ROUNDER


@triton.jit
def code_product(shifted, weight):
    """A code, of :func:`shifted_codes`, times an integer of 8 bits: exact, so that one operation may do the work of two."""
    if PTX:
        return tl.fma(shifted, weight, weight * -_ROUNDER)
    else:
        return unshifted(shifted) * weight


@triton.jit
def in_range(x, inv_scale, low, high):
    """Whether the grid lets the gradient of ``x`` through: its rounded code lies within the bounds."""
    code = (x * inv_scale + _ROUNDER) - _ROUNDER
    return (code >= low) & (code <= high)


@triton.jit
def on_grid(new, z, grid, MARKED: tl.constexpr):
    """The carried state ``new`` on its grid, of :func:`load_grid`, and z: MARKED, for a backward pass, by -1 where the grid
    clips."""
    if MARKED:
        z = tl.where(in_range(new, grid[1], grid[2], grid[3]), z, -1.0)
    return codes(new, grid[1], grid[2], grid[3]) * grid[0], z


@triton.jit
def _rational(x, CLAMP: tl.constexpr, SQUARED: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """The reference's bits, in as few operations one after the other as that takes: rounding is monotonic, so that the square may
    be clamped in place of ``x``, and sums may be computed with both signs changed."""
    s = tl.minimum(x * x, SQUARED, propagate_nan=tl.PropagateNan.ALL)
    x = clamp(x, -CLAMP, CLAMP)
    n = (((s * P[0] + P[1]) * s + P[2]) * s + P[3]) * x
    d = ((s + Q[0]) * s + Q[1]) * ((s + Q[2]) * s + Q[3])
    # Constants on the right: the interpreter takes constant - tensor for a constant.
    y = (-d.to(tl.int32, bitcast=True) + _SEED).to(tl.float32, bitcast=True)
    minus_z = d * y - _CENTRE
    r = n * y
    w = minus_z * minus_z
    return r + ((w - minus_z) * r) * (w + 1.0)


@triton.jit
def portable_sigmoid(x):
    return _rational(x, _SIGMOID_CLAMP, _SIGMOID_CLAMP_SQUARED, _SIGMOID_P, _SIGMOID_Q) + 0.5


@triton.jit
def portable_tanh(x):
    return _rational(x, _TANH_CLAMP, _TANH_CLAMP_SQUARED, _TANH_P, _TANH_Q)


@triton.jit
def exp2(x):
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def to_tf32(x, PRECISION: tl.constexpr):
    """fp32 values rounded to what a tf32 dot reads of them: by itself it cuts bits off, an error that adds up over steps."""
    if PTX and PRECISION == "tf32":
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return x


def round_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """The same for weights, outside of kernels: the high part of a split in two (Dekker 1971), 11 significant bits."""
    spread = values * 8193.0
    return spread - (spread - values)


@triton.jit
def _round_trip(x, grid):
    """``x`` as a grid of :func:`load_grid` represents it."""
    return codes(x, grid[1], grid[2], grid[3]) * grid[0]


@triton.jit
def gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h, PORTABLE: tl.constexpr, grids=None):
    """Gates and next state of one step, ``(r, z, n, hn, next)``, where ``hn = W_n h + b_n``.

    ``gh_*`` are the hidden products with their biases. PORTABLE: as the reference computes, in its order. Else they come
    multiplied by SIGMOID_FACTOR (r, z) and TANH_FACTOR (n), ``gi_*`` do not.

    ``grids``: of :func:`load_gate_grids`, for portable gates; r, z and hn are then marked where one clips, see ``MOST_MARKED``.
    """
    if PORTABLE:
        a_r, a_z = gi_r + gh_r, gi_z + gh_z
        if grids is None:
            r, z = portable_sigmoid(a_r), portable_sigmoid(a_z)
            n = portable_tanh(gi_n + r * gh_n)
            hn = gh_n
            new = (1.0 - z) * n + z * h
        else:
            r, z = portable_sigmoid(_round_trip(a_r, grids[0])), portable_sigmoid(_round_trip(a_z, grids[1]))
            a_n = gi_n + r * gh_n
            n = portable_tanh(_round_trip(a_n, grids[2]))
            new = (1.0 - z) * n + z * h
            r = tl.where(in_range(a_r, grids[0][1], grids[0][2], grids[0][3]), r, -r)
            z = tl.where(in_range(a_z, grids[1][1], grids[1][2], grids[1][3]) | (z >= _MOST_MARKED), z, -z)
            hn = tl.where(in_range(a_n, grids[2][1], grids[2][2], grids[2][3]), gh_n, float("inf"))
    else:
        r = reciprocal(1.0 + exp2(gi_r * SIGMOID_FACTOR + gh_r))
        z = reciprocal(1.0 + exp2(gi_z * SIGMOID_FACTOR + gh_z))
        q = reciprocal(1.0 + exp2(gi_n * TANH_FACTOR + r * gh_n))
        n = 2.0 * q - 1.0
        hn = gh_n * (1.0 / TANH_FACTOR)
        new = q * (2.0 - 2.0 * z) + (z * (h + 1.0) - 1.0)  # (1 - z) * n + z * h with one operation after q
    return r, z, n, hn, new


@triton.jit
def gru_gradients(grad, r, z, n, hn, h, MARKED: tl.constexpr = False):
    """Gradients of one step, from that of its output before the carried state's grid.

    Returns those of the pre-activations of r, z and n, of ``hn``, and the direct part of that of ``h``. MARKED: r, z and hn say
    which pre-activations were clipped, so that their gradients are 0.
    """
    if MARKED:
        open_r, open_z, open_n = r >= 0.0, z >= 0.0, tl.abs(hn) < float("inf")
        r, z, hn = tl.abs(r), tl.abs(z), tl.where(open_n, hn, 0.0)
    da_n = grad * (1.0 - z) * (1.0 - n * n)
    da_z = grad * (h - n) * z * (1.0 - z)
    if MARKED:
        da_n = tl.where(open_n, da_n, 0.0)
        da_z = tl.where(open_z, da_z, 0.0)
    da_r = da_n * hn * r * (1.0 - r)
    if MARKED:
        da_r = tl.where(open_r, da_r, 0.0)
    return da_r, da_z, da_n, da_n * r, grad * z


@triton.jit
def load_grid(grid, index, N: tl.constexpr):
    """Scale, 1 / scale, lowest and highest code of a packed grid ``[4, N]``: scalars, or one for each ``index`` where N > 1."""
    if N == 1:
        return tl.load(grid), tl.load(grid + 1), tl.load(grid + 2), tl.load(grid + 3)
    else:
        return tl.load(grid + index), tl.load(grid + N + index), tl.load(grid + 2 * N + index), tl.load(grid + 3 * N + index)


@triton.jit
def load_gate_grids(grid, index, SHAPE: tl.constexpr):
    """Of the pre-activations' grid, packed as ``[4, *SHAPE]``, those of r, z and n, each as :func:`load_grid` gives it.

    SHAPE is (1 or 3, 1 or H); ``index`` says the channels.
    """
    grids = ()
    for gate in tl.static_range(3):
        first = (gate % SHAPE[0]) * SHAPE[1]
        grids = grids + (load_grid(grid, first + index if SHAPE[1] > 1 else first, SHAPE[0] * SHAPE[1]),)
    return grids


@triton.jit
def _fixed_bits(x):
    """``x`` in [-1, 1] as 16 bits of fixed point, 1.5e-5 off; fp16 would be 2.4e-4 off near 1, where 1 - z and 1 - n² feel it."""
    return (x * 32767.0 + _ROUNDER).to(tl.int32, bitcast=True).to(tl.uint16).to(tl.int64)


@triton.jit
def _fixed_value(bits):
    return bits.to(tl.int16).to(tl.float32) * (1.0 / 32767.0)


@triton.jit
def pack_gates(r, z, n, hn):
    """What the backward pass needs of a step in one int64, r lowest: r, z and n, all in [-1, 1], in fixed point; hn as fp16."""
    half = hn.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int64)
    return _fixed_bits(r) | (_fixed_bits(z) << 16) | (_fixed_bits(n) << 32) | (half << 48)


@triton.jit
def unpack_gates(bits):
    """The four fp32 values of :func:`pack_gates`."""
    hn = (bits >> 48).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return _fixed_value(bits), _fixed_value(bits >> 16), _fixed_value(bits >> 32), hn
