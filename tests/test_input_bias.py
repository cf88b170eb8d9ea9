"""The bias of the input product where the scan gives it its gradient, which on a GPU takes no pass of its own over all rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import distance, matmul_precision
from scan_helpers import STRUCTURES, build, gradients
from torch import Tensor, nn

from gruqat_hf.layers import GRULayer
from gruqat_hf.layers.execution import GRUExecution
from gruqat_hf.scan import ScanInputs, run_scan, scan_reference
from gruqat_hf.scan.triton.device import INTERPRETED

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = "triton" if INTERPRETED else "cpu"

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in Triton's interpreter, in a process that test_triton_scan.py starts"
)


def _by_scan(monkeypatch: pytest.MonkeyPatch, on: bool = True) -> None:
    """As on a GPU, or not even there."""
    monkeypatch.setattr(GRUExecution, "_scan_sums_bias_input", lambda *_: on and torch.is_grad_enabled())


def _both_ways(
    monkeypatch: pytest.MonkeyPatch, layer: GRULayer, backend: str, x: Tensor, h0: Tensor, mask: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All gradients by the input product and by the scan; states must be the same bits."""
    _by_scan(monkeypatch, False)
    out, last, wanted = gradients(layer, backend, x, h0, mask)
    _by_scan(monkeypatch)
    found_out, found_last, found = gradients(layer, backend, x, h0, mask)
    assert torch.equal(found_out, out) and torch.equal(found_last, last)
    assert found.keys() == wanted.keys()
    return found, wanted


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize("name", ["diagonal", "blockdiag", "monarch", "dense"])
def test_same_gradients(monkeypatch, name, backend, recipe):
    layer = build(STRUCTURES[name], recipe, 16, 4, CPU, reverse=True)
    found, wanted = _both_ways(monkeypatch, layer, backend, torch.randn(4, 3, 4), torch.rand(3, 16), torch.rand(4, 3) > 0.3)
    for key, gradient in wanted.items():
        assert distance(found[key], gradient) <= 1e-6, key


@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize("frozen", ["weights", "bias", "all but the bias"])
def test_parameters_that_do_not_train(monkeypatch, backend, frozen):
    layer = build(STRUCTURES["blockdiag"], None, 16, 4, CPU)
    for name, parameter in layer.named_parameters():
        is_bias = name == "bias_input"
        parameter.requires_grad_(not is_bias if frozen == "bias" else is_bias or (frozen == "weights" and "weight" not in name))
    found, wanted = _both_ways(monkeypatch, layer, backend, torch.randn(4, 3, 4), torch.rand(3, 16), None)
    assert ("bias_input" in wanted) == (frozen != "bias")
    for key, gradient in wanted.items():
        assert distance(found[key], gradient) <= 1e-6, key


@pytest.mark.parametrize("backend", ["reference", KERNELS])
def test_alone_it_trains(backend):
    """Nothing else of the scan needs a gradient."""
    hidden = 16
    layer = build(STRUCTURES["diagonal"], None, hidden, 4, CPU).requires_grad_(False)
    bias = torch.zeros(3, hidden, requires_grad=True)
    gi = torch.randn(4, 3, 3, hidden)
    inputs = ScanInputs(gi, torch.rand(3, hidden), layer._operand(layer.weight_hidden))
    assert not inputs.needs_grad and replace(inputs, bias_input=bias).needs_grad
    with matmul_precision("highest"):
        states, last, _ = run_scan(replace(inputs, bias_input=bias), backend)
        (states.sum() + last.sum()).backward()
        apart = torch.zeros(3, hidden, requires_grad=True)
        states, last = scan_reference(replace(inputs, gi=gi + apart))
        (states.sum() + last.sum()).backward()
    assert distance(bias.grad, apart.grad) <= 1e-6


@pytest.mark.parametrize("backend", ["reference", KERNELS])
def test_gradient_checkpointing(monkeypatch, backend):
    layer = build(STRUCTURES["blockdiag"], None, 16, 4, CPU).train()
    layer.gradient_checkpointing = True
    found, wanted = _both_ways(monkeypatch, layer, backend, torch.randn(4, 3, 4), torch.rand(3, 16), None)
    for key, gradient in wanted.items():
        assert distance(found[key], gradient) <= 1e-6, key


