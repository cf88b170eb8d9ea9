"""A model on its way from float over QAT to frozen."""

from __future__ import annotations

import json

import pytest
import torch
from model_helpers import KINDS, features, in_state, output_of, small_model
from transformers import BatchEncoding

from gruqat_hf import PRESETS, GruQatQuantizationConfig, QuantizerConfig, QuantRecipe

pytestmark = pytest.mark.hf


def _marks(model):
    return [
        (m.is_quantized, m.quantization_method, m.hf_quantizer.quantization_config.state, m.config._is_quantized)
        for m in (model, model.base_model)
    ]


class TestLifecycle:
    def test_transformers_sees_every_state(self):
        model = small_model()
        assert model.quant_state == "float" and not hasattr(model.config, "quantization_config")
        assert model.prepare_qat(GruQatQuantizationConfig("int8_per_channel")) is model
        assert model.quant_state == "qat" and model.config.quantization_config.state == "qat"
        assert _marks(model) == [(True, "gruqat", "qat", True)] * 2
        assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
        assert model.calibrate([features()], progress=False) is model
        assert model.freeze() is model
        assert _marks(model) == [(True, "gruqat", "frozen", True)] * 2
        assert model.config.quantization_config == GruQatQuantizationConfig("int8_per_channel", state="frozen")
        assert not model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
        assert model.dequantize() is model
        assert model.quant_state == "float"
        for part in (model, model.base_model):
            assert not part.is_quantized and not hasattr(part, "hf_quantizer")
            assert not hasattr(part.config, "quantization_config")
        model.prepare_qat("int8_per_channel")

    @pytest.mark.parametrize(
        "recipe",
        [
            "int8_state16",
            PRESETS["int8_state16"],
            PRESETS["int8_state16"].to_dict(),
            GruQatQuantizationConfig("int8_state16"),
            GruQatQuantizationConfig("int8_state16", state="frozen").to_dict(),
        ],
    )
    def test_recipes_however_given(self, recipe):
        assert small_model().prepare_qat(recipe).config.quantization_config == GruQatQuantizationConfig("int8_state16")

    def test_refuses_recipes(self):
        from transformers import BitsAndBytesConfig

        model = small_model()
        for bad in ("int7", {"quant_method": "gptq"}, {"unknown": 1}, 8, BitsAndBytesConfig(load_in_8bit=True), "fp32"):
            with pytest.raises(ValueError):
                model.prepare_qat(bad)
            assert model.quant_state == "float" and not hasattr(model.config, "quantization_config")

    def test_illegal_transitions_name_the_right_call(self):
        model = small_model()
        for call, right in (
            (model.freeze, "prepare_qat"),
            (lambda: model.calibrate([features()]), "prepare_qat"),
            (model.dequantize, "float"),
        ):
            with pytest.raises(RuntimeError, match=right):
                call()
        model.prepare_qat("int8_state16")
        with pytest.raises(RuntimeError, match="calibrate"):
            model.freeze()
        assert model.quant_state == "qat"
        with pytest.raises(RuntimeError, match="freeze"):
            model.dequantize()
        model.calibrate([features()], progress=False).freeze()
        for call in (lambda: model.prepare_qat("int8_state16"), lambda: model.calibrate([features()])):
            with pytest.raises(RuntimeError, match="dequantize"):
                call()

    @pytest.mark.parametrize("mode", [True, False])
    def test_mode_is_kept(self, mode):
        model = small_model().train(mode)
        model.prepare_qat("int8_state16").calibrate([features()], progress=False)
        assert {m.training for m in model.modules()} == {mode}
        model.freeze()
        assert {m.training for m in model.modules()} == {mode}

    def test_calibration_batches_of_every_form(self):
        x, mask = features(), torch.ones(4, 6)
        mask[:, 3:] = 0
        batches = [
            x,
            (x, torch.zeros(4)),
            [x],
            {"inputs_embeds": x, "labels": torch.zeros(4)},
            BatchEncoding({"inputs_embeds": x}),
            {"inputs_embeds": x.tolist(), "input_ids": None},
        ]
        ranges = []
        for batch in batches:
            model = small_model().prepare_qat("int8_state16")
            model.calibrate([batch], progress=False)
            ranges.append(model.model.stack.layers[0][0].x.scale)
        assert all(torch.equal(ranges[0], other) for other in ranges)
        y = x.clone()
        y[:, 3:] = 100.0
        masked = (
            small_model().prepare_qat("int8_state16").calibrate([{"inputs_embeds": y, "attention_mask": mask}], progress=False)
        )
        assert masked.model.stack.layers[0][0].x.scale.max() < 1

    def test_calibration_refuses(self):
        model = small_model().prepare_qat("int8_state16")
        for loader, n_batches in (([], None), ([features()], 0), ([{"labels": torch.zeros(4)}], None)):
            with pytest.raises(ValueError, match="batch"):
                model.calibrate(loader, n_batches, progress=False)

    def test_n_batches(self):
        seen = []

        def loader():
            for seed in range(9):
                seen.append(seed)
                yield features(seed=seed)

        small_model().prepare_qat("int8_state16").calibrate(loader(), n_batches=3, progress=False)
        assert len(seen) == 3

    def test_token_models_calibrate_on_ids(self):
        model = small_model(vocab_size=9).prepare_qat("int8_state16")
        ids = torch.randint(0, 9, (3, 4))
        model.calibrate([ids, {"input_ids": ids}], progress=False).freeze()
        assert model(input_ids=ids).logits.shape == (3, 3)

    @pytest.mark.parametrize("kind", sorted(KINDS))
    @pytest.mark.parametrize("recipe", ["int8_per_channel", "int8_state16", "int4_per_group_64"])
    def test_qat_eval_is_frozen(self, kind, recipe):
        model = in_state(small_model(structure_hidden=KINDS[kind]), "qat", recipe)
        x = features(seed=7)
        qat = output_of(model, x)
        frozen = output_of(model.freeze(), x)
        assert torch.equal(qat, frozen)
        assert torch.equal(frozen, torch.cat([output_of(model, row) for row in x.split([1, 3])]))
        dequantized = model.dequantize()
        assert dequantized.config.hidden_structure == dequantized.model.stack.layers[0][0].structure_hidden
        assert (output_of(dequantized, x) - frozen).abs().max() < 0.1

    def test_custom_recipe(self):
        recipe = QuantRecipe(
            h=QuantizerConfig(bits=6, observer="fixed"), weight_hidden=QuantizerConfig(bits=3, scheme="lsq", granularity="gate")
        )
        model = in_state(small_model(), "frozen", recipe)
        assert model.config.quantization_config.recipe == recipe
        assert json.loads(model.config.to_json_string())["quantization_config"]["recipe"]["h"]["bits"] == 6


