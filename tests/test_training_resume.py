"""Training that is taken up again: by the trainers, and by the script that was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import KINDS, features, small_model
from safetensors.torch import load_file, save_file
from training_helpers import LEARNED, qat, trainer_of
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from gruqat_hf.training import (
    QATCallback,
    QATTrainer,
    last_complete_checkpoint,
)

pytestmark = pytest.mark.hf

HERE = Path(__file__).resolve().parent

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

    @pytest.mark.parametrize("name", ["classifier.weight", "model.stack.layers.0.0.x.scale"])
    def test_of_a_damaged_checkpoint_is_refused(self, tmp_path, name):
        """Trainer itself loads what is there, and goes on with whatever the rest happens to be."""
        trainer_of(qat(), tmp_path, **SAVING).train()
        file = tmp_path / "checkpoint-9" / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"missing: {name.removeprefix('model.')}"):
            trainer_of(qat(), tmp_path, **{**SAVING, "max_steps": 12}).train(resume_from_checkpoint=True)

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
