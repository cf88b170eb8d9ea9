"""Layers offloaded to disk compute what layers in memory do."""

from __future__ import annotations

import pytest
import torch
from head_helpers import head_model, ids, run
from model_helpers import KINDS, features, in_state, output_of, small_model

from gruqat_hf import GruQatForCausalLM, GruQatForSequenceClassification

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("state", ["float", "qat", "frozen"])
@pytest.mark.parametrize("kind", ["dense", "monarch", "butterfly"])
def test_a_layer_on_disk(tmp_path, state, kind):
    model = in_state(small_model(structure_hidden=KINDS[kind], num_hidden_layers=2), state).eval()
    model.save_pretrained(tmp_path / "model")
    where = {"model.stack.layers.0": "cpu", "model.stack.layers.1": "disk", "dropout": "cpu", "classifier": "cpu"}
    offloaded = GruQatForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk"
    )
    assert any(parameter.device.type == "meta" for parameter in offloaded.model.stack.layers[1].parameters())
    assert torch.equal(output_of(offloaded, features()), output_of(model, features()))


@pytest.mark.parametrize("state", ["float", "qat", "frozen"])
@pytest.mark.parametrize("on_disk", ["model.embed_tokens", "lm_head"])
def test_an_embedding_and_a_head_on_disk(tmp_path, state, on_disk):
    model = head_model("lm", state)
    model.save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.stack": "cpu", "lm_head": "cpu", on_disk: "disk"}
    offloaded = GruQatForCausalLM.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk")
    assert torch.equal(run(offloaded, ids()), run(model, ids()))


@pytest.mark.parametrize("state", ["float", "qat", "frozen"])
@pytest.mark.parametrize("tied", [False, True])
def test_everything_on_disk(tmp_path, state, tied):
    model = head_model("lm", state, input_size=16, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.stack.layers.0", "model.stack.layers.1", "lm_head"]
    offloaded = GruQatForCausalLM.from_pretrained(
        tmp_path / "model", device_map=dict.fromkeys(names, "disk"), offload_folder=tmp_path / "disk"
    )
    x, expected = ids(), run(model, ids())
    assert torch.equal(run(offloaded, x), expected)
    assert offloaded.model.embed_tokens._kept is None and offloaded.lm_head._kept is None
    stream, whole = offloaded.stream(4), model.stream(4)
    assert torch.equal(stream.state_dict()["state"], whole.state_dict()["state"])
    for _ in range(2):
        assert torch.equal(stream(x[:, :3]), whole(x[:, :3]))
        saved = stream.state_dict()
        rest = stream(x[:, 3:])
        stream.load_state_dict(saved)
        assert torch.equal(stream(x[:, 3:]), rest)
        stream.reset(torch.tensor([0, 2]))
        whole(x[:, 3:])
        whole.reset(torch.tensor([0, 2]))
        assert torch.equal(stream(x), whole(x))
        stream.reset()
        whole.reset()