class TestDtype:
    @pytest.mark.parametrize("state", ["qat", "frozen"])
    def test_scales_stay_fp32(self, state):
        model = in_state(small_model(structure_hidden=KINDS["monarch"]), state)
        before = {name: t.clone() for name, t in model.state_dict().items() if "scale" in name or "_val" in name}
        model.to(torch.bfloat16)
        after = model.state_dict()
        assert before and all(
            torch.equal(after[name], value) and after[name].dtype == torch.float32 for name, value in before.items()
        )
        assert model.dtype == torch.bfloat16 and model.classifier.bias.dtype == torch.bfloat16
        assert state == "frozen" or model.classifier.weight.dtype == torch.bfloat16
        for name, tensor in after.items():
            assert tensor.dtype in (torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64), name
        logits = output_of(model, features().to(torch.bfloat16))
        assert logits.dtype == torch.float32 and logits.isfinite().all()

    def test_half_is_refused_when_quantized(self):
        with pytest.raises(ValueError, match="half"):
            in_state(small_model(), "qat").half()


def test_the_report_counts_what_a_checkpoint_holds():
    model = small_model(num_hidden_layers=2)
    dense = model.report()
    assert all(layer.state == "float" and layer.path == "not run yet" for layer in dense.layers)
    assert dense.tensor_bytes == 4 * model.num_parameters()
    model.prepare_qat("int8_state16").calibrate([features()], progress=False).freeze()
    output_of(model, features())
    frozen = model.report()
    assert frozen.tensor_bytes == sum(tensor.nbytes for tensor in model.state_dict().values()) < dense.tensor_bytes
    assert [part.name for part in frozen.parts] == ["classifier"] and frozen.other_bytes == dense.other_bytes == 0
    assert frozen.parts[0].bits == {"head": 8, "head_input": 16} and frozen.parts[0].scales == 3
    assert "classifier" in str(frozen) and "3 scales" in str(frozen) and "8-bit codes, 3 scales" in str(model.classifier)
    assert [layer.name for layer in frozen.layers] == ["model.stack.layers.0.0", "model.stack.layers.1.0"]
    assert frozen.layers[0].bits["state"] == 16 and "mid_hidden" not in frozen.layers[0].bits
    assert "frozen" in str(frozen) and frozen.layers[0].path.split()[0] in ("cpu", "triton", "reference")
