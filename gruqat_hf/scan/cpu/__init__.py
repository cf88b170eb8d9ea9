"""Scans on a CPU: kernels in C++, compiled on first use. Importing this compiles nothing."""

from __future__ import annotations

from functools import partial

from ..dispatch import Backend, Run
from ..inputs import ScanInputs
from .plan import prepare
from .training import refuses, run

__all__ = ["BACKEND"]


def _select(inputs: ScanInputs) -> Run | str:
    reason = refuses(inputs)
    return partial(run, inputs) if reason is None else reason


BACKEND = Backend("cpu", _select, prepare, prepares_dynamic_x=True)
