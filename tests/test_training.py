"""Training with transformers' Trainer: schedule, logs, learned scales, resuming, and the script that does it all."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import KINDS, features, in_state, small_model
from safetensors.torch import load_file
from training_helpers import LEARNED, qat, rows, trainer_of
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from gruqat_hf import QuantizerConfig, QuantRecipe
from gruqat_hf.layers import GRULayer, LifecycleError
from gruqat_hf.layers.lifecycle import fake_quantizers
from gruqat_hf.quantization import Grid
from gruqat_hf.quantization.meter import SaturationMeter
from gruqat_hf.training import (
    QATCallback,
    QATTrainer,
    last_complete_checkpoint,
    learned_scales,
    parameter_groups,
    quantizer_metrics,
)

pytestmark = pytest.mark.hf

HERE = Path(__file__).resolve().parent


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


SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9}


class TestResume:
    def run(
        self, out: Path, resume: bool | str = False, stop: int | None = None, cls: type = QATTrainer, **settings: Any
    ) -> dict[str, torch.Tensor]:
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    control.should_training_stop = True

        model = qat(LEARNED, structure_hidden=KINDS["monarch"], dropout=0.3)
        callback = QATCallback(fake_quant_from=2, observe_until=7, freeze_at_end=False)
        trainer = trainer_of(model, out, [callback, Stop()], cls=cls, **{**SAVING, **settings})
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    @pytest.mark.parametrize("cls", [Trainer, QATTrainer])
    @pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulating"])
    def test_gives_the_weights_of_an_undisturbed_run(self, tmp_path, cls, settings):
        expected = self.run(tmp_path / "whole", cls=cls, **settings)
        self.run(tmp_path / "parts", stop=4, cls=cls, **settings)
        resumed = self.run(tmp_path / "parts", resume=True, cls=cls, **settings)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)

    def test_passes_over_a_half_written_checkpoint(self, tmp_path):
        expected = self.run(tmp_path / "whole")
        self.run(tmp_path / "parts")
        (tmp_path / "parts" / "checkpoint-9" / "trainer_state.json").unlink()
        state = tmp_path / "parts" / "checkpoint-6" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
        assert last_complete_checkpoint(tmp_path / "parts") == str(tmp_path / "parts" / "checkpoint-3")
        with pytest.raises(ValueError, match="checkpoint-6 holds no whole trainer_state.json"):
            self.run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-6"))
        resumed = self.run(tmp_path / "parts", resume=True)
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)

    def test_with_another_schedule_says_so(self, tmp_path, caplog):
        def run(resume: bool, until: int, **settings: Any) -> Any:
            callback = QATCallback(observe_until=until, freeze_at_end=False)
            trainer = trainer_of(qat(), tmp_path, [callback], **{**SAVING, **settings})
            trainer.train(resume_from_checkpoint=resume)
            return next(one for one in trainer.callback_handler.callbacks if isinstance(one, QATCallback))

        run(False, 7)
        run(True, 7, max_steps=10)
        assert "another schedule" not in caplog.text
        run(True, 8, max_steps=11)
        assert "step 10: the training goes on with another schedule than it began with (observe_until: 7, now 8)" in caplog.text
        assert run(True, 5, max_steps=12, restore_callback_states_from_checkpoint=True).observe_until == 8

    def test_of_a_run_without_the_callback(self, tmp_path):
        trainer_of(qat(), tmp_path, **SAVING).train()
        trainer = trainer_of(qat(), tmp_path, [QATCallback()], **{**SAVING, "max_steps": 12})
        trainer.train(resume_from_checkpoint=True)
        assert trainer.model.quant_state == "frozen" and last_complete_checkpoint(tmp_path).endswith("-12")

    def test_of_another_model_is_refused(self, tmp_path):
        trainer_of(small_model(), tmp_path / "float", **SAVING).train()
        with pytest.raises(ValueError, match="checkpoint-9 is of a model in the float state, this one is in the qat state"):
            self.run(tmp_path / "float", resume=True)
        self.run(tmp_path / "qat")
        with pytest.raises(ValueError, match="another recipe"):
            trainer_of(qat(), tmp_path / "qat").train(resume_from_checkpoint=True)

    def test_needs_a_complete_checkpoint(self, tmp_path):
        assert last_complete_checkpoint(tmp_path / "nonesuch") is None
        (tmp_path / "checkpoint-2").mkdir()
        assert last_complete_checkpoint(tmp_path) is None
        with pytest.raises(ValueError, match="no complete checkpoint"):
            self.run(tmp_path, resume=True)

    def test_the_best_checkpoint_is_what_is_frozen(self, tmp_path):
        settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
        trainer = trainer_of(qat(), tmp_path, [QATCallback()], **SAVING, **settings)
        trainer.train()
        best = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
        x = features()
        assert torch.equal(best.freeze()(inputs_embeds=x).logits, trainer.model.eval()(inputs_embeds=x).logits)

    def test_stopped_early_with_one_checkpoint_kept(self, tmp_path):
        settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1}
        settings |= {"metric_for_best_model": "score", "greater_is_better": True, "max_steps": 30}
        trainer = trainer_of(qat(), tmp_path, [QATCallback(), EarlyStoppingCallback(1)], **{**SAVING, **settings})
        scores = iter((2.0, 1.0))
        trainer.compute_metrics = lambda prediction: {"score": next(scores)}
        trainer.train()
        assert trainer.state.global_step == 6 and trainer.model.quant_state == "frozen"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
        best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3").freeze()
        x = features()
        assert torch.equal(best(inputs_embeds=x).logits, trainer.model.eval()(inputs_embeds=x).logits)


SCRIPT = (
    "--use_cpu --disable_tqdm true --hidden_size 16 --max_steps 12 --qat_max_steps 10 --save_steps 4 --save_total_limit 1 "
    "--warmup_steps 2 --dropout 0.2 --per_device_train_batch_size 16 --fake_quant_from 3 --observe_until 7 "
    "--calibration_batches 2"
).split()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("script") / "whole"
    TestScript().run(out)
    return out


class TestScript:
    def run(self, out: Path, *points: str) -> list[str]:
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(HERE / "kill_driver.py"), str(out), *points, "--", *SCRIPT]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if line.split(" ")[0] in (*points, "None")]
        assert lines[-1] == "None 0", done.stderr[-3000:]
        return lines[:-1]

    def compare(self, one: Path, other: Path) -> None:
        for stage in ("float/model", "qat/model", "frozen"):
            ours, theirs = (load_file(out / stage / "model.safetensors") for out in (one, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), stage

    def test_writes_results_for_the_model_card(self, undisturbed):
        results = json.loads((undisturbed / "results.json").read_text())
        assert all(results["bit_identical"].values())
        assert set(results["metrics"][0]["values"]) == {"float", "qat", "frozen"}
        assert results["bytes"]["frozen"] < results["bytes"]["float"]
        assert (results["training"]["float"]["steps"], results["training"]["qat"]["steps"]) == (12, 10)
        assert "gru-digits-monarch-int8_state16" in (undisturbed / "frozen" / "README.md").read_text()

    def test_killed_runs_end_with_the_same_weights(self, undisturbed, tmp_path):
        points = ["state:2", "backward:14"]
        assert self.run(tmp_path / "killed", *points) == [f"{point} -9" for point in points]
        self.compare(undisturbed, tmp_path / "killed")

    @pytest.mark.slow
    def test_killed_at_every_sort_of_moment(self, undisturbed, tmp_path):
        """In the middle of a step and of writing each kind of file, while a checkpoint is deleted, and between all stages."""
        float_points = ["step:6", "torch.save:1", "state:1", "remove:1", "weights:1", "rename:1"]
        qat_points = ["calibrate:1", "backward:6", "weights:1", "torch.save:2", "state:1", "rename:1"]
        points = [*float_points, *qat_points, "calibrate:1", "freeze:1", "weights:1", "weights:2"]
        assert self.run(tmp_path / "killed", *points) == [f"{point} -9" for point in points]
        self.compare(undisturbed, tmp_path / "killed")

    def test_refuses_to_go_on_with_other_settings(self, undisturbed):
        sys.path.insert(0, str(HERE.parent / "scripts"))
        import train_qat

        with pytest.raises(SystemExit, match="hidden_size: 16, now 32"):
            train_qat.main(["--output_dir", str(undisturbed), *SCRIPT, "--hidden_size", "32"])
