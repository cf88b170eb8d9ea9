"""Scans over time: the reference that defines them, and the table that chooses an implementation."""

from .capture import is_capturing
from .cpu import BACKEND as _CPU
from .dispatch import (
    BACKEND_VARIABLE,
    BACKENDS,
    Backend,
    Plan,
    check_backend,
    input_order,
    prepare_plan,
    run_first_product,
    run_product,
    run_scan,
)
from .hopper import BACKEND as _HOPPER
from .inputs import LayerWeights, ScanGrids, ScanInputs, exchange_order
from .product import OperandProduct
from .reference import observe_scan, scan_reference
from .triton import BACKEND as _TRITON

BACKENDS.insert(-1, _CPU)
BACKENDS[:0] = [_HOPPER, _TRITON]

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "Backend",
    "LayerWeights",
    "OperandProduct",
    "Plan",
    "ScanGrids",
    "ScanInputs",
    "check_backend",
    "exchange_order",
    "input_order",
    "is_capturing",
    "observe_scan",
    "prepare_plan",
    "run_first_product",
    "run_product",
    "run_scan",
    "scan_reference",
]
