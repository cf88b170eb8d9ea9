"""What the choice of a kernel needs to know about a device; no import of triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

#: Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when kernels are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """What ``torch.compiler.assume_constant_result`` does, without its second of importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class DeviceFacts:
    """Attributes:
    processors: streaming multiprocessors, or compute units.
    shared_bytes: most shared memory that one program can have.
    capability: compute capability, ``(9, 0)`` for Hopper; (0, 0) where it means nothing.
    """

    processors: int
    shared_bytes: int
    capability: tuple[int, int]


@constant
def refuses_device(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None if they can."""
    return _refuses_device(device.type, device.index)


@cache
def _refuses_device(kind: str, index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None if kind == "cpu" else "Triton's interpreter is on, which runs on the CPU"
    if kind != "cuda":
        return f"no GPU kernel runs on device {kind!r}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (7, 5):
        return "the GPU is older than compute capability 7.5"
    return None


@constant
def device_facts(device: torch.device) -> DeviceFacts:
    """Sizes of a device that kernels run on."""
    return _device_facts(device.type, device.index)


@cache
def _device_facts(kind: str, index: int | None) -> DeviceFacts:
    if kind != "cuda":
        return DeviceFacts(1, 1 << 16, (0, 0))
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
    capability = (properties.major, properties.minor) if torch.version.hip is None else (0, 0)
    return DeviceFacts(properties.multi_processor_count, shared, capability)


@constant
def wants_fp32_products() -> bool:
    """Whether PyTorch is set to fp32 accuracy in products of floats."""
    return torch.get_float32_matmul_precision() == "highest"
