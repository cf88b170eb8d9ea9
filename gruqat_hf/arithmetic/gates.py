"""Portable sigmoid and tanh: the same bits on CPU eager, CUDA eager and in a kernel.

The functions are part of the checkpoint format: changing a constant or the order of two operations changes what every saved
quantized model computes. `scripts/fit_gates.py` documents where the constants come from.

Recipe of tanh. All values are fp32 (bit patterns int32), every operation is rounded on its own, round to nearest even, and no
multiplication is contracted with an addition (Triton: `enable_fp_fusion=False`; C++: `-ffp-contract=off`). With
(p3, p2, p1, p0) = TANH_NUMERATOR, ((a, b), (c, e)) = TANH_DENOMINATOR:

    x  = min(max(x, -TANH_CLAMP), TANH_CLAMP)      NaN stays NaN
    s  = x * x
    n  = (((p3 * s + p2) * s + p1) * s + p0) * x
    d  = ((s + a) * s + b) * ((s + c) * s + e)
    y  = as_float(RECIPROCAL_SEED - as_int(d))     1 / d within 5 %
    z  = RECIPROCAL_CENTRE - d * y
    r  = n * y
    w  = z * z
    tanh = r + ((z + w) * r) * (w + 1)             r * (1 + z + z^2 + z^3 + z^4), the constants centred for the least error

That is 27 operations, of which 15 follow each other. sigmoid(x) = tanh(x * 0.5) * 0.5 + 0.5. Both halvings only move exponents,
so the same bits come, two operations sooner, from the recipe of tanh with SIGMOID_CLAMP, SIGMOID_NUMERATOR, SIGMOID_DENOMINATOR
and a final `+ 0.5`; this module does that.

What holds for every fp32 input: the error is below 1e-6 (tanh) and 5e-7 (sigmoid); tanh is exactly odd and zeros keep their
sign; |tanh| <= 1 and 0 <= sigmoid <= 1. The clamp is the first input whose rounded value is 1, so from there on, infinities
included, the values are exactly 1, -1 and 0. As the input grows, the value never falls by as much as the error bound.

NaN gives NaN, because `Tensor.clamp` hands NaN on and all later operations do. A kernel must ask for that in its clamp:
`tl.minimum` and `tl.maximum` drop NaN unless given `propagate_nan=tl.PropagateNan.ALL`, and C's `fminf` and `fmaxf` always do.
Denormal intermediates (they count only in tanh of |x| < 2^-100) need denormals switched on, as they are by default on every
path. A compiler that contracts multiply and add (`torch.compile` on a GPU) is outside the promise unless told not to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .transforms import Elementwise, needs_function

__all__ = [
    "RECIPROCAL_CENTRE",
    "RECIPROCAL_SEED",
    "SIGMOID_CLAMP",
    "SIGMOID_DENOMINATOR",
    "SIGMOID_NUMERATOR",
    "TANH_CLAMP",
    "TANH_DENOMINATOR",
    "TANH_NUMERATOR",
    "portable_sigmoid",
    "portable_tanh",
]

Numerator = tuple[float, float, float, float]
Denominator = tuple[tuple[float, float], tuple[float, float]]

# Output of scripts/fit_gates.py. Every float is exactly an fp32 value, so a conversion from Python's double changes nothing.
TANH_CLAMP: float = float.fromhex("0x1.ec9efcp+2")  # 7.6972036
TANH_NUMERATOR: Numerator = (
    float.fromhex("0x1.79d2f4p+5"),  # 47.228004
    float.fromhex("0x1.852706p+13"),  # 12452.878
    float.fromhex("0x1.0cbb46p+19"),  # 550362.2
    float.fromhex("0x1.048116p+22"),  # 4268101.5
)
TANH_DENOMINATOR: Denominator = (
    (float.fromhex("0x1.c6cc92p+9"), float.fromhex("0x1.38d106p+14")),  # 909.5982, 20020.256
    (float.fromhex("0x1.63783ap+6"), float.fromhex("0x1.aa6156p+7")),  # 88.86741, 213.19011
)
RECIPROCAL_SEED: int = 0x7EF30000
RECIPROCAL_CENTRE: float = float.fromhex("0x1.00004ap+0")  # 1.0000044

# The halvings of sigmoid folded in: powers of two, hence exact.
SIGMOID_CLAMP: float = 2 * TANH_CLAMP
SIGMOID_NUMERATOR: Numerator = (
    TANH_NUMERATOR[0],
    4 * TANH_NUMERATOR[1],
    16 * TANH_NUMERATOR[2],
    64 * TANH_NUMERATOR[3],
)
SIGMOID_DENOMINATOR: Denominator = (
    (4 * TANH_DENOMINATOR[0][0], 16 * TANH_DENOMINATOR[0][1]),
    (4 * TANH_DENOMINATOR[1][0], 16 * TANH_DENOMINATOR[1][1]),
)


def portable_sigmoid(x: Tensor) -> Tensor:
    """Logistic sigmoid of a float32 tensor of any shape, with the same bits on every device; differentiable.

    Raises ValueError for other dtypes.
    """
    x = _require_float32(x, "portable_sigmoid")
    return _Sigmoid.apply(x) if needs_function(x) else _Sigmoid.forward(x)


def portable_tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent of a float32 tensor of any shape, with the same bits on every device; differentiable.

    Raises ValueError for other dtypes.
    """
    x = _require_float32(x, "portable_tanh")
    return _Tanh.apply(x) if needs_function(x) else _Tanh.forward(x)