@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize("dtype, within", [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision_and_autocast(monkeypatch, dtype, within, backend):
    if backend == "cpu":
        backend = "reference"
    layer = build(STRUCTURES["diagonal"], None, 16, 4, CPU)
    x, h0 = torch.randn(4, 3, 4), torch.rand(3, 16)
    with torch.autocast("cpu", dtype):
        found, wanted = _both_ways(monkeypatch, layer, backend, x, h0, None)
    assert found["bias_input"].dtype == torch.float32
    assert distance(found["bias_input"], wanted["bias_input"]) <= 1e-6
    layer.to(dtype)
    found, wanted = _both_ways(monkeypatch, layer, backend, x.to(dtype), h0.to(dtype), None)
    assert found["bias_input"].dtype == dtype
    assert distance(found["bias_input"], wanted["bias_input"]) <= within


@pytest.mark.parametrize("name", ["diagonal", "dense", "monarch"])
def test_compiled(monkeypatch, name):
    """By the scan's operators where they run, by the reference else."""
    _by_scan(monkeypatch)
    layer = build(STRUCTURES[name], None, 16, 4, CPU)
    layer.backend = "triton" if INTERPRETED else "reference"
    x, h0 = torch.randn(3, 2, 4), torch.rand(2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (layer, compiled):
        layer.zero_grad()
        out, last = run(x, h0)
        (out.sin().sum() + last.sum()).backward()
        found.append({key: parameter.grad.clone() for key, parameter in layer.named_parameters()})
    for key, gradient in found[0].items():
        assert distance(found[1][key], gradient) <= 1e-6, key


def test_without_rows():
    bias = torch.zeros(3, 8, requires_grad=True)
    layer = build(STRUCTURES["diagonal"], None, 8, 4, CPU)
    inputs = ScanInputs(torch.randn(4, 0, 3, 8), torch.rand(0, 8), layer._operand(layer.weight_hidden), bias_input=bias)
    states, _, _ = run_scan(inputs)
    states.sum().backward()
    assert torch.equal(bias.grad, torch.zeros(3, 8))


@interpreted
def test_gradients_share_no_memory(monkeypatch):
    """What is done to one in place must not be done to another."""
    _by_scan(monkeypatch)
    layer = build(STRUCTURES["blockdiag"], None, 16, 4, CPU)
    _, _, _ = gradients(layer, "triton", torch.randn(4, 3, 4), torch.rand(3, 16), None)
    before = layer.bias_hidden.grad.clone()
    layer.bias_input.grad.fill_(7.0)
    assert torch.equal(layer.bias_hidden.grad, before)


REAL = {**STRUCTURES, "blockdiag8": {"kind": "blockdiag", "nblocks": 8}, "monarch8": {"kind": "monarch", "nblocks": 8}}


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", REAL)
def test_gradients_on_a_gpu(name, backend, recipe):
    """Of every parameter, as the reference has them in float64's stead: fp32 over the same input product."""
    layer = build(REAL[name], recipe, 512, 64, CUDA)
    x, h0 = torch.randn(24, 9, 64, device=CUDA), torch.rand(9, 512, device=CUDA)
    mask = torch.rand(24, 9, device=CUDA) > 0.3
    with matmul_precision("highest"):
        _, _, wanted = gradients(layer, "reference", x, h0, mask)
    with matmul_precision("high"):
        _, _, found = gradients(layer, backend, x, h0, mask)
    assert found.keys() == wanted.keys() and "bias_input" in found
    for key, gradient in wanted.items():
        assert distance(found[key], gradient) <= 2e-3, key


@pytest.mark.gpu
def test_ddp_finds_a_gradient_for_every_parameter():
    """Hooks of parameters run, which DDP waits for."""
    layer = build(REAL["dense"], None, 256, 64, CUDA)
    seen: set[str] = set()
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.add(name))
    layer(torch.randn(5, 3, 64, device=CUDA))[0].sum().backward()
    assert seen == {name for name, _ in layer.named_parameters()}
