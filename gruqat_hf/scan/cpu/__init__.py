"""Scans on a CPU: kernels in C++, compiled on first use. Importing this compiles nothing."""

from __future__ import annotations

from functools import partial

from ..dispatch import Backend, Run
from ..inputs import ScanInputs
from .plan import prepare

__all__ = ["BACKEND"]


def _select(inputs: ScanInputs) -> Run | str:
    if inputs.gi.device.type != "cpu":
        return f"the scan is on {inputs.gi.device.type}"
    from .training import refuses, run  # registers operators with PyTorch, which takes a while

    reason = refuses(inputs)
    return partial(run, inputs) if reason is None else reason


BACKEND = Backend("cpu", _select, prepare, prepares_dynamic_x=True)
