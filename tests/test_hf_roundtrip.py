"""Saving and loading through transformers, in every state."""

from __future__ import annotations

import json
import os

import pytest
import torch
from model_helpers import KINDS, features, in_state, output_of, run_python, small_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gruqat_hf import (
    PRESETS,
    GruQatConfig,
    GruQatForSequenceClassification,
    GruQatModel,
    GruQatQuantizationConfig,
    QuantizerConfig,
    QuantRecipe,
)
from gruqat_hf.hub import GruQatHfQuantizer

pytestmark = pytest.mark.hf

STATES = ("float", "qat", "frozen")

LSQ = QuantRecipe(
    x=QuantizerConfig(symmetric=False, observer="minmax"),
    h=QuantizerConfig(bits=8, scheme="lsq"),
    state=QuantizerConfig(bits=16, observer="fixed"),
    weight_input=QuantizerConfig(bits=4, granularity="group", group_size=4, scheme="lsq", observer="minmax"),
    weight_hidden=QuantizerConfig(bits=6, granularity="channel", observer="dynamic"),
    mid_hidden=QuantizerConfig(observer="percentile"),
    gates=QuantizerConfig(granularity="gate"),
)


def _same_tensors(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype and torch.equal(right[name], tensor), name


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("shape", [{}, {"bidirectional": True, "num_hidden_layers": 1}, {"bias": False}])
def test_round_trip(tmp_path, state, kind, shape):
    recipe = "int4_per_group_64" if shape else "int8_state16"
    model = in_state(small_model(structure_hidden=KINDS[kind], **shape), state, recipe)
    x = features(seed=5)
    model.save_pretrained(tmp_path)
    assert [name for name in os.listdir(tmp_path) if name.endswith((".safetensors", ".bin"))] == ["model.safetensors"]
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.quant_state == state and not loaded.training
    _same_tensors(model, loaded)
    assert torch.equal(output_of(loaded, x), output_of(model, x))
    assert AutoConfig.from_pretrained(tmp_path).hidden_structure == model.config.hidden_structure


@pytest.mark.parametrize("state", ["qat", "frozen"])
@pytest.mark.parametrize("recipe", [*sorted(set(PRESETS) - {"fp32"}), "lsq"])
def test_round_trip_of_recipes(tmp_path, state, recipe):
    recipe = LSQ if recipe == "lsq" else recipe
    model = in_state(small_model(structure_hidden=KINDS["monarch"]), state, recipe)
    model.save_pretrained(tmp_path)
    loaded = GruQatForSequenceClassification.from_pretrained(tmp_path)
    _same_tensors(model, loaded)
    x = features(seed=5)
    assert torch.equal(output_of(loaded, x), output_of(model, x))
    assert loaded.config.quantization_config == model.config.quantization_config
    if state == "qat":
        assert torch.equal(output_of(loaded.freeze(), x), output_of(model.freeze(), x))


def test_what_was_not_calibrated_is_not_after_loading(tmp_path):
    model = small_model(structure_hidden=KINDS["monarch"]).prepare_qat(LSQ)
    before = model.get_stack().uncalibrated()
    assert before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.get_stack().uncalibrated() == before
    with pytest.raises(RuntimeError, match="calibrate"):
        loaded.freeze()
    x = features(seed=5)
    for either in (model, loaded):
        either.calibrate([x], progress=False).freeze()
    assert torch.equal(output_of(loaded, x), output_of(model, x))


def test_reloaded_in_a_new_process(tmp_path):
    x = features(seed=5)
    torch.save(x, tmp_path / "x.pt")
    expected = {}
    for state in STATES:
        for kind in ("monarch", "circulant"):
            model = in_state(small_model(structure_hidden=KINDS[kind]), state)
            model.save_pretrained(tmp_path / state / kind)
            expected[f"{state}/{kind}"] = output_of(model, x)
    run_python(
        """
        import sys, torch, gruqat_hf
        from transformers import AutoModelForSequenceClassification
        torch.set_num_threads(1)
        base = sys.argv[1]
        x = torch.load(base + "/x.pt")
        out = {}
        for name in sys.argv[2:]:
            with torch.no_grad():
                out[name] = AutoModelForSequenceClassification.from_pretrained(f"{base}/{name}")(inputs_embeds=x).logits
        torch.save(out, base + "/out.pt")
        """,
        str(tmp_path),
        *expected,
    )
    got = torch.load(tmp_path / "out.pt")
    for name, logits in expected.items():
        same = torch.allclose(got[name], logits, atol=1e-6) if name.startswith("float") else torch.equal(got[name], logits)
        assert same, name


@pytest.mark.parametrize("state", STATES)
def test_sharded(tmp_path, state):
    model = in_state(small_model(), state)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]) > 2
    _same_tensors(model, AutoModelForSequenceClassification.from_pretrained(tmp_path))