def _require_float32(x: Tensor, name: str) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError(f"{name} takes a torch.float32 tensor, but x.dtype is {x.dtype}; call {name}(x.float())")
    return x


class _Constants:
    """Constants of the recipe as zero-dimensional CPU tensors, which act as scalars on every device and cost half the time of
    Python numbers on small inputs; and as such numbers, for the fake tensors of a trace, which do not mix with real ones."""

    def __init__(self, numerator: Numerator, denominator: Denominator) -> None:
        self.numbers = (*numerator, *denominator[0], *denominator[1], RECIPROCAL_CENTRE, 1.0, 0.5, RECIPROCAL_SEED)
        floats = [torch.tensor(v, dtype=torch.float32, device="cpu") for v in self.numbers[:-1]]
        self.tensors = (*floats, torch.tensor(RECIPROCAL_SEED, dtype=torch.int32, device="cpu"))

    def for_value(self, x: Tensor) -> tuple[Any, ...]:
        return self.tensors if type(x) is Tensor else self.numbers


_TANH = _Constants(TANH_NUMERATOR, TANH_DENOMINATOR)
_SIGMOID = _Constants(SIGMOID_NUMERATOR, SIGMOID_DENOMINATOR)


def _rational(x: Tensor, clamp: float, constants: tuple[Any, ...]) -> Tensor:
    """The recipe in the module's docstring. In place where a value is not needed again; no operation that could fuse."""
    p3, p2, p1, p0, a, b, c, e, centre, one, _, seed = constants
    x = x.clamp(-clamp, clamp)
    s = x * x
    n = (s * p3).add_(p2).mul_(s).add_(p1).mul_(s).add_(p0).mul_(x)
    d = (s + a).mul_(s).add_(b)
    d.mul_((s + c).mul_(s).add_(e))
    y = (seed - d.view(torch.int32)).view(torch.float32)
    z = centre - d.mul_(y)
    r = n.mul_(y)
    w = z * z
    correction = z.add_(w).mul_(r).mul_(w.add_(one))
    return r.add_(correction)


class _Sigmoid(Elementwise):
    """Saves the output, of which the derivative is a polynomial; so does `_Tanh`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        constants = _SIGMOID.for_value(x)
        half = constants[-2]
        return _rational(x, SIGMOID_CLAMP, constants).add_(half)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (y * (1.0 - y))


class _Tanh(Elementwise):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _rational(x, TANH_CLAMP, _TANH.for_value(x))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1.0 - y * y)
