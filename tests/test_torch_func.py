"""Layers under the transforms of torch.func: what autograd gives, by the reference, whose operations they see."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import distance
from scan_helpers import RECIPES, STRUCTURES, build, clip
from torch import Tensor
from torch.func import functional_call, grad, vmap

from gruqat_hf.layers import GRULayer

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def _loss(layer: GRULayer, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(layer, parameters, (x,))[0].square().sum()


@pytest.mark.parametrize("recipe", [None, "int8_state16", "learned"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_of_a_batch_and_of_each_sample(device, name, recipe):
    layer = clip(build(STRUCTURES[name], RECIPES.get(recipe, recipe), 16, 8, device))
    layer.backend = None
    x = torch.randn(5, 3, 8, device=device)
    parameters = dict(layer.named_parameters())
    wanted = dict(zip(parameters, torch.autograd.grad(_loss(layer, parameters, x), parameters.values())))
    found = grad(lambda p: _loss(layer, p, x))(parameters)
    assert layer.last_path.startswith("reference") and "a torch.func transform is active" in layer.last_path
    samples = vmap(grad(lambda p, row: _loss(layer, p, row.unsqueeze(1))), in_dims=(None, 1))(parameters, x)
    for key, gradient in wanted.items():
        # Beside what is summed: of a learned scale's gradient little may be left.
        assert (found[key] - gradient).norm() <= 1e-3 * samples[key].norm(), key
        assert (samples[key].sum(0) - gradient).norm() <= 1e-3 * samples[key].norm(), key


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("name", ["dense", "monarch"])
def test_outputs_under_vmap(device, name, recipe):
    layer = build(STRUCTURES[name], recipe, 16, 8, device)
    layer.backend = None
    x = torch.randn(5, 3, 8, device=device)
    with torch.no_grad():
        wanted, last = layer(x)
        found, found_last = vmap(lambda row: layer(row.unsqueeze(1)), in_dims=1, out_dims=1)(x)
    if recipe is None:
        assert distance(found[:, :, 0], wanted) <= 1e-5
    else:
        assert torch.equal(found[:, :, 0], wanted) and torch.equal(found_last[0], last)


def test_a_forced_backend_that_transforms_cannot_see_through_says_so():
    layer = build("dense", None, 16, 8, torch.device("cpu"))
    layer.backend = "cpu"
    with pytest.raises(RuntimeError, match="'cpu' was forced, but cannot run this scan: cpu: a torch.func transform is active"):
        vmap(lambda row: layer(row.unsqueeze(1))[0], in_dims=1)(torch.randn(5, 3, 8))


def test_second_derivatives_of_ldr():
    """Its own function has none; the sums that transforms see have."""
    from gruqat_hf.structures.ldr import _Displaced, _displaced

    parts = [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in ((5, 5), (4,), (4,))]
    torch.testing.assert_close(_displaced(*parts), _Displaced.apply(*parts))
    assert torch.autograd.gradcheck(_displaced, parts) and torch.autograd.gradgradcheck(_displaced, parts)


def test_vmap_over_one_parameter_of_ldr():
    layer = build("ldr", None, 16, 8, torch.device("cpu"))
    x, parameters = torch.randn(5, 3, 8), {key: value.detach() for key, value in layer.named_parameters()}
    name = "weight_hidden.structure.subdiagonal_a"
    several = torch.stack([parameters[name], parameters[name] * 0.5])
    found = vmap(lambda value: functional_call(layer, {**parameters, name: value}, (x,))[0])(several)
    for out, value in zip(found, several):
        assert distance(out, functional_call(layer, {**parameters, name: value}, (x,))[0]) <= 1e-5