@pytest.mark.parametrize("state", STATES)
def test_a_base_model_from_a_head_and_back(tmp_path, state):
    model = in_state(small_model(), state)
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert type(base) is GruQatModel and base.quant_state == state
    assert set(info["unexpected_keys"]) == {name for name in model.state_dict() if name.startswith("classifier.")}
    x = features(seed=5)
    with torch.no_grad():
        assert torch.equal(base(inputs_embeds=x).pooler_output, model.model(inputs_embeds=x).pooler_output)
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5, output_loading_info=True)
    assert {name for name in info["missing_keys"] if "quantizers" not in name and "input" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }
    # A new head has to be trained: beside integer layers it is in float, in QAT it trains with the rest.
    assert again.classifier.quant_state == ("qat" if state == "qat" else "float")
    assert again.quant_state == state and output_of(again, x).isfinite().all()
    assert again.classifier.weight.shape == (5, 16) and 0 < again.classifier.weight.abs().max() <= 0.25
    _same_tensors(again.model, base)
    model.model.save_pretrained(tmp_path / "nested")
    _same_tensors(AutoModel.from_pretrained(tmp_path / "nested"), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", STATES)
def test_another_dtype_on_loading(tmp_path, state, dtype):
    model = in_state(small_model(structure_hidden=KINDS["monarch"]), state, LSQ)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        ours = model.state_dict()[name]
        if "scale" in name or "_val" in name or not ours.is_floating_point():
            assert tensor.dtype == ours.dtype and torch.equal(tensor, ours), name
        else:
            assert tensor.dtype == dtype, name
    loaded.save_pretrained(tmp_path / "again")
    _same_tensors(loaded, AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"))


def test_token_model(tmp_path):
    model = small_model(vocab_size=20, pad_token_id=0).prepare_qat("int8_state16")
    ids = torch.randint(0, 20, (4, 6))
    model.calibrate([ids], progress=False).freeze().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.main_input_name == "input_ids"
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


class TestOnTheFly:
    def test_to_qat(self, tmp_path):
        model = small_model(structure_hidden=KINDS["monarch"])
        model.save_pretrained(tmp_path)
        config = GruQatQuantizationConfig("int8_state16")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
        assert loaded.quant_state == "qat" and loaded.is_quantized and loaded.config.quantization_config == config
        x = features(seed=5)
        loaded.calibrate([x], progress=False)
        assert torch.equal(output_of(loaded, x), output_of(model.prepare_qat("int8_state16").calibrate([x], progress=False), x))
        loaded.freeze().save_pretrained(tmp_path / "frozen")
        assert AutoModel.from_pretrained(tmp_path / "frozen").quant_state == "frozen"

    def test_to_frozen_where_nothing_needs_calibration(self, tmp_path):
        model = small_model(structure_hidden=KINDS["monarch"])
        model.save_pretrained(tmp_path)
        config = GruQatQuantizationConfig("int8_dynamic", state="frozen")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
        assert loaded.quant_state == "frozen" and loaded.config.quantization_config == config
        x = features(seed=5)
        assert torch.equal(output_of(loaded, x), output_of(model.prepare_qat("int8_dynamic").freeze(), x))
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(
            output_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"), x), output_of(loaded, x)
        )

    def test_to_frozen_without_calibration_is_refused(self, tmp_path):
        small_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"layers\.0\.0\.x.*calibrate.*int8_dynamic"):
            AutoModel.from_pretrained(tmp_path, quantization_config=GruQatQuantizationConfig("int8_state16", state="frozen"))

    def test_the_config_may_be_a_dict(self, tmp_path):
        small_model().save_pretrained(tmp_path)
        config = GruQatQuantizationConfig("int8_state16").to_dict()
        assert AutoModel.from_pretrained(tmp_path, quantization_config=config).quant_state == "qat"

    def test_a_quantized_checkpoint_keeps_its_own(self, tmp_path):
        in_state(small_model(), "frozen", "int8_per_channel").save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="already has"):
            loaded = AutoModel.from_pretrained(tmp_path, quantization_config=GruQatQuantizationConfig("int8_state16"))
        assert loaded.quant_state == "frozen" and loaded.config.quantization_config.recipe == PRESETS["int8_per_channel"]

    def test_a_recipe_that_does_not_fit_is_refused(self, tmp_path):
        small_model().save_pretrained(tmp_path)
        recipe = QuantRecipe(weight_hidden=QuantizerConfig(granularity="group", group_size=5, observer="dynamic"))
        with pytest.raises(ValueError, match="group_size"):
            AutoModel.from_pretrained(tmp_path, quantization_config=GruQatQuantizationConfig(recipe))


