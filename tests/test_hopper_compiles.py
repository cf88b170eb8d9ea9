"""Hopper kernels compile where there is no Hopper GPU, and what they hold in registers stays there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compile_helpers import instead_of_launches, resources
from kernel_helpers import Case, Run, matmul_precision

from gruqat_hf.scan.hopper.device import refuses_version
from gruqat_hf.scan.triton import device
from gruqat_hf.scan.triton.choice import family_rules
from gruqat_hf.scan.triton.device import DeviceFacts

H200 = DeviceFacts(processors=132, shared_bytes=232448, capability=(9, 0))
SLOW = pytest.mark.slow
FAMILIES = {
    "blocks of 64": ("block_diagonal", "dense", Case(4, 4, 8, 64)),
    "blocks of 512": ("dense", "dense", Case(4, 4, 1, 512)),
    "monarch of 8 blocks": ("monarch", "monarch", Case(4, 4, 8, 64)),
    "butterfly of 512": ("monarch", "monarch", Case(4, 4, 16, 32, second=(32, 16), per_gate=True)),
}
MORE = {
    **{f"blocks of {size}": ("block_diagonal", "dense", Case(4, 4, 4, size)) for size in (16, 40, 128)},
    "4 rows a tile": ("block_diagonal", "dense", Case(4, 48, 8, 64)),
    "many rows": ("block_diagonal", "dense", Case(4, 128, 8, 64)),
    "large blocks, many rows": ("block_diagonal", "dense", Case(4, 512, 4, 128)),
    "blocks of 256": ("dense", "dense", Case(4, 4, 2, 256)),
    "full tiles of 256": ("dense", "dense", Case(4, 8, 2, 256)),
    "full tiles of 512": ("dense", "dense", Case(4, 8, 1, 512)),
    "one row of 512": ("dense", "dense", Case(4, 1, 1, 512)),
    "one row of 1024": ("dense", "dense", Case(4, 1, 1, 1024)),
    "tiles that take turns": ("dense", "dense", Case(4, 200, 1, 512)),
    "tiles of 256 that take turns": ("dense", "dense", Case(4, 200, 2, 256)),
    "blocks of 1024": ("dense", "dense", Case(4, 4, 1, 1024)),
    "monarch of many rows": ("monarch", "monarch", Case(4, 128, 8, 64)),
    "butterfly of many rows": ("monarch", "monarch", Case(4, 128, 16, 32, second=(32, 16), per_gate=True)),
    "monarch of 1024": ("monarch", "monarch", Case(4, 4, 8, 128)),
    "monarch of 16 blocks": ("monarch", "monarch", Case(4, 4, 16, 32)),
    "monarch of 4 blocks": ("monarch", "monarch", Case(4, 4, 4, 128)),
}
#: Of floats alone, beyond a cluster.
FLOATS = {f"{tiles} tiles in turns": ("dense", "dense", Case(4, 32 * tiles, 1, 1024)) for tiles in (2, 3, 4)}
#: Of codes alone.
CODES = {
    "codes beyond a byte": ("dense", "dense", Case(4, 4, 1, 768, affine=True)),
    "codes beyond a byte, 4 tiles in turns": ("dense", "dense", Case(4, 128, 1, 768, affine=True)),
    "blocks of 1024 that take turns": ("dense", "dense", Case(4, 200, 1, 1024)),
}
#: Bytes of a thread's stack at most, with any Triton, where registers do not suffice; see docs/kernels.md. "many rows" are tiles
#: of 8. Those of 256 are Triton 3.9's, whose ptxas keeps the same 128 registers less well. A butterfly has fewer registers where
#: that saves a wave of clusters.
SPILLED = {
    "many rows": 24,
    "large blocks, many rows": 232,
    "blocks of 1024 that take turns": 80,
    "blocks of 256": 8,
    "full tiles of 256": 8,
    "tiles of 256 that take turns": 8,
    "butterfly of many rows": 96,
}
RUNS = [(name, quantized) for name in FAMILIES for quantized in (False, True)]
RUNS += [pytest.param(name, quantized, marks=SLOW) for name in MORE for quantized in (False, True)]
RUNS += [pytest.param(name, False, marks=SLOW) for name in FLOATS]
RUNS += [pytest.param(name, True, marks=SLOW) for name in CODES]
#: With a mask, and what learned scales need, and with fp16 tensors.
VARIANTS = [("plain", {}), pytest.param("masked", {"masked": True, "reverse": True}, marks=SLOW)]
VARIANTS += [pytest.param("fp16", {"dtype": torch.float16}, marks=SLOW)]


@pytest.mark.parametrize("variant, change", VARIANTS)
@pytest.mark.parametrize("name, quantized", RUNS)
def test_registers_suffice(monkeypatch, name, quantized, variant, change):
    pytest.importorskip("triton")
    if device.INTERPRETED:
        pytest.skip("compiles kernels, which the interpreter replaces; unset TRITON_INTERPRET: NOT TESTED here")
    if (old := refuses_version()) is not None:
        pytest.skip(f"{old}: NOT TESTED here")
    from triton.backends.compiler import GPUTarget

    kind, operand, case = (FAMILIES | MORE | FLOATS | CODES)[name]
    found = f"hopper_{kind}"
    compiled = instead_of_launches(monkeypatch, GPUTarget("cuda", 90, 32), H200)
    rules = family_rules(found)
    if hasattr(rules, "refuses_clusters"):
        monkeypatch.setattr(rules, "refuses_clusters", lambda size, index: None)
    case = replace(case, quantized=quantized, **change)
    inputs = case.inputs(operand, torch.device("cpu"))
    with matmul_precision("high"):
        reason = rules.refuses(inputs, H200)
        assert reason is None, reason
        run = Run.of(found, inputs)
        run.backward(torch.randn_like(run.states), torch.randn_like(run.h0), want_adjoint=case.masked, want_weights=True)
        module = run.module("forward")
        module.forward(module.prepare(run.spec), inputs.gi, run.h0, run._mask, inputs.reverse, run.states, None)
    hopper = [(call.kernel.__module__, resources(kernel)) for call, kernel in compiled if ".hopper." in call.kernel.__module__]
    assert hopper
    assert [(module, used) for module, used in hopper if used["stack"] > SPILLED.get(name, 0) or used["local"]] == []
