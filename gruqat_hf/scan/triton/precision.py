"""How exact a scan's float products must be."""

from __future__ import annotations

import torch

from ..inputs import ScanInputs
from ..spec import ScanSpec
from .device import INTERPRETED, device_facts, wants_fp32_products


def is_exact(inputs: ScanInputs) -> bool:
    """Whether float products must be accurate to fp32."""
    return wants_fp32_products() and inputs.gi.dtype == torch.float32


def spec_of(inputs: ScanInputs) -> ScanSpec:
    return ScanSpec(inputs.operand, inputs.bias, inputs.grids, inputs.quantized, is_exact(inputs))


def fp32_precision(spec: ScanSpec) -> str:
    """How dots of fp32 operands are computed."""
    if INTERPRETED:
        return "tf32"
    device = next(iter(spec.operand.factors.values())).values.device
    if torch.version.hip is None and device_facts(device).capability < (8, 0):
        return "ieee"
    return "tf32x3" if spec.exact else "tf32"