class TestConfigTellsTheTruth:
    def test_a_model_from_a_frozen_config_is_float(self, tmp_path):
        frozen = in_state(small_model(head=False), "frozen")
        fresh = AutoModel.from_config(frozen.config)
        assert fresh.quant_state == "float" and not hasattr(fresh.config, "quantization_config")
        assert frozen.config.quantization_config.state == "frozen"
        for model in (fresh, GruQatModel(frozen.config)):
            model.save_pretrained(tmp_path)
            assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
            assert AutoModel.from_pretrained(tmp_path).quant_state == "float"

    def test_loading_with_a_config_from_memory(self, tmp_path):
        model = in_state(small_model(), "frozen")
        model.save_pretrained(tmp_path)
        loaded = GruQatForSequenceClassification.from_pretrained(tmp_path, config=model.config)
        _same_tensors(model, loaded)

    def test_dequantized(self, tmp_path):
        model = in_state(small_model(structure_hidden="butterfly"), "frozen")
        model.save_pretrained(tmp_path / "frozen")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "frozen").dequantize()
        assert loaded.quant_state == "float" and loaded.config.structure_hidden == {"kind": "dense"}
        loaded.save_pretrained(tmp_path / "float")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float")
        _same_tensors(loaded, again)
        assert not getattr(again, "is_quantized", False)
        quantizer = GruQatHfQuantizer(GruQatQuantizationConfig("int8_state16", state="frozen"))
        other = quantizer.dequantize(AutoModelForSequenceClassification.from_pretrained(tmp_path / "frozen"))
        _same_tensors(other, loaded)
        frozen = AutoModelForSequenceClassification.from_pretrained(tmp_path / "frozen")
        frozen.save_pretrained(tmp_path / "again")
        _same_tensors(frozen.hf_quantizer.dequantize(frozen), loaded)

    def test_a_quantized_base_inside_a_head(self, tmp_path):
        model = small_model()
        model.model.prepare_qat("int8_state16").calibrate([features()], progress=False)
        model.save_pretrained(tmp_path)
        assert model.is_quantized and AutoModelForSequenceClassification.from_pretrained(tmp_path).quant_state == "qat"

    def test_saving_is_deterministic(self, tmp_path):
        for name in ("a", "b"):
            in_state(small_model(), "frozen").save_pretrained(tmp_path / name)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_state_dict_argument(self, tmp_path):
        model = in_state(small_model(), "frozen")
        state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = GruQatForSequenceClassification.from_pretrained(None, config=model.config, state_dict=state_dict)
        _same_tensors(model, loaded)


