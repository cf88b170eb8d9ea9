"""The Hopper tier on a GPU of compute capability 9.0: same contract as the portable kernels, same bits where quantized."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scan_helpers
import torch
from kernel_helpers import Case, check_against_reference, distance, matmul_precision
from scan_helpers import RECIPES, build, clip, gradients

from gruqat_hf.layers import GRULayer
from gruqat_hf.scan.triton.choice import choose

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0, and this machine has none: NOT TESTED here")


def blocks(count: int) -> dict[str, object]:
    return {"kind": "blockdiag", "nblocks": count}


def check(layer: GRULayer, steps: int, rows: int, *, masked: bool = False, precision: str = "high") -> None:
    scan_helpers.check(layer, steps, rows, masked=masked, precision=precision, states_within=2e-4, backend="hopper")


@pytest.mark.parametrize("recipe", [None, "int8_per_channel", "int8_state16"])
@pytest.mark.parametrize("count", [4, 8, 16, 32])
@pytest.mark.parametrize("masked, reverse", [(False, False), (True, True)])
def test_blocks(count, recipe, masked, reverse):
    check(build(blocks(count), recipe, 512, 128, CUDA, reverse=reverse), 48, 33, masked=masked)


@pytest.mark.parametrize("rows", [1, 4, 200])
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 65])
def test_any_number_of_steps_and_rows(steps, rows):
    for recipe in (None, "int8_state16"):
        check(build(blocks(8), recipe, 512, 32, CUDA, reverse=steps % 2 == 0), steps, rows, masked=rows == 4)


@pytest.mark.parametrize("size", [8, 24, 40, 96, 120])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_sizes_that_are_no_powers_of_two(size, recipe):
    check(build(blocks(3), recipe, 3 * size, 37, CUDA), 13, 5, masked=True)


@pytest.mark.parametrize("recipe", ["learned", "affine"])
def test_states_beyond_their_grids(recipe):
    """In "highest": sums of a learned scale's gradient cancel so far that what tf32 products and short gates lose shows."""
    check(clip(build(blocks(8), RECIPES[recipe], 256, 64, CUDA)), 20, 9, masked=True, precision="highest")


@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_alone(size, rows, dtype):
    case = Case(31, rows, 4, size, masked=True, reverse=True, bias=False, dtype=dtype)
    within = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    check_against_reference("hopper_block_diagonal", case.inputs("dense", CUDA), within, 4 * within)
    if dtype == torch.float32:
        case = replace(case, quantized=True, per_channel=True, bias=True)
        check_against_reference("hopper_block_diagonal", case.inputs("dense", CUDA), 0.0, 1e-3)


def test_gradients_of_any_magnitude():
    """Half-precision operands of the backward product are scaled: tiny and large gradients keep their accuracy."""
    layer = build(blocks(8), None, 512, 64, CUDA)
    x, h0 = torch.randn(64, 5, 64, device=CUDA), torch.rand(5, 512, device=CUDA)
    with matmul_precision("high"):
        for factor in (1e-12, 1.0, 1e8):
            found = []
            for backend in ("reference", "hopper"):
                layer.backend = backend
                leaf = x.clone().requires_grad_()
                (layer(leaf, h0)[0].square().sum() * factor).backward()
                found.append(leaf.grad / factor)
            assert distance(*reversed(found)) <= 1e-3


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("count", [4, 8])
def test_200_repeats_are_equal(count, recipe):
    layer = build(blocks(count), recipe, 512, 64, CUDA)
    x, h0 = torch.randn(64, 32, 64, device=CUDA), torch.rand(32, 512, device=CUDA)
    with matmul_precision("high"):
        out, last, wanted = gradients(layer, "hopper", x, h0, None)
        for _ in range(200):
            again, last_again, found = gradients(layer, "hopper", x, h0, None)
            assert torch.equal(again, out) and torch.equal(last_again, last)
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_1024_steps_are_those_of_the_cpu():
    layer = build(blocks(8), "int8_state16", 512, 64, torch.device("cpu"))
    x = torch.randn(1024, 2, 64) * 2
    layer.backend = "reference"
    with torch.no_grad(), matmul_precision("high"):
        wanted, _ = layer(x)
        layer.to(CUDA).backend = "hopper"
        found, _ = layer(x.to(CUDA))
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_cuda_graphs(recipe):
    layer = build(blocks(8), recipe, 512, 64, CUDA)
    layer.backend = "hopper"
    x, new = torch.randn(2, 32, 8, 64, device=CUDA)

    def step():
        layer.zero_grad(set_to_none=True)
        out, last = layer(x)
        (out.sum() + last.sum()).backward()
        with torch.no_grad():
            return out, layer(x)[0]

    with matmul_precision("high"):
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


@pytest.mark.parametrize(
    "count, recipe, precision, reason",
    [
        (2, None, "high", "at most 128"),
        (8, None, "highest", "as exact as fp32"),
        (4, "int4_per_group_64", "high", "2 scales in each row"),
    ],
)
def test_what_is_refused_is_served_by_the_portable_tier(count, recipe, precision, reason):
    layer = build(blocks(count), recipe, 512, 64, CUDA)
    x = torch.randn(4, 3, 64, device=CUDA)
    with matmul_precision(precision):
        for context in (torch.no_grad, torch.enable_grad):
            layer.backend = "auto"
            with context():
                layer(x)
            assert layer.last_path.startswith("triton (hopper: ") and reason in layer.last_path
        layer.backend = "hopper"
        with pytest.raises(RuntimeError, match=reason):
            layer(x)


def test_forced_triton_is_the_portable_tier():
    layer = build(blocks(8), None, 512, 64, CUDA)
    layer.backend = "triton"
    with matmul_precision("high"):
        layer(torch.randn(4, 3, 64, device=CUDA))
    assert layer.last_path == "triton (forced)"
    assert choose(Case(2, 2, 8, 64).inputs("dense", CUDA))[0] == "block_diagonal"
