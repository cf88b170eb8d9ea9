"""Gradients by the CPU kernels against those of the reference, and what torch.compile makes of a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_helpers import RECIPES, STRUCTURES, build_layer, inputs_for, needs_kernels, run, same

from gruqat_hf.layers import GRULayer
from gruqat_hf.quantization import PRESETS, QuantizerConfig, QuantRecipe

pytestmark = needs_kernels

_LEARNED = QuantizerConfig(scheme="lsq")
GRADIENT_RECIPES: dict[str, QuantRecipe | None] = {
    "float": None,
    "int8_state16": PRESETS["int8_state16"],
    "int8_per_channel": PRESETS["int8_per_channel"],
    "groups": RECIPES["groups"],
    "affine": replace(RECIPES["affine"], gates=None),
    "learned": replace(
        PRESETS["int8_state16"],
        h=_LEARNED,
        mid_hidden=_LEARNED,
        weight_hidden=QuantizerConfig(granularity="channel", scheme="lsq"),
        name=None,
    ),
}


@pytest.mark.parametrize("recipe", GRADIENT_RECIPES)
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name not in ("blockdiag_uneven", "butterfly_pairs")])
def test_gradients_are_those_of_the_reference(structure, recipe):
    for hidden, reverse, masked, with_h0 in ((32, False, True, True), (20, True, False, False)):
        try:
            layer = GRULayer(12, hidden, structure_hidden=STRUCTURES[structure], recipe=GRADIENT_RECIPES[recipe], reverse=reverse)
        except ValueError:
            continue
        x, h0, mask = inputs_for(7, 5, 12, hidden, masked, with_h0)
        if layer.recipe is not None:
            layer(x, h0, mask)
        layer.eval()
        grad_out, grad_last = torch.randn(7, 5, hidden), torch.randn(5, hidden)
        results = []
        for backend in ("cpu", "reference"):
            layer.backend = backend
            layer.zero_grad()
            leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (x, h0)]
            out, last = layer(*leaves, mask)
            torch.autograd.backward([out, last], [grad_out, grad_last])
            found = {name: parameter.grad for name, parameter in layer.named_parameters()}
            results.append((out, last, {**found, "x": leaves[0].grad, "h0": None if h0 is None else leaves[1].grad}))
            assert layer.last_path.startswith(backend)
        if layer.recipe is not None:
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        for name, expected in results[1][2].items():
            got = results[0][2][name]
            assert (got is None) == (expected is None), name
            if expected is not None:
                assert (got - expected).abs().max() <= 2e-3 * expected.abs().max() + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["dense", "blockdiag", "monarch", "diagonal"])
def test_compiled_layers_give_the_same_bits(structure):
    layer = build_layer(structure, 16, "int8_state16")
    x, h0, mask = inputs_for(4, 3, 16, 16, True, True)
    expected = run(layer, "cpu", x, h0, mask)
    with torch.no_grad():
        assert same(torch.compile(layer, fullgraph=True)(x, h0, mask), expected)
    layer = GRULayer(16, 16, structure_hidden=STRUCTURES[structure], recipe="int8_state16")
    layer(x)
    layer.eval()
    grads = []
    for step in (layer, torch.compile(layer, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        step(leaf, h0, mask)[0].sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
