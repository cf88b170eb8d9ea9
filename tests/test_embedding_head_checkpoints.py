"""Damaged and edited checkpoints of quantized heads and embeddings, and of what the recipe fixes beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from head_helpers import HEADS, LAYERS, VOCABULARY, WEIGHT, ids, model_of, run, to_state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from gruqat_hf import GruQatForCausalLM, GruQatForTokenClassification, QuantizerConfig, QuantRecipe

pytestmark = pytest.mark.hf

TIED = {"input_size": 16, "tie_word_embeddings": True}
X = "model.stack.layers.0.0.x"


def saved(path: Path, state: str, head: str = "lm", tensors=None, config=None, recipe="int8_state16", **fields) -> Path:
    """A checkpoint in ``path`` with changes made to its tensors and its config.json."""
    model_of(head, state, recipe, num_hidden_layers=1, **fields).save_pretrained(path)
    if tensors is not None:
        held = load_file(path / "model.safetensors")
        tensors(held)
        save_file({name: t.contiguous() for name, t in held.items()}, path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        held = json.loads((path / "config.json").read_text())
        config(held)
        (path / "config.json").write_text(json.dumps(held))
    return path


def refused(path: Path, *mentioned: str, head: str = "lm", **options) -> None:
    with pytest.raises(ValueError) as caught:
        HEADS[head].from_pretrained(path, **options)
    assert all(text in str(caught.value) for text in mentioned), str(caught.value)


def points(point: str, **changes):
    return lambda config: config["quantization_config"]["recipe"][point].update(changes)


class TestHeadsOfUnnamedClasses:
    """Where config.json does not say which class was saved, or says another, a head that is in the file must fit all the same."""

    CHANGES = {  # noqa: RUF012
        "lm_head.input.scale": lambda t: t.pop("lm_head.input.scale"),
        "missing: lm_head.weight_scale": lambda t: t.pop("lm_head.weight_scale"),
        "missing: lm_head.weight_codes": lambda t: t.pop("lm_head.weight_codes"),
        "mistyped: lm_head.weight_codes": lambda t: t.update({"lm_head.weight_codes": t["lm_head.weight_codes"].float()}),
        "mistyped: lm_head.weight_scale": lambda t: t.update({"lm_head.weight_scale": t["lm_head.weight_scale"].half()}),
        "misshapen: lm_head.weight_scale": lambda t: t.update({"lm_head.weight_scale": t["lm_head.weight_scale"][:1]}),
        "extra: lm_head.more": lambda t: t.update({"lm_head.more": torch.zeros(1)}),
    }

    @pytest.mark.parametrize("mentioned", CHANGES)
    @pytest.mark.parametrize("named", [None, ["GruQatForTokenClassification"]])
    def test_frozen(self, tmp_path, mentioned, named):
        path = saved(tmp_path, "frozen", tensors=self.CHANGES[mentioned], config=lambda c: c.update(architectures=named))
        refused(path, mentioned)

    @pytest.mark.parametrize("name", ["weight", "quantizers.weight.scale", "input.scale", "input.observer.count"])
    def test_qat(self, tmp_path, name):
        path = saved(tmp_path, "qat", tensors=lambda t: t.pop(f"lm_head.{name}"), config=lambda c: c.pop("architectures"))
        refused(path, f"missing: lm_head.{name}")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("fields", [{}, TIED], ids=["untied", "tied"])
    def test_whole_ones_load(self, tmp_path, state, fields):
        model = GruQatForCausalLM.from_pretrained(saved(tmp_path, state, config=lambda c: c.pop("architectures"), **fields))
        assert model.lm_head.quant_state == state
        assert torch.equal(run(model, ids()), run(model_of("lm", state, num_hidden_layers=1, **fields), ids()))

    def test_another_class_with_a_head_of_the_same_name(self, tmp_path):
        model = GruQatForTokenClassification.from_pretrained(saved(tmp_path / "a", "frozen", head="sequence"))
        assert model.classifier.quant_state == "frozen"
        path = saved(tmp_path / "b", "frozen", head="sequence", tensors=lambda t: t.pop("classifier.input.scale"))
        refused(path, "missing: classifier.input.scale", head="token")

    def test_a_new_size_of_the_same_class_is_no_damage(self, tmp_path):
        path = saved(tmp_path, "qat", head="sequence")
        with pytest.raises(ValueError) as caught:
            AutoModelForSequenceClassification.from_pretrained(path, num_labels=9, ignore_mismatched_sizes=True)
        assert "size for good" in str(caught.value) and "damaged" not in str(caught.value)

    def test_another_granularity_is_no_other_size(self, tmp_path):
        refused(saved(tmp_path, "frozen", config=points("head", granularity="tensor")), "does not fit", "lm_head.weight_scale")


class TestFixedScales:
    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("name", ["lm_head.input", "model.stack.layers.0.0.h", "model.stack.layers.0.0.state"])
    def test_a_scale_that_the_recipe_gives(self, tmp_path, state, name):
        path = saved(tmp_path, state, tensors=lambda t: t[f"{name}.scale"].mul_(1.01))
        refused(path, f"{name}.scale", "fixed", "makes it")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize(("point", "bits"), [("head_input", 8), ("state", 8), ("h", 7), ("h", 4)])
    def test_other_bits_than_were_saved(self, tmp_path, state, point, bits):
        path = saved(tmp_path, state, config=points(point, bits=bits))
        refused(path, f"observer 'fixed' with {bits} bits")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("tensor", ["scale", "zero_point"])
    def test_given_scales(self, tmp_path, state, tensor):
        layers = {**LAYERS, "x": QuantizerConfig(symmetric=False, observer="fixed", scale=0.02, zero_point=3)}
        recipe = QuantRecipe(**layers)
        assert GruQatForCausalLM.from_pretrained(saved(tmp_path / "a", state, recipe=recipe)).quant_state == state
        path = saved(tmp_path / "b", state, recipe=recipe, tensors=lambda t: t[f"{X}.{tensor}"].add_(1))
        refused(path, f"{X}.{tensor}", "0.02" if tensor == "scale" else "makes it 3")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_ranges_from_weights_are_no_part_of_the_config(self, tmp_path, state):
        layers = {**LAYERS, "mid_hidden": QuantizerConfig(observer="fixed")}
        model = model_of("lm", state, QuantRecipe(**layers))
        model.save_pretrained(tmp_path)
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path), ids()), run(model, ids()))

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_learned_scales_move(self, tmp_path, state):
        recipe = QuantRecipe(**LAYERS, head=WEIGHT, head_input=QuantizerConfig(scheme="lsq", observer="fixed"))
        model = model_of("lm", "qat", recipe)
        with torch.no_grad():
            model.lm_head.input.scale.mul_(0.7)
        if state == "frozen":
            model.freeze()
        model.save_pretrained(tmp_path)
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path), ids()), run(model, ids()))

    @pytest.mark.parametrize("name", ["lm_head.weight_scale", "model.embed_tokens.weight_scale", f"{X}.scale"])
    def test_scales_whose_codes_are_infinite(self, tmp_path, name):
        refused(saved(tmp_path, "frozen", tensors=lambda t: t[name].fill_(3e38)), name, "infinity")


class TestObservers:
    @pytest.mark.parametrize("name", [f"{X}.observer", "lm_head.quantizers.weight.observer"])
    @pytest.mark.parametrize(
        ("buffer", "value", "said"),
        [
            ("min_val", float("nan"), "NaN or infinite"),
            ("max_val", float("inf"), "NaN or infinite"),
            ("min_val", 1e9, "above max_val"),
            ("count", -3, "negative"),
        ],
    )
    def test_impossible_ranges(self, tmp_path, name, buffer, value, said):
        path = saved(tmp_path, "qat", tensors=lambda t: t[f"{name}.{buffer}"].fill_(value))
        refused(path, f"{name}.{buffer}", said)

    def test_nothing_observed_yet(self, tmp_path):
        model = model_of("lm", "float").prepare_qat("int8_state16")
        model.save_pretrained(tmp_path)
        again = GruQatForCausalLM.from_pretrained(tmp_path)
        assert again.uncalibrated() == model.uncalibrated() != []


class TestTwoTables:
    """Checkpoints whose config ties the output layer to the embedding, and that hold a weight for each."""

    @staticmethod
    def two(tensors):
        tensors["lm_head.weight"] = torch.randn(VOCABULARY, 16)

    def test_float(self, tmp_path):
        path = saved(tmp_path, "float", tensors=self.two, **TIED)
        model = GruQatForCausalLM.from_pretrained(path)
        expected = run(model, ids())
        with pytest.raises(ValueError, match=r"tie_word_embeddings = False.*model.tie_weights\(\)"):
            model.prepare_qat("int8_state16")
        assert model.quant_state == "float" and torch.equal(run(model, ids()), expected)
        model.config.tie_word_embeddings = False
        to_state(model, "frozen")
        assert (run(model, ids()) - expected).abs().max() < 0.2
        model.save_pretrained(tmp_path / "kept")
        assert torch.equal(run(GruQatForCausalLM.from_pretrained(tmp_path / "kept"), ids()), run(model, ids()))
        model = GruQatForCausalLM.from_pretrained(path)
        model.tie_weights()
        assert to_state(model, "frozen").lm_head.weight is None

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_quantized(self, tmp_path, state):
        refused(saved(tmp_path, state, tensors=self.two, **TIED), "lm_head.weight")

    def test_equal_ones_are_one(self, tmp_path):
        def both(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        model = GruQatForCausalLM.from_pretrained(saved(tmp_path, "qat", tensors=both, **TIED))
        assert model.lm_head.weight is model.model.embed_tokens.weight
