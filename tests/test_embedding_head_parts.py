"""Lifecycle calls on a part of a model, and parts that a user puts in the place of the model's own."""

from __future__ import annotations

import pytest
import torch
from head_helpers import VOCABULARY, ids, model_of, run, to_state
from safetensors.torch import load_file, save_file
from torch import nn

from gruqat_hf import GruQatForCausalLM, GruQatForSequenceClassification
from gruqat_hf.layers.lifecycle import LifecycleError

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whose", ["model", "get_stack"])
def test_a_part_that_was_frozen_alone(tmp_path, whose, tied):
    fields = {"input_size": 16, "tie_word_embeddings": tied}
    model, whole = model_of("lm", "qat", **fields), model_of("lm", "frozen", **fields)
    (model.model if whose == "model" else model.get_stack()).freeze()
    assert torch.equal(run(model, ids()), run(whole, ids()))
    with pytest.raises(LifecycleError, match=r"(lm_head|embed_tokens) is qat.*Call freeze\(\) of the whole model"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    model.freeze().save_pretrained(tmp_path)
    for found in (model, GruQatForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(run(found, ids()), run(whole, ids()))
        assert set(found.state_dict()) == set(whole.state_dict())
    with pytest.raises(LifecycleError, match="frozen already"):
        model.freeze()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whose", ["model", "get_stack"])
def test_a_part_that_was_dequantized_alone(tmp_path, whose, tied):
    fields = {"input_size": 16, "tie_word_embeddings": tied}
    model, whole = model_of("lm", "frozen", **fields), model_of("lm", "frozen", **fields).dequantize()
    (model.model if whose == "model" else model.get_stack()).dequantize()
    with pytest.raises(LifecycleError, match=r"is frozen.*Call dequantize\(\) of the whole model"):
        model.save_pretrained(tmp_path)
    model.dequantize().save_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for found in (model, GruQatForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(run(found, ids()), run(whole, ids()))
    with pytest.raises(LifecycleError, match="float already"):
        model.dequantize()


def test_a_head_that_was_frozen_alone(tmp_path):
    model, whole = model_of("lm", "qat"), model_of("lm", "frozen")
    model.lm_head.freeze()
    with pytest.raises(LifecycleError, match=r"the layers are qat, but lm_head is frozen.*freeze\(\) of the whole"):
        model.save_pretrained(tmp_path)
    assert torch.equal(run(model.freeze(), ids()), run(whole, ids()))


@pytest.mark.parametrize("state", ["qat", "frozen"])
def test_a_linear_layer_of_ones_own(tmp_path, state):
    """One put in the head's place before prepare_qat() is quantized as the head; a later one is float, as the config says."""
    model = model_of("sequence", "float")
    linear = model.classifier = nn.Linear(16, 3)
    to_state(model, "qat")
    assert model.classifier.weight is linear.weight and model.classifier.quant_state == "qat"
    model = model.freeze() if state == "frozen" else model
    model.save_pretrained(tmp_path / "before")
    again = GruQatForSequenceClassification.from_pretrained(tmp_path / "before")
    assert again.classifier.quant_state == state and torch.equal(run(again, ids()), run(model, ids()))
    model.classifier = nn.Linear(16, 3)
    model.save_pretrained(tmp_path / "after")
    again = GruQatForSequenceClassification.from_pretrained(tmp_path / "after")
    assert again.config.quantization_config.recipe.head is None and again.classifier.quant_state == "float"
    assert (run(again, ids()) - run(model, ids())).abs().max() < 1e-5  # ours sums in float64


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_parts_are_not_replaced(tied):
    model = model_of("lm", "frozen", input_size=16, tie_word_embeddings=tied)
    expected = run(model, ids())
    with pytest.raises(LifecycleError, match=r"set_input_embeddings\(\).*dequantize\(\)"):
        model.set_input_embeddings(nn.Embedding(VOCABULARY, 16))
    with pytest.raises(LifecycleError, match=r"set_output_embeddings\(\).*dequantize\(\)"):
        model.set_output_embeddings(nn.Linear(16, VOCABULARY, bias=False))
    assert torch.equal(run(model, ids()), expected)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_codes_under_a_float_config(tmp_path, name):
    model_of("lm", "float").save_pretrained(tmp_path)
    tensors, frozen = load_file(tmp_path / "model.safetensors"), model_of("lm", "frozen").state_dict()
    del tensors[name]
    tensors.update({f"{name}{kind}": frozen[f"{name}{kind}"] for kind in ("_codes", "_scale")})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"holds integers, {name}_codes"):
        GruQatForCausalLM.from_pretrained(tmp_path)
