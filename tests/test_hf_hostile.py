"""Damaged and lying checkpoints: refused by name, never a model of random numbers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_helpers import KINDS, features, in_state, output_of, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from gruqat_hf import GruQatForSequenceClassification, QuantizerConfig, QuantRecipe

pytestmark = pytest.mark.hf

_RECIPES = {
    "int8": QuantRecipe(
        x=QuantizerConfig(symmetric=False, observer="minmax"),
        h=QuantizerConfig(observer="fixed"),
        state=QuantizerConfig(scheme="lsq"),
        weight_input=QuantizerConfig(granularity="channel", observer="dynamic"),
        weight_hidden=QuantizerConfig(bits=6, granularity="gate", scheme="lsq", observer="minmax"),
        mid_hidden=QuantizerConfig(),
    ),
    "int4": "int4_per_group_64",
}
_LAYER = "model.stack.layers.0.0."


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Sound checkpoints by (state, recipe); tests damage copies."""
    root = tmp_path_factory.mktemp("sound")
    for state in ("float", "qat", "frozen"):
        for name, recipe in _RECIPES.items():
            in_state(small_model(structure_hidden=KINDS["monarch"], num_hidden_layers=1), state, recipe).save_pretrained(
                root / state / name
            )
    return root


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    def copy(state, recipe="int8"):
        return shutil.copytree(checkpoints / state / recipe, tmp_path / f"{state}-{recipe}", dirs_exist_ok=True)

    return copy


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"}
    )


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def refused(path, *mentioned):
    """Both a base model and one with a head refuse the checkpoint, and name what is wrong with it."""
    for auto in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError) as caught:
            auto.from_pretrained(path)
        for text in mentioned:
            assert text in str(caught.value), str(caught.value)


def _names(path):
    return sorted(name for name in load_file(path / "model.safetensors") if name.startswith("model."))


