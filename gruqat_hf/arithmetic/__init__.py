"""Arithmetic that gives the same bits on every device."""

from __future__ import annotations

from gruqat_hf.arithmetic.gates import portable_sigmoid, portable_tanh
from gruqat_hf.arithmetic.transforms import Elementwise, is_transformed, needs_function

__all__ = ["Elementwise", "is_transformed", "needs_function", "portable_sigmoid", "portable_tanh"]
