"""Scans over time: the reference that defines them, and the table that chooses an implementation."""

from .dispatch import BACKEND_VARIABLE, BACKENDS, Backend, Plan, prepare_plan, run_scan
from .inputs import LayerWeights, ScanGrids, ScanInputs
from .product import OperandProduct
from .reference import observe_scan, scan_reference

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "Backend",
    "LayerWeights",
    "OperandProduct",
    "Plan",
    "ScanGrids",
    "ScanInputs",
    "observe_scan",
    "prepare_plan",
    "run_scan",
    "scan_reference",
]