class TestTensors:
    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("recipe", sorted(_RECIPES))
    def test_every_tensor_is_needed(self, copy_of, state, recipe):
        for name in _names(path := copy_of(state, recipe))[:: 1 if state == "frozen" else 4]:
            path = copy_of(state, recipe)
            edit_tensors(path, lambda tensors, name=name: tensors.pop(name))
            refused(path, "missing", name.removeprefix("model."))

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("recipe", sorted(_RECIPES))
    def test_every_shape_counts(self, copy_of, state, recipe):
        for name in _names(path := copy_of(state, recipe))[:: 2 if state == "frozen" else 5]:
            path = copy_of(state, recipe)
            edit_tensors(path, lambda tensors, name=name: tensors.update({name: torch.cat([tensors[name].view(-1)] * 2)}))
            refused(path, "misshapen", name.removeprefix("model."))

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("recipe", sorted(_RECIPES))
    def test_every_type_counts(self, copy_of, state, recipe):
        for name in _names(path := copy_of(state, recipe))[:: 2 if state == "frozen" else 5]:
            path = copy_of(state, recipe)

            def retype(tensors, name=name):
                tensors[name] = tensors[name].to(torch.int32 if tensors[name].is_floating_point() else torch.float32)

            edit_tensors(path, retype)
            refused(path, "mistyped", name.removeprefix("model."))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_scale_in_another_float_type(self, copy_of, dtype):
        path, name = copy_of("frozen"), _LAYER + "x.scale"
        edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        refused(path, "mistyped", name.removeprefix("model."))

    def test_codes_of_another_integer_type(self, copy_of):
        path, name = copy_of("frozen", "int4"), _LAYER + "weight_hidden.first_codes"
        edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].view(torch.int8)}))
        refused(path, "mistyped", "first_codes")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_extra_and_renamed(self, copy_of, state):
        path = copy_of(state)
        edit_tensors(path, lambda tensors: tensors.update({_LAYER + "x.shift": torch.zeros(1)}))
        refused(path, "extra", "x.shift")
        path = copy_of(state)
        edit_tensors(path, lambda tensors: tensors.update({_LAYER + "bias": tensors.pop(_LAYER + "bias_input")}))
        refused(path, "missing: stack.layers.0.0.bias_input", "extra: stack.layers.0.0.bias")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
    @pytest.mark.parametrize("name", ["x.scale", "h.scale", "weight_hidden.mid.scale", "weight_input.blocks"])
    def test_impossible_scales(self, copy_of, state, value, name):
        path = copy_of(state)
        if name == "weight_input.blocks":
            name = "weight_input.blocks_scale" if state == "frozen" else "weight_input.quantizers.blocks.scale"

        def damage(tensors):
            tensors[_LAYER + name].view(-1)[-1] = value

        edit_tensors(path, damage)
        refused(path, name, "positive" if value in (0.0, -1.0) else "NaN")

    def test_a_learned_scale_counts_by_magnitude(self, copy_of):
        path, name = copy_of("qat"), _LAYER + "state.scale"
        before = AutoModelForSequenceClassification.from_pretrained(path)
        edit_tensors(path, lambda tensors: tensors[name].neg_())
        after = AutoModelForSequenceClassification.from_pretrained(path)
        assert torch.equal(output_of(before, features()), output_of(after, features()))
        edit_tensors(path, lambda tensors: tensors[name].fill_(float("nan")))
        refused(path, "state.scale", "NaN")

    @pytest.mark.parametrize(
        ("recipe", "tensor", "value"),
        [
            ("int8", "weight_input.blocks_codes", -128),
            ("int8", "weight_hidden.first_codes", 32),
            ("int8", "weight_hidden.second_codes", -32),
            ("int4", "weight_hidden.first_codes", 0x80),  # a low nibble of 0 is -8
            ("int4", "weight_input.blocks_codes", 0x08),  # a high one
        ],
    )
    def test_codes_beyond_the_grid(self, copy_of, recipe, tensor, value):
        path = copy_of("frozen", recipe)

        def damage(tensors):
            tensors[_LAYER + tensor].view(-1)[3] = value

        edit_tensors(path, damage)
        refused(path, tensor, "outside")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_a_zero_point_beyond_the_grid(self, copy_of, state):
        path = copy_of(state)
        edit_tensors(path, lambda tensors: tensors[_LAYER + "x.zero_point"].fill_(128))
        refused(path, "x.zero_point", "[-128, 127]")

    def test_a_damaged_file(self, copy_of):
        for cut in (3, 200, -10):
            path = copy_of("frozen")
            file = path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:cut])
            with pytest.raises(Exception):  # noqa: B017  (whichever reader meets it first)
                AutoModel.from_pretrained(path)

    def test_pickles_are_refused(self, copy_of):
        path = copy_of("frozen")
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
        refused(path, "safetensors")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_a_lost_damaged_or_foreign_head(self, copy_of, state):
        """Of the class that was saved, the head belongs to the checkpoint; a base model does not need it."""
        for change, mentioned in (
            (lambda tensors: tensors.pop("classifier.weight"), "missing: classifier.weight"),
            (lambda tensors: tensors.update({"classifier.foo": torch.ones(2)}), "extra: classifier.foo"),
            (lambda tensors: tensors["classifier.weight"].fill_(torch.nan), "classifier.weight: NaN"),
            (lambda tensors: tensors[_LAYER + "bias_hidden"].fill_(torch.inf), "bias_hidden: NaN or infinite"),
        ):
            path = copy_of(state)
            edit_tensors(path, change)
            with pytest.raises(ValueError, match=mentioned):
                AutoModelForSequenceClassification.from_pretrained(path)
        assert AutoModel.from_pretrained(copy_of(state)).quant_state == state

    def test_a_head_of_another_size(self, copy_of):
        path = copy_of("frozen")
        with pytest.raises((ValueError, RuntimeError)):
            AutoModelForSequenceClassification.from_pretrained(path, num_labels=7)

    def test_a_state_dict_is_checked_too(self, copy_of):
        path = copy_of("frozen")
        tensors = load_file(path / "model.safetensors")
        config = AutoModelForSequenceClassification.from_pretrained(path).config

        def load(state_dict):
            return GruQatForSequenceClassification.from_pretrained(None, config=config, state_dict=state_dict)

        name = _LAYER + "weight_input.blocks_codes"
        assert load(dict(tensors)).quant_state == "frozen"
        with pytest.raises(ValueError, match="missing: .*blocks_codes"):
            load({key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(ValueError, match="mistyped: .*blocks_codes"):
            load({**tensors, name: tensors[name].float()})
        with pytest.raises(ValueError, match="extra: .*odd"):
            load({**tensors, _LAYER + "odd": torch.zeros(1)})


class TestConfigs:
    @pytest.mark.parametrize(("claimed", "actual"), [("frozen", "float"), ("qat", "float"), ("frozen", "qat"), ("qat", "frozen")])
    def test_a_claim_of_another_state(self, copy_of, claimed, actual):
        path = copy_of(actual)
        shutil.copy(copy_of(claimed) / "config.json", path / "config.json")
        refused(path, "missing")

    @pytest.mark.parametrize("state", ["qat", "frozen"])
    @pytest.mark.parametrize("method", [None, "nonesuch"])
    def test_a_quantized_checkpoint_that_says_float(self, copy_of, state, method):
        path = copy_of(state)

        def change(config):
            if method is None:
                del config["quantization_config"]
            else:
                config["quantization_config"]["quant_method"] = method

        edit_config(path, change)
        if state == "frozen":
            refused(path, "missing", "_codes")
        else:
            # Its float weights are all there: a float model, and it says so.
            assert AutoModel.from_pretrained(path).quant_state == "float"
            assert not hasattr(AutoModel.from_pretrained(path).config, "quantization_config")

    @pytest.mark.parametrize(
        ("field", "value", "mentioned"),
        [
            ("hidden_size", -16, "hidden_size"),
            ("hidden_size", 0, "hidden_size"),
            ("hidden_size", "16", "hidden_size"),
            ("hidden_size", 1 << 40, "hidden_size"),
            ("hidden_size", 1 << 20, ""),
            ("hidden_size", 32, "misshapen"),
            ("input_size", 1 << 20, "misshapen"),
            ("input_size", None, "input_size"),
            ("num_hidden_layers", 2, "missing"),
            ("num_hidden_layers", 10**9, "num_hidden_layers"),
            ("bidirectional", True, "missing"),
            ("bias", False, "extra"),
            ("dropout", 3.0, "dropout"),
            ("structure_hidden", "dense", "missing"),
            ("structure_hidden", {"kind": "monarch", "nblocks": 2}, "misshapen"),
            ("structure_hidden", {"kind": "monarch", "nblocks": 1 << 60}, "nblocks"),
            ("structure_hidden", {"kind": "monarch", "nblocks": -4}, "nblocks"),
            ("structure_hidden", {"kind": "fractal"}, "fractal"),
            ("structure_hidden", [1, 2], "structure_hidden"),
            ("structure_hidden", {"kind": "ldr", "rank": 1 << 40}, "rank"),
            ("structure_hidden", {"kind": "butterfly", "factor_pairs": 1 << 40}, "factor_pairs"),
            ("quantization_config", "frozen", "quantization_config"),
            ("quantization_config", [], "quantization_config"),
            ("quantization_config", {}, "quant_method"),
            ("id2label", {}, "id2label"),
        ],
    )
    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_fields(self, copy_of, state, field, value, mentioned):
        path = copy_of(state)
        edit_config(path, lambda config: config.update({field: value}))
        refused(path, mentioned)

    @pytest.mark.parametrize(
        ("change", "mentioned"),
        [
            ({"format_version": 2}, "upgrade"),
            ({"format_version": "one"}, "format_version"),
            ({"state": "thawed"}, "state"),
            ({"state": 1}, "state"),
            ({"recipe": None}, "recipe"),
            ({"recipe": "nonesuch"}, "nonesuch"),
            ({"recipe": []}, "recipe"),
            ({"recipe": {}}, "quantizes nothing"),
            ({"recipe": {"h": 8}}, "quantizer"),
            ({"recipe": {"h": {"bits": 99}}}, "bits"),
            ({"recipe": {"h": {"bits": 8, "scale": -1, "observer": "fixed"}}}, "scale"),
            ({"recipe": {"h": {"observer": "nonesuch"}}}, "nonesuch"),
            ({"recipe": {"h": {"observer": 3}}}, ""),
            ({"recipe": {"h": {"scheme": "nonesuch"}}}, "nonesuch"),
            ({"recipe": {"weight_hidden": {"granularity": "group", "group_size": 3}}}, "group_size"),
            ({"recipe": {"weight_hidden": {"granularity": "group", "group_size": 1 << 70}}}, ""),
            ({"later": 1}, "later"),
        ],
    )
    def test_quantization_fields(self, copy_of, change, mentioned):
        path = copy_of("frozen")
        edit_config(path, lambda config: config["quantization_config"].update(change))
        refused(path, mentioned)

    @pytest.mark.parametrize("field", ["recipe", "quant_method"])
    def test_quantization_fields_left_out(self, copy_of, field):
        path = copy_of("frozen")
        edit_config(path, lambda config: config["quantization_config"].pop(field))
        refused(path, field)

    def test_other_bits_than_were_saved(self, copy_of):
        path = copy_of("frozen", "int8")
        edit_config(path, lambda config: config["quantization_config"]["recipe"]["weight_input"].update(bits=4))
        refused(path, "mistyped", "blocks_codes")
        path = copy_of("frozen", "int8")
        edit_config(path, lambda config: config["quantization_config"]["recipe"]["weight_input"].update(bits=5))
        refused(path, "blocks_codes", "outside [-15, 15]")

    @pytest.mark.parametrize("kind", ["dense", "butterfly", "circulant", {"kind": "blockdiag", "nblocks": 4}])
    def test_float_weights_of_another_structure(self, copy_of, kind):
        path = copy_of("float")
        edit_config(path, lambda config: config.update(structure_hidden=kind))
        with pytest.raises(ValueError, match="structure"):
            AutoModel.from_pretrained(path)

    def test_null_means_float(self, copy_of):
        path = copy_of("float")
        edit_config(path, lambda config: config.update(quantization_config=None))
        assert AutoModel.from_pretrained(path).quant_state == "float"
