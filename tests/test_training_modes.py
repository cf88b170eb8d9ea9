"""Every head, gradient checkpointing, autocast and torch.compile in training."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_helpers import KINDS, features, in_state, small_config, small_model
from torch import nn
from training_helpers import LEARNED, qat, rows, trainer_of

from gruqat_hf import QuantizerConfig
from gruqat_hf.layers import GRULayer
from gruqat_hf.layers.lifecycle import fake_quantizers
from gruqat_hf.models import (
    GruQatForCausalLM,
    GruQatForSequenceClassification,
    GruQatForTimeSeriesPrediction,
    GruQatForTokenClassification,
)
from gruqat_hf.quantization.meter import SaturationMeter
from gruqat_hf.training import QATCallback, learned_scales

pytestmark = pytest.mark.hf


class TestGradientCheckpointing:
    @pytest.mark.parametrize("kind", ["dense", "monarch"])
    @pytest.mark.parametrize("settings", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
    @pytest.mark.parametrize("state", ["float", "qat"])
    def test_same_gradients_and_same_observers(self, kind, settings, state):
        recipe = replace(LEARNED, gates=QuantizerConfig(), mid_hidden=QuantizerConfig(observer="percentile"))
        plain = small_model(structure_hidden=KINDS[kind], bidirectional=True)
        if state == "qat":
            plain.prepare_qat(recipe)
        checkpointed = copy.deepcopy(plain)
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        assert checkpointed.is_gradient_checkpointing
        mask = torch.ones(4, 6, dtype=torch.long)
        mask[0, 4:] = 0
        for step in range(2):
            for model in (plain.train(), checkpointed.train()):
                x = features(seed=step)
                model(inputs_embeds=x, attention_mask=mask, labels=(x.sum((1, 2)) > 0).long()).loss.backward()
        for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters()):
            assert torch.equal(one.grad, other.grad), name
        for (name, one), other in zip(plain.named_buffers(), checkpointed.named_buffers()):
            assert torch.equal(one, other[1]), name

    def test_a_checkpoint_around_a_layer_must_not_observe_twice(self):
        layer = GRULayer(8, 16, recipe="int8_state16").train()
        x = torch.randn(5, 3, 8, requires_grad=True)
        out, _ = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match=r"would observe twice; use gradient_checkpointing_enable\(\)"):
            out.sum().backward()
        for quantizer in fake_quantizers(layer):
            quantizer.observer_enabled = False
        parameters = list(layer.parameters())
        wrapped = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)[0].sum(), parameters)
        plain = torch.autograd.grad(layer(x)[0].sum(), parameters)
        assert all(torch.equal(one, other) for one, other in zip(wrapped, plain))

    def test_keeps_less_for_the_backward_pass(self):
        def saved_bytes(model: nn.Module) -> int:
            total = 0

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal total
                total += tensor.numel() * tensor.element_size()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(inputs_embeds=features(steps=40), labels=torch.zeros(4, dtype=torch.long))
            return total

        model = qat().train()
        model(inputs_embeds=features())
        plain = saved_bytes(model)
        model.gradient_checkpointing_enable()
        assert saved_bytes(model) < plain / 4

    def test_in_a_trainer(self, tmp_path):
        weights = []
        for on in (False, True):
            model = qat(LEARNED)
            trainer_of(model, tmp_path, [QATCallback(fake_quant_from=2)], gradient_checkpointing=on).train()
            weights.append(model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class TestPrecision:
    @pytest.mark.parametrize("state", ["float", "qat"])
    def test_bf16_autocast_trains(self, tmp_path, state):
        model = small_model() if state == "float" else qat(LEARNED)
        trainer = trainer_of(model, tmp_path, bf16=True, max_steps=24, logging_steps=4)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0]
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("setting", ["bf16", "bf16_full_eval"])
    def test_frozen_at_the_end_it_evaluates(self, tmp_path, setting):
        trainer = trainer_of(qat(LEARNED), tmp_path, [QATCallback()], eval_strategy="steps", eval_steps=4, **{setting: True})
        trainer.train()
        last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        assert trainer.model.quant_state == "frozen"
        assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-3)
        assert {value.dtype for name, value in trainer.model.named_buffers() if name.endswith("scale")} == {torch.float32}

    def test_autocast_changes_no_bit_of_the_quantized_layers(self):
        model = in_state(small_model(head=False), "qat")
        expected = model(inputs_embeds=features()).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(inputs_embeds=features()).last_hidden_state, expected)

    def test_bf16_weights_train_with_fp32_scales(self, tmp_path):
        model = qat(replace(LEARNED, weight_input=None), structure_hidden=KINDS["monarch"]).to(torch.bfloat16)
        model.train()
        model(inputs_embeds=features().to(torch.bfloat16), labels=torch.zeros(4, dtype=torch.long)).loss.backward()
        assert all(scale.dtype == scale.grad.dtype == torch.float32 for scale in learned_scales(model).values())


class TestHeads:
    """Trainer divides the loss of a model that takes ``num_items_in_batch`` no further, and that of the others by the batches."""

    @staticmethod
    def head(name: str) -> tuple[Any, list[dict[str, torch.Tensor]]]:
        count, steps = 32, 6
        ignored = torch.arange(count * steps).view(count, steps) % 7 == 0  # not the same number in each batch
        if name == "sequence":
            return GruQatForSequenceClassification(small_config()), rows(count)
        if name == "token":
            labels = torch.randint(3, (count, steps)).masked_fill(ignored, -100)
            return GruQatForTokenClassification(small_config()), named(inputs_embeds=features(count), labels=labels)
        if name == "causal":
            ids = torch.randint(11, (count, steps))
            return GruQatForCausalLM(small_config(vocab_size=11)), named(input_ids=ids, labels=ids.masked_fill(ignored, -100))
        config = small_config(prediction_length=2)
        values = features(count, 8)
        return GruQatForTimeSeriesPrediction(config), named(past_values=values[:, :6], future_values=values[:, 6:])

    @pytest.mark.parametrize("name", ["sequence", "token", "causal", "time series"])
    def test_accumulated_gradients_are_those_of_one_batch(self, tmp_path, name):
        weights = []
        for size, batches in ((16, 1), (8, 2)):
            torch.manual_seed(0)
            model, data = self.head(name)
            settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches, "max_steps": 2}
            trainer = trainer_of(model, tmp_path, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **settings)
            trainer.train_dataset = data
            trainer.train()
            weights.append(model.state_dict())
        for key in weights[0]:
            torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=2e-6, msg=f"{name}: {key}")

    @pytest.mark.parametrize("name", ["sequence", "token", "causal", "time series"])
    def test_train_evaluate_and_freeze(self, tmp_path, name):
        model, data = self.head(name)
        callbacks = [QATCallback(fake_quant_from=2)]
        settings = {"label_names": ["future_values"]} if name == "time series" else {}
        trainer = trainer_of(model.prepare_qat("int8_state16"), tmp_path, callbacks, **settings)
        trainer.train_dataset = trainer.eval_dataset = data
        trainer.train()
        assert trainer.model.quant_state == "frozen"
        assert trainer.evaluate()["eval_loss"] > 0


def named(**columns: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


class TestCompiled:
    """By the backend "aot_eager", which runs what dynamo and autograd capture; inductor's code is tested when asked for."""

    BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))

    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("state", ["float", "qat", "frozen"])
    def test_evaluates_as_one_graph(self, state, backend):
        model = in_state(small_model(structure_hidden=KINDS["monarch"]), state)
        x, mask = features(steps=3), torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]])
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        with torch.no_grad():
            expected, got = (run(inputs_embeds=x, attention_mask=mask).logits for run in (model, compiled))
        if state == "float":
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        else:
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("state", ["float", "qat"])
    def test_trains_as_one_graph(self, state, backend):
        model = in_state(small_model(structure_hidden=KINDS["monarch"]), state, LEARNED).train()
        compiled_model = copy.deepcopy(model)
        compiled = torch.compile(compiled_model, fullgraph=True, backend=backend)
        for step in range(2):
            x, labels = features(steps=3, seed=step), torch.tensor([0, 1, 2, 0])
            outputs = [run(inputs_embeds=x, labels=labels) for run in (model, compiled)]
            for output in outputs:
                output.loss.backward()
            if state == "qat":  # the loss itself is float arithmetic, which inductor sums in another order
                assert torch.equal(outputs[0].logits, outputs[1].logits)
        for (name, one), other in zip(model.named_parameters(), compiled_model.parameters()):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
        for (name, one), (_, other) in zip(model.named_buffers(), compiled_model.named_buffers()):
            assert torch.equal(one, other), name

    @pytest.mark.slow
    @pytest.mark.parametrize("addition", ["checkpointing", "metering"])
    def test_trains_as_one_graph_with(self, addition):
        model = in_state(small_model(), "qat").train()
        compiled_model = copy.deepcopy(model)
        if addition == "checkpointing":
            compiled_model.gradient_checkpointing_enable()
        compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
        x, labels = features(steps=3), torch.tensor([0, 1, 2, 0])
        for step in range(3):
            for one in (model, compiled_model):
                for quantizer in fake_quantizers(one):
                    quantizer.meter = SaturationMeter() if addition == "metering" and step % 2 else None
            for run in (model, compiled):
                run(inputs_embeds=x, labels=labels).loss.backward()
        for (name, one), other in zip(model.named_parameters(), compiled_model.parameters()):
            assert torch.equal(one.grad, other.grad), name
        assert all(torch.equal(one, other) for one, other in zip(model.buffers(), compiled_model.buffers()))

    @pytest.mark.slow
    def test_in_a_trainer_with_a_schedule(self, tmp_path):
        """The switches of the schedule reach the compiled code; padding and the first batch may break the graph."""
        weights = []
        for on in (False, True):
            model = qat(LEARNED)
            settings = {"torch_compile": on, "max_steps": 5} | ({"torch_compile_backend": "aot_eager"} if on else {})
            trainer = trainer_of(model, tmp_path, [QATCallback(fake_quant_from=2, observe_until=4)], **settings)
            trainer.train()
            assert trainer.evaluate()["eval_loss"] > 0  # of the frozen model
            weights.append(trainer.model.state_dict())
        assert weights[0].keys() == weights[1].keys()
        for name, one in weights[0].items():
            torch.testing.assert_close(one, weights[1][name], rtol=1e-3, atol=2e-3, msg=name)
