"""Scans on a CPU: kernels in C++, compiled on first use. Importing this compiles nothing."""

from __future__ import annotations

from ..dispatch import Backend
from .plan import prepare
from .training import refuses, run

__all__ = ["BACKEND"]

BACKEND = Backend("cpu", refuses, run, prepare, prepares_dynamic_x=True)
