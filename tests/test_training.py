"""Training with transformers' Trainer: schedule, logs and learned scales."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_helpers import KINDS, features, in_state, small_model
from training_helpers import LEARNED, qat, rows, trainer_of
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from gruqat_hf import QuantizerConfig, QuantRecipe
from gruqat_hf.layers import GRULayer, LifecycleError
from gruqat_hf.layers.lifecycle import fake_quantizers
from gruqat_hf.quantization import Grid
from gruqat_hf.quantization.meter import SaturationMeter
from gruqat_hf.training import (
    QATCallback,
    QATTrainer,
    learned_scales,
    parameter_groups,
    quantizer_metrics,
)

pytestmark = pytest.mark.hf


class Watch(TrainerCallback):
    """What the first layer's quantizers were set to at each step."""

    def __init__(self) -> None:
        self.switches: list[tuple[bool, bool]] = []
        self.counts: list[int] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        quantizer = model.get_stack().layers[0][0].x
        self.switches.append((quantizer.observer_enabled, quantizer.fake_quant_enabled))
        self.counts.append(int(quantizer.observer.count))


class TestSchedule:
    def test_switches_and_freezes(self, tmp_path):
        watch = Watch()
        trainer = trainer_of(qat(), tmp_path, [QATCallback(fake_quant_from=3, observe_until=0.75), watch])
        trainer.train()
        assert watch.switches == [(step < 6, step >= 3) for step in range(8)]
        assert watch.counts == [1, 2, 3, 4, 5, 6, 6, 6]
        assert trainer.model.quant_state == "frozen"
        trainer.save_model(str(tmp_path / "saved"))
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert loaded.quant_state == "frozen"
        x = features()
        assert torch.equal(loaded(inputs_embeds=x).logits, trainer.model.eval()(inputs_embeds=x).logits)
        assert trainer.evaluate()["eval_loss"] > 0

    def test_what_is_frozen_is_what_was_evaluated(self, tmp_path):
        model = qat(replace(LEARNED, weight_input=QuantizerConfig(observer="ema")))
        trainer_of(model, tmp_path, [QATCallback(freeze_at_end=False)]).train()
        expected = copy.deepcopy(model).eval()(inputs_embeds=features()).logits
        assert model.training
        assert torch.equal(model.freeze().eval()(inputs_embeds=features()).logits, expected)

    @pytest.mark.parametrize("kind", ["dense", "monarch", "diagonal"])
    def test_before_rounding_a_layer_is_the_float_layer(self, kind):
        """Its gates are the portable ones, hence not the very bits."""
        torch.manual_seed(0)
        floating = GRULayer(8, 16, structure_hidden=KINDS[kind]).train()
        layer = copy.deepcopy(floating).prepare_qat(replace(LEARNED, gates=QuantizerConfig(), mid_input=QuantizerConfig()))
        for quantizer in fake_quantizers(layer):
            quantizer.fake_quant_enabled = False
        x = torch.randn(5, 3, 8)
        for one in (floating, layer):
            (one(x)[0] ** 2).sum().backward()
        torch.testing.assert_close(layer(x)[0], floating(x)[0], rtol=0, atol=2e-6)
        expected = {name: parameter.grad for name, parameter in floating.named_parameters()}
        for name, parameter in layer.named_parameters():
            wanted = expected.get(name, torch.zeros_like(parameter))
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4, msg=name)
        assert int(layer.x.observer.count) == 1 and int(layer.gates.observer.count) > 0  # ranges were learnt meanwhile

    def test_evaluation_always_rounds(self):
        model = in_state(small_model(), "qat")
        expected = model(inputs_embeds=features()).logits
        for quantizer in fake_quantizers(model):
            quantizer.fake_quant_enabled = False
        assert torch.equal(model(inputs_embeds=features()).logits, expected)
        assert torch.equal(copy.deepcopy(model).train().freeze().eval()(inputs_embeds=features()).logits, expected)

    def test_a_plan_made_in_between_is_not_kept(self):
        """Without gradients a layer may run by a plan; one of the time without rounding must not outlive it."""
        model = in_state(small_model(), "qat")
        expected = model(inputs_embeds=features()).logits
        for quantizer in fake_quantizers(model):
            quantizer.fake_quant_enabled = quantizer.observer_enabled = False
        with torch.no_grad():
            model.train()(inputs_embeds=features())
            assert torch.equal(model.eval()(inputs_embeds=features()).logits, expected)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"fake_quant_from": -1}, "fake_quant_from must be a number of steps from 0"),
            ({"fake_quant_from": 1.5}, "a share of them"),
            ({"observe_until": 0}, "observe_until must be a number of steps from 1"),
            ({"observe_until": True}, "observe_until"),
            ({"observe_until": float("nan")}, "observe_until"),
            ({"observe_until": 1.0}, "observe_until must be a number of steps from 1, or a share of them"),
            ({"fake_quant_from": "half"}, "fake_quant_from"),
            ({"fake_quant_from": None}, "fake_quant_from"),
            ({"log_quantizers": "some"}, "'each', 'total' or 'none'"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(ValueError, match=message):
            QATCallback(**settings)

    def test_refuses_what_it_cannot_train(self, tmp_path):
        with pytest.raises(ValueError, match=r"a model in the float state; call model.prepare_qat\(recipe\) first"):
            trainer_of(small_model(), tmp_path, [QATCallback()]).train()
        trainer = trainer_of(qat(), tmp_path, [QATCallback()], max_steps=1)
        trainer.train()
        with pytest.raises(ValueError, match="in the frozen state, whose weights are integers; load"):
            trainer.train()
        with pytest.raises(ValueError, match="QATTrainer cannot train a model in the frozen state"):
            trainer_of(trainer.model, tmp_path)
        trainer = trainer_of(qat(), tmp_path)
        trainer.args._n_gpu = 2
        with pytest.raises(ValueError, match="sees 2 GPUs.*torchrun"):
            QATCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def test_takes_numbers_of_numpy(self):
        callback = QATCallback(fake_quant_from=np.int64(2), observe_until=np.float32(0.5))
        assert json.loads(json.dumps(callback.state()))["args"] == {
            "fake_quant_from": 2,
            "observe_until": 0.5,
            "freeze_at_end": True,
            "log_quantizers": "each",
        }

    def test_says_so_where_rounding_never_begins(self, tmp_path, caplog):
        trainer_of(qat(), tmp_path, [QATCallback(fake_quant_from=8)]).train()
        assert "rounding would begin after step 8, but the training ends after step 8" in caplog.text
        caplog.clear()
        trainer_of(qat(), tmp_path, [QATCallback(fake_quant_from=7)]).train()
        assert not caplog.text

    def test_counts_optimizer_steps(self, tmp_path):
        """Of epochs with accumulated batches: 4 batches, 2 to a step."""
        watch = Watch()
        callback = QATCallback(fake_quant_from=0.5, observe_until=4)
        settings = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
        trainer_of(qat(), tmp_path, [callback, watch], **settings).train()
        assert watch.switches == [(step < 4, step >= 3) for step in range(6)]
        assert watch.counts == [2, 4, 6, 8, 8, 8]

    @pytest.mark.parametrize(
        "phase", [{}, {"observe_until": 1}, {"fake_quant_from": 7}], ids=["", "observers off", "no rounding"]
    )
    def test_evaluating_in_between_changes_nothing(self, tmp_path, phase):
        weights = []
        for strategy in ("no", "steps"):
            model = qat(LEARNED)
            callback = QATCallback(freeze_at_end=False, **phase)
            trainer_of(model, tmp_path, [callback], eval_strategy=strategy, eval_steps=2 if strategy == "steps" else None).train()
            weights.append(model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_of_two_one_freezes(self, tmp_path):
        trainer = trainer_of(qat(), tmp_path, [QATCallback(), QATCallback()], max_steps=1)
        trainer.train()
        assert trainer.model.quant_state == "frozen"

    def test_freezing_is_refused_where_nothing_was_observed(self, tmp_path):
        trainer = trainer_of(qat(), tmp_path, [QATCallback()], max_steps=1)
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        with pytest.raises(LifecycleError, match="observed nothing yet"):
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


class TestLogs:
    @pytest.mark.parametrize("cls", [Trainer, QATTrainer])
    def test_hold_the_metrics_of_every_quantizer(self, tmp_path, cls):
        trainer = trainer_of(qat(), tmp_path, [QATCallback()], cls=cls)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
        places = {key.split("/")[1] for key in logged[0] if key.count("/") == 2}
        points = ["weight_input.blocks", "weight_hidden.blocks", "x", "h", "state"]
        layers = {f"layers.{layer}.0.{point}" for layer in (0, 1) for point in points}
        assert places == layers | {"classifier.weight", "classifier.input"}
        assert all(0.0 <= entry["qat/saturation"] < 0.1 for entry in logged)
        assert logged[0]["qat/layers.0.0.h/range"] == pytest.approx(1.0)
        assert "qat/saturation" not in trainer.state.log_history[-1]

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_range_is_the_largest_magnitude_on_the_grid(self, symmetric):
        layer = GRULayer(8, 16, recipe=QuantRecipe(x=QuantizerConfig(observer="minmax", symmetric=symmetric))).train()
        layer.x.meter = SaturationMeter()
        layer(torch.linspace(-1.0, 3.0, 8).expand(2, 3, 8))
        assert quantizer_metrics(layer)["qat/x/range"] == pytest.approx(3.0, abs=4 / 255)

    @pytest.mark.parametrize(("choice", "metrics"), [("total", 1), ("none", 0)])
    def test_can_be_shorter(self, tmp_path, choice, metrics):
        trainer = trainer_of(qat(), tmp_path, [QATCallback(log_quantizers=choice)], max_steps=2)
        trainer.train()
        assert sum(key.startswith("qat/") for key in trainer.state.log_history[0]) == metrics

    def test_once_an_epoch(self, tmp_path):
        trainer = trainer_of(qat(), tmp_path, [QATCallback()], max_steps=-1, num_train_epochs=2, logging_strategy="epoch")
        trainer.train()
        assert ["qat/saturation" in entry for entry in trainer.state.log_history if "loss" in entry] == [True, True]

    def test_of_data_without_a_length(self, tmp_path):
        """Nobody knows which step is the last of an epoch, but the last of all."""

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from rows()

        trainer = trainer_of(qat(), tmp_path, [QATCallback()], logging_strategy="epoch")
        trainer.train_dataset = Stream()
        trainer.train()
        assert ["qat/saturation" in entry for entry in trainer.state.log_history if "loss" in entry] == [False, True]

    def test_a_meter_that_an_interrupted_training_left_is_not_read(self, tmp_path):
        class Interrupt(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                raise KeyboardInterrupt

        trainer = trainer_of(qat(), tmp_path, [QATCallback(), Interrupt()], logging_first_step=True)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert any(quantizer.meter for quantizer in fake_quantizers(trainer.model))
        trainer.remove_callback(Interrupt)
        begin = trainer.callback_handler.on_train_begin
        trainer.state.max_steps = 8
        begin(trainer.args, trainer.state, trainer.control)
        assert not any(quantizer.meter for quantizer in fake_quantizers(trainer.model))

    def test_reach_loggers_that_come_earlier(self, tmp_path):
        seen = []

        class Logger(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                seen.append(dict(logs))

        trainer_of(qat(), tmp_path, [Logger(), QATCallback()], max_steps=2).train()
        assert "qat/saturation" in seen[0]

    def test_measuring_changes_no_bit(self, tmp_path):
        weights = []
        for choice in ("each", "none"):
            model = qat(LEARNED, structure_hidden=KINDS["monarch"])
            trainer_of(model, tmp_path, [QATCallback(fake_quant_from=2, freeze_at_end=False, log_quantizers=choice)]).train()
            weights.append(model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_meter_counts_what_is_clipped(self):
        grid = Grid.build(torch.tensor(0.01), None, -127, 127)
        meter = SaturationMeter()
        meter.add(grid.clips(torch.tensor([0.0, 1.27, 1.274, 1.28, -1.3, float("nan")])))
        meter.add(grid.clips(torch.tensor([5.0, 0.0])))
        assert meter.counts.tolist() == [3, 8]


class TestLearnedScales:
    def test_have_a_group_of_their_own(self, tmp_path):
        model = qat(LEARNED)
        scales = learned_scales(model)
        assert len(scales) == 4  # x and the hidden weight of two layers
        trainer = trainer_of(model, tmp_path, weight_decay=0.1, scale_learning_rate=1e-4)
        optimizer = trainer.create_optimizer()
        *others, own = optimizer.param_groups
        assert {id(p) for p in own["params"]} == {id(p) for p in scales.values()}
        assert (own["weight_decay"], own["lr"]) == (0.0, 1e-4)
        assert [group["weight_decay"] for group in others] == [0.1, 0.0]
        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))

    def test_learn_more_slowly_than_weights_by_default(self, tmp_path):
        optimizer = trainer_of(qat(LEARNED), tmp_path).create_optimizer()
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(1e-4)

    def test_without_learned_scales_the_optimizer_is_trainers(self, tmp_path):
        ours, theirs = (trainer_of(qat(), tmp_path, cls=cls).create_optimizer() for cls in (QATTrainer, Trainer))
        assert [len(group["params"]) for group in ours.param_groups] == [len(group["params"]) for group in theirs.param_groups]

    def test_groups_for_a_plain_trainer(self, tmp_path):
        model = qat(LEARNED)
        groups = parameter_groups(model, lr=1e-2, weight_decay=0.1, scale_lr=1e-3)
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.1), (1e-2, 0.0), (1e-3, 0.0)]
        trainer_of(model, tmp_path, cls=Trainer, optimizers=(torch.optim.AdamW(groups), None)).train()
        assert len(parameter_groups(small_model(), lr=1e-2)) == 2

    def test_move_by_their_own_rate(self, tmp_path):
        model = qat(LEARNED)
        model.calibrate([features()], progress=False)
        before = {name: scale.detach().clone() for name, scale in learned_scales(model).items()}
        trainer_of(model, tmp_path, max_steps=4, scale_learning_rate=1e-5).train()
        for name, scale in learned_scales(model).items():
            assert 0 < (scale - before[name]).abs().max() < 1e-4
