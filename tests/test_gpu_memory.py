"""What CUDA graphs and several streams read of what a layer keeps between calls; and batches beyond one axis of a grid."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_helpers import distance, matmul_precision
from scan_helpers import build

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
STRUCTURES = {
    "diagonal": "diagonal",
    "block-diagonal": {"kind": "blockdiag", "nblocks": 8},
    "dense": "dense",
    "monarch": {"kind": "monarch", "nblocks": 8},
}
structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
recipes = pytest.mark.parametrize("recipe", [None, "int8_state16"])
backends = pytest.mark.parametrize("backend", ["triton", "auto"])


def overwrite_free_memory() -> None:
    """What was freed is handed out again, and holds NaN then."""
    torch.cuda.synchronize()
    junk = [torch.full((size,), torch.nan, device=CUDA) for size in (64, 4096, 65536, 1 << 18, 1 << 20) for _ in range(40)]
    torch.cuda.synchronize()
    del junk


def capture(layer, x):
    """A graph of an inference, and what it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out, last = layer(x)
    return graph, out, last


@backends
@recipes
@structures
def test_a_graph_of_an_inference_outlives_what_comes_after(structure, recipe, backend):
    layer = build(structure, recipe, 512, 64, CUDA)
    layer.backend = backend
    x, new = torch.randn(2, 24, 8, 64, device=CUDA)
    with matmul_precision("high"):
        with torch.no_grad():
            layer(x)
            wanted = [value.clone() for value in layer(new)]
        graph, *found = capture(layer, x)
        with torch.no_grad():
            for rows in (40, 1, 300):
                layer(torch.randn(5, rows, 64, device=CUDA))
        layer.train()
        layer(x)[0].sum().backward()
        layer.zero_grad(set_to_none=True)
        layer.eval()
        overwrite_free_memory()
        x.copy_(new)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@recipes
@structures
def test_a_graph_of_the_first_inference_takes_weights_as_they_are(structure, recipe):
    """Nothing was prepared: what is prepared while a graph is recorded holds nothing until it is replayed."""
    layer = build(structure, recipe, 512, 64, CUDA)
    layer.backend = None
    x, new = torch.randn(2, 24, 8, 64, device=CUDA)
    with matmul_precision("high"), torch.no_grad():
        other = copy.deepcopy(layer)
        other._plan = lambda x: None  # as while a graph is recorded: compiles what it will launch
        other(x)
        graph, *found = capture(layer, x)
        overwrite_free_memory()
        eager = layer(new)
        wanted = [value.clone() for value in layer(x)]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        assert all(torch.equal(a, b) for a, b in zip(layer(new), eager))
        if recipe is None:
            layer.bias_hidden.add_(0.5)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, layer(x)))


@recipes
@structures
def test_another_stream_waits_for_what_one_prepares(structure, recipe):
    layer = build(structure, recipe, 512, 64, CUDA)
    layer.backend = None
    x = torch.randn(24, 8, 64, device=CUDA)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with matmul_precision("high"), torch.no_grad():
        wanted, _ = layer(x)
        layer.eval()  # forgets what it has prepared
        overwrite_free_memory()
        with torch.cuda.stream(first):
            torch.cuda._sleep(200_000_000)
            layer(x)
        with torch.cuda.stream(second):
            found, _ = layer(x)
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


@recipes
def test_more_rows_than_an_axis_of_a_grid_has_programs(recipe):
    layer = build("diagonal", recipe, 8, 4, CUDA)
    x, found = torch.randn(3, 70_000, 4, device=CUDA), []
    for backend in ("reference", "triton"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    assert all(distance(b, a) <= (1e-5 if recipe is None else 1e-3) for a, b in zip(*found))
    layer = build({"kind": "blockdiag", "nblocks": 2}, recipe, 32, 4, CUDA)
    layer.backend = None
    with torch.no_grad():
        layer(torch.randn(1, 4 * 65535 + 1, 4, device=CUDA))
    assert "reference" in layer.last_path and "262140 rows at most" in layer.last_path
