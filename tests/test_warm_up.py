"""warm_up() compiles what the first pass would, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from gruqat_hf import GruQatConfig, GruQatModel, warm_up
from gruqat_hf.layers import GRULayer, LifecycleError


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_nothing_of_a_model_changes(device, recipe, masked, training):
    model = GruQatModel(GruQatConfig(input_size=5, hidden_size=8, num_hidden_layers=2, bidirectional=True)).to(device)
    if recipe is not None:
        model.prepare_qat(recipe)
    model.train()
    before, state = snapshot(model), torch.get_rng_state()
    assert warm_up(model, 3, 4, training=training, masked=masked, progress=False) is model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_first", [False, True])
def test_frozen_layers_without_biases_and_in_half_precision(device, batch_first):
    layer = GRULayer(5, 8, bias=False, recipe="int8_state16", batch_first=batch_first, device=device)
    layer.calibrate([torch.randn(4, 3, 5, device=device)], progress=False).freeze()
    warm_up(layer, 3, 4, progress=False)
    with pytest.raises(LifecycleError, match="frozen"):
        warm_up(layer, 3, 4, training=True)
    warm_up(GRULayer(5, 8, device=device, dtype=torch.bfloat16), 2, 3, training=True, progress=False)


def test_hooks_see_nothing_of_it():
    layer, seen = GRULayer(2, 2), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        warm_up(layer, 1, 3, training=True, progress=False)
    assert not seen
    layer(torch.randn(3, 1, 2))
    assert seen


def test_bad_arguments():
    with pytest.raises(ValueError, match="load them first"):
        warm_up(GRULayer(2, 2, device="meta"), 1, 4)
    with pytest.raises(ValueError, match="batch_size"):
        warm_up(GRULayer(2, 2), 0, 4)
    with pytest.raises(ValueError, match="sequence_length"):
        warm_up(GRULayer(2, 2), 1, True)
    with pytest.raises(ValueError, match="Linear holds none"):
        warm_up(torch.nn.Linear(2, 2), 1, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("structure", ["diagonal", "monarch", "dense"])
def test_passes_after_it_compile_nothing(structure, recipe):
    from gruqat_hf.scan.triton import family

    layer = GRULayer(64, 256, structure_hidden=structure, recipe=recipe, device="cuda")
    warm_up(layer, 8, 24, progress=False)
    warm_up(layer, 8, 24, training=True, progress=False)
    compiled = dict(family._COMPILED)
    x = torch.randn(24, 8, 64, device="cuda")
    layer.train()(x)[0].sum().backward()
    with torch.no_grad():
        layer.eval()(x)
    assert family._COMPILED.keys() == compiled.keys()
