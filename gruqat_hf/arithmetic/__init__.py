"""Arithmetic that gives the same bits on every device."""

from __future__ import annotations

from gruqat_hf.arithmetic.gates import portable_sigmoid, portable_tanh

__all__ = ["portable_sigmoid", "portable_tanh"]
