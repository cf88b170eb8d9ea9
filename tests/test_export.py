"""torch.export as the first thing that a process does, its program in another one; tracers without gradients, where plans
prepared from the weights read memory by its address."""

from __future__ import annotations

import pytest
import torch
from model_helpers import features, in_state, run_python, small_model

from gruqat_hf import PRESETS, GRULayer

EXPORT = """
    import sys
    import torch
    import gruqat_hf

    folder, state = sys.argv[1:]
    if state == "layer":
        model, arguments, inputs = torch.load(f"{folder}/layer.pt", weights_only=False), (torch.randn(5, 2, 6),), {}
        shapes = ({0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)},)
    else:
        model = gruqat_hf.GruQatForSequenceClassification.from_pretrained(folder)
        arguments, inputs = (), {"inputs_embeds": torch.randn(2, 5, model.config.input_size)}
        shapes = {"inputs_embeds": {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}}
    program = torch.export.export(model.eval(), arguments, inputs, dynamic_shapes=shapes)
    assert any("gruqat_hf" in str(node.target) for node in program.graph.nodes), program
    torch.export.save(program, f"{folder}/program.pt2")
"""
RUN = """
    import sys
    import torch
    import gruqat_hf

    folder, state = sys.argv[1:]
    program = torch.export.load(f"{folder}/program.pt2").module()
    x = torch.load(f"{folder}/x.pt")
    torch.save(program(x)[0] if state == "layer" else program(inputs_embeds=x).logits, f"{folder}/out.pt")
"""


def exported(folder, state, x):
    torch.save(x, folder / "x.pt")
    for code in (EXPORT, RUN):
        run_python(code, str(folder), state)
    return torch.load(folder / "out.pt")


@pytest.mark.hf
@pytest.mark.parametrize("state", ["float", "frozen"])
def test_a_model(tmp_path, state):
    model, x = in_state(small_model(), state).eval(), features(seed=7)
    model.save_pretrained(tmp_path)
    wanted = model(inputs_embeds=x).logits
    found = exported(tmp_path, state, x)
    assert torch.equal(found, wanted) if state == "frozen" else torch.allclose(found, wanted, atol=1e-6)


def test_a_layer(tmp_path):
    layer, x = GRULayer(6, 16, structure_hidden="monarch"), torch.randn(7, 3, 6)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.allclose(exported(tmp_path, "layer", x), layer(x)[0], atol=1e-6)


@pytest.mark.hf
def test_a_cache_is_given_outside_of_an_export_alone():
    model, x = small_model(), features(seed=7)
    assert model(inputs_embeds=x).past_key_values is not None
    with pytest.raises(Exception, match="GruQatCache"):
        torch.export.export(model, (), {"inputs_embeds": x, "use_cache": True})


def _fake(layer, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x))[0].shape == (*x.shape[:2], layer.hidden_size)
    return layer


def _make_fx(layer, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(layer)(x)


def _vmap(layer, x):
    return lambda x: [result[0] for result in torch.func.vmap(layer)(x[None])]


TRACERS = {"jit": lambda layer, x: torch.jit.trace(layer, x, check_trace=False), "make_fx": _make_fx, "fake": _fake}


@pytest.mark.parametrize(
    "trace, recipe",
    [*((trace, recipe) for trace in TRACERS.values() for recipe in (None, "int8_state16")), (_vmap, None)],
    ids=[*(f"{name}-{state}" for name in TRACERS for state in ("float", "frozen")), "vmap-float"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_without_gradients(trace, recipe):
    layer = GRULayer(6, 16)
    if recipe is not None:
        layer.prepare_qat(PRESETS[recipe]).calibrate([torch.randn(5, 2, 6)], progress=False).freeze()
    x, other = torch.randn(5, 2, 6), torch.randn(5, 2, 6)
    with torch.no_grad():
        assert torch.allclose(trace(layer, x)(other)[0], layer(other)[0], atol=1e-6)
