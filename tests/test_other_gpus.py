"""The portable kernels compile for GPUs that no test machine has: older and newer ones of NVIDIA, and AMD's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compile_helpers import instead_of_launches
from kernel_helpers import Case, Run

from gruqat_hf.operands import DiagonalOperand, Factor
from gruqat_hf.scan.triton import choice, device
from gruqat_hf.scan.triton.device import DeviceFacts

pytestmark = pytest.mark.slow

#: Shared memory of a program and processors, as the vendors give them.
GPUS = {
    "turing": (("cuda", 75, 32), DeviceFacts(processors=40, shared_bytes=65536, capability=(7, 5))),
    "ampere": (("cuda", 80, 32), DeviceFacts(processors=108, shared_bytes=166912, capability=(8, 0))),
    "ada": (("cuda", 89, 32), DeviceFacts(processors=128, shared_bytes=101376, capability=(8, 9))),
    "blackwell": (("cuda", 100, 32), DeviceFacts(processors=148, shared_bytes=232448, capability=(10, 0))),
    "mi300": (("hip", "gfx942", 64), DeviceFacts(processors=304, shared_bytes=65536, capability=(0, 0))),
}
CASES = {
    "diagonal": ("diagonal", Case(4, 4, 512, 1)),
    "blockdiag8": ("dense", Case(4, 4, 8, 64)),
    "dense": ("dense", Case(4, 4, 1, 512)),
    "monarch8": ("monarch", Case(4, 4, 8, 64)),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_compile(monkeypatch, gpu, name, quantized):
    pytest.importorskip("triton")
    if device.INTERPRETED:
        pytest.skip("compiles kernels, which the interpreter replaces; unset TRITON_INTERPRET: NOT TESTED here")
    from triton.backends.compiler import GPUTarget

    target, facts = GPUS[gpu]
    if (target[0] == "hip") != (torch.version.hip is not None):
        pytest.skip("a build of PyTorch for the other vendor's GPUs: test_amd makes this one pass for it")
    compiled = instead_of_launches(monkeypatch, GPUTarget(*target), facts)
    kind, case = CASES[name]
    inputs = replace(case, quantized=quantized).inputs("monarch" if kind == "monarch" else "dense", torch.device("cpu"))
    if kind == "diagonal":
        blocks = inputs.operand.factors["blocks"]
        scale = None if blocks.scale is None else blocks.scale[..., 0, 0]
        inputs = replace(inputs, operand=DiagonalOperand(Factor(blocks.values[..., 0, 0], scale, blocks.qmax)))
    found, reason = choice.choose(inputs)
    assert found is not None, reason
    torch.set_float32_matmul_precision("high")
    try:
        run = Run.of(found, inputs)
        run.backward(torch.randn_like(run.states), torch.randn_like(run.h0), want_weights=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(compiled) >= 2


def test_amd():
    """Kernels look at PyTorch's build when they are defined, so that these need a process of their own."""
    pytest.importorskip("triton")
    program = "import sys, torch, pytest; torch.version.hip = '6.3'; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", "-m", "slow", "-k", "mi300", __file__]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