@pytest.mark.parametrize(("recipe", "share"), [("int8_state16", 0.27), ("int4_per_group_64", 0.16)])
def test_bytes_on_disk(tmp_path, recipe, share):
    config = GruQatConfig(input_size=512, hidden_size=512, num_hidden_layers=2)
    model = GruQatModel(config)
    model.save_pretrained(tmp_path / "float")
    model.prepare_qat(recipe).calibrate([torch.randn(1, 2, 512)], progress=False).freeze().save_pretrained(tmp_path / "frozen")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "frozen")]
    assert sizes[1] <= share * sizes[0]


class _Toy(Dataset):
    def __init__(self, count=32):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 5, 8, generator=generator)
        self.y = (self.x[:, :, 0].sum(-1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"inputs_embeds": self.x[index], "labels": self.y[index]}


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def _trainer(model, path, callbacks=(), **arguments):
    return Trainer(
        model=model,
        args=TrainingArguments(
            **{
                "output_dir": str(path),
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-2,
                "save_strategy": "steps",
                "save_steps": 3,
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": 1,
                **arguments,
            }
        ),
        train_dataset=_Toy(),
        eval_dataset=_Toy(8),
        callbacks=list(callbacks),
    )


class TestTrainer:
    def _model(self):
        model = small_model(num_labels=2, structure_hidden=KINDS["monarch"])
        return model.prepare_qat(LSQ).calibrate([_Toy().x], progress=False)

    def test_trains_resumes_and_freezes(self, tmp_path):
        whole = _trainer(self._model(), tmp_path / "whole")
        before = whole.model.state_dict()["classifier.weight"].clone()
        whole.train()
        assert not torch.equal(before, whole.model.state_dict()["classifier.weight"])

        interrupted = _trainer(self._model(), tmp_path / "cut", [_StopAt(3)])
        interrupted.train()
        resumed = _trainer(self._model(), tmp_path / "cut")
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
        _same_tensors(whole.model, resumed.model)

        checkpoint = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-8")
        assert checkpoint.quant_state == "qat"
        _same_tensors(whole.model, checkpoint)
        metrics = whole.evaluate()
        whole.model.freeze()
        assert whole.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=0)
        whole.save_model(str(tmp_path / "frozen"))
        frozen = AutoModelForSequenceClassification.from_pretrained(tmp_path / "frozen")
        assert frozen.quant_state == "frozen"
        with pytest.raises(ValueError, match="quantized"):
            _trainer(frozen, tmp_path)

    def test_a_loaded_qat_model_trains(self, tmp_path):
        self._model().save_pretrained(tmp_path / "qat")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "qat")
        _trainer(model, tmp_path / "run", max_steps=2).train()
        with torch.no_grad():
            assert model.eval()(inputs_embeds=_Toy().x).logits.isfinite().all()

    @pytest.mark.parametrize("num_labels", [1, 2])
    def test_accumulation_changes_no_gradient(self, tmp_path, num_labels):
        weights = []
        for size, steps in ((8, 1), (2, 4)):
            trainer = _trainer(
                small_model(num_labels=num_labels),
                tmp_path / str(size),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=2,
                optim="sgd",
                max_grad_norm=0.0,
                save_strategy="no",
            )
            if num_labels == 1:
                trainer.train_dataset.y = trainer.train_dataset.y.float()
            trainer.train()
            weights.append(trainer.model.classifier.weight.detach().clone())
        assert torch.allclose(*weights, atol=1e-6)


@pytest.mark.parametrize("state", STATES)
def test_device_map_on_cpu(tmp_path, state):
    model = in_state(small_model(), state)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(output_of(loaded, features()), output_of(model, features()))


def test_tensors_in_the_file_are_what_is_promised(tmp_path):
    in_state(small_model(), "frozen", "int4_per_group_64").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds["model.stack.layers.0.0.weight_hidden.blocks_codes"] == torch.uint8
    assert kinds["model.stack.layers.0.0.weight_hidden.blocks_scale"] == torch.float32
    floats = [name for name, dtype in kinds.items() if dtype.is_floating_point and "scale" not in name and "bias" not in name]
    assert floats == []
    assert kinds["classifier.weight_codes"] == torch.int8 and kinds["classifier.weight_scale"] == torch.float32
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert AutoModel.from_pretrained(tmp_path).quant_state == "frozen"
