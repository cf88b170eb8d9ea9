"""Kernels compiled for GPUs that the machine does not have: what a launch would compile, and what became of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gruqat_hf.scan.triton import choice, family
from gruqat_hf.scan.triton.device import DeviceFacts
from gruqat_hf.scan.triton.family import KernelCall

_TYPES = {
    **{torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"},
    **{torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"},
}


def compile_for(call: KernelCall, target: Any) -> Any:
    """What a launch would compile for a ``GPUTarget``."""
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    signature, constants, attributes = {}, dict(call.constants), {}
    for position, (name, value) in enumerate(zip(call.kernel.arg_names, (*call.io, *call.static, *call.constants.values()))):
        if value is None or name in call.constants:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(position,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    places = {(call.kernel.arg_names.index(name),): value for name, value in constants.items()}
    make = GluonASTSource if isinstance(call.kernel, GluonJITFunction) else ASTSource
    options = {"num_warps": call.warps, "enable_fp_fusion": not call.portable}
    options["maxnreg"] = call.registers
    return triton.compile(make(call.kernel, signature, places, attributes), target=target, options=options)


def instead_of_launches(monkeypatch: pytest.MonkeyPatch, target: Any, facts: DeviceFacts) -> list[tuple[KernelCall, Any]]:
    """From here on scans on the CPU compile their kernels for a GPU, instead of launching them. A list that they are added to."""
    compiled: list[tuple[KernelCall, Any]] = []
    monkeypatch.setattr(family.KernelCall, "run", lambda call: compiled.append((call, compile_for(call, target))))
    for module in [*sys.modules.values()]:
        if getattr(module, "__name__", "").startswith("gruqat_hf") and hasattr(module, "device_facts"):
            monkeypatch.setattr(module, "device_facts", lambda _: facts)
    monkeypatch.setattr(choice, "refuses_device", lambda _: None)
    return compiled


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, where what is spilled goes, and of local memory, as NVIDIA's tool says."""
    import triton

    tool = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
