"""The Triton kernels on a GPU, at real sizes."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import distance, matmul_precision
from scan_helpers import RECIPES, STRUCTURES, build, check, clip, gradients

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
EIGHT = {"kind": "blockdiag", "nblocks": 8}
MONARCH8 = {"kind": "monarch", "nblocks": 8}
REAL = {**STRUCTURES, "blockdiag8": EIGHT, "monarch8": MONARCH8}


@pytest.mark.parametrize("precision, states_within, gradients_within", [("highest", 2e-5, 1e-4), ("high", 2e-4, 1e-3)])
@pytest.mark.parametrize("name", REAL)
def test_float(name, precision, states_within, gradients_within):
    """Distances are relative to the norm, from the reference's scan in fp32 over the same input product."""
    layer = build(REAL[name], None, 512, 256, CUDA)
    check(layer, 48, 33, masked=True, precision=precision, states_within=states_within, gradients_within=gradients_within)


@pytest.mark.parametrize("preset", ["int8_per_channel", "int8_state16", "int4_per_group_64"])
@pytest.mark.parametrize("name", REAL)
def test_presets(name, preset):
    check(build(REAL[name], preset, 512, 256, CUDA, reverse=True), 48, 33, masked=True, precision="high")


@pytest.mark.parametrize("name", REAL)
def test_1024_steps_are_those_of_the_cpu(name):
    layer = build(REAL[name], "int8_state16", 512, 64, torch.device("cpu")).freeze()
    x = torch.randn(1024, 2, 64) * 2
    layer.backend = "reference"
    with torch.no_grad():
        wanted, wanted_last = layer(x)
        layer.to(CUDA).backend = "triton"
        found, last = layer(x.to(CUDA))
    assert torch.equal(found.cpu(), wanted) and torch.equal(last.cpu(), wanted_last)


@pytest.mark.parametrize("name", ["diagonal", "blockdiag8", "monarch8", "dense"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_with_states_beyond_their_grids(name, recipe):
    """In "highest": sums of a learned scale's gradient cancel so far that what tf32 products and short gates lose shows."""
    check(clip(build(REAL[name], RECIPES[recipe], 256, 64, CUDA)), 20, 9, masked=True)


@pytest.mark.parametrize(
    "structure, hidden", [("diagonal", 333), ({"kind": "blockdiag", "nblocks": 7}, 7 * 43), ("dense", 130), ("dense", 1)]
)
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_odd_sizes(structure, hidden, recipe):
    layer = build(structure, recipe, hidden, 37, CUDA)
    for steps, rows in ((1, 1), (13, 5)):
        check(layer, steps, rows)


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("name", ["diagonal", "blockdiag8", "monarch8", "butterfly", "dense"])
def test_200_repeats_are_equal(name, recipe):
    layer = build(REAL[name], recipe, 512, 64, CUDA)
    x, h0 = torch.randn(64, 32, 64, device=CUDA), torch.rand(32, 512, device=CUDA)
    with matmul_precision("high"):
        out, last, wanted = gradients(layer, "triton", x, h0, None)
        for _ in range(200):
            again, last_again, found = gradients(layer, "triton", x, h0, None)
            assert torch.equal(again, out) and torch.equal(last_again, last)
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("name", ["diagonal", "blockdiag8", "monarch8", "dense"])
def test_cuda_graphs(name, recipe):
    layer = build(REAL[name], recipe, 512, 64, CUDA)
    layer.backend = "triton"
    x, new = torch.randn(2, 32, 8, 64, device=CUDA)

    def step():
        layer.zero_grad(set_to_none=True)
        out, last = layer(x)
        (out.sum() + last.sum()).backward()
        with torch.no_grad():
            return out, layer(x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trained, inferred = step()
    captured = {key: parameter.grad for key, parameter in layer.named_parameters()}
    x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    results = [trained.clone(), inferred.clone(), *(value.clone() for value in captured.values())]
    eager = [*step(), *(parameter.grad for parameter in layer.parameters())]
    for found, wanted in zip(results, eager):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_compile(recipe):
    layer = build(EIGHT, recipe, 256, 64, CUDA)
    layer.backend = "triton"
    x = torch.randn(16, 4, 64, device=CUDA)
    with torch.no_grad():
        wanted = layer(x)[0]
    compiled = torch.compile(layer, fullgraph=True)
    out, _ = compiled(x)
    out.sum().backward()
    assert distance(out, wanted) <= (1e-5 if recipe is None else 1e-2)
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("dtype, within", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ["diagonal", "blockdiag8", "monarch8", "dense"])
def test_half_precision_and_autocast(name, dtype, within):
    layer = build(REAL[name], None, 256, 64, CUDA)
    x, h0 = torch.randn(24, 7, 64, device=CUDA), torch.rand(7, 256, device=CUDA)
    out, _, wanted = gradients(layer, "reference", x, h0, None)
    with torch.autocast("cuda", dtype):
        mixed, _, found = gradients(layer, "triton", x, h0, None)
    assert distance(mixed, out) <= within
    assert all(distance(found[key], value) <= 2 * within for key, value in wanted.items())
    layer.to(dtype)
    half, _, found = gradients(layer, "triton", x.to(dtype), h0.to(dtype), None)
    assert half.dtype == dtype and distance(half, out) <= within
    assert all(distance(found[key], value) <= 3 * within for key, value in wanted.items())


def test_plans_take_inputs_at_any_address():
    """A prepared launch was compiled for aligned tensors."""
    layer = build(EIGHT, "int8_state16", 128, 5, CUDA)
    layer.backend = "triton"
    x = torch.randn(9, 3, 5, device=CUDA)
    h0 = torch.rand(3, 128, device=CUDA)
    with torch.no_grad():
        wanted = layer(x, h0)[0]
        shifted = [torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape) for value in (x, h0)]
        assert shifted[0].data_ptr() % 16 != 0
        assert torch.equal(layer(*shifted)[0], wanted)
        for steps, rows in ((1, 1), (9, 3), (17, 2), (9, 3)):
            assert layer(torch.randn(steps, rows, 5, device=CUDA))[0].isfinite().all()


def test_peak_memory_when_gates_are_computed_again(monkeypatch):
    layer = build(EIGHT, None, 512, 64, CUDA)
    layer.backend = "triton"
    x = torch.randn(256, 32, 64, device=CUDA)

    def kept() -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = layer(x)  # noqa: F841  holds the graph
        return torch.cuda.memory_allocated() - before

    saved = kept()
    monkeypatch.setenv("GRUQAT_RECOMPUTE_GATES", "1")
    assert kept() <= saved - 256 * 32 * 512 * 4 * 2
