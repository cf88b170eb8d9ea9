"""Trains a GRU in float, goes on in quantization-aware training, freezes it to integers, measures each state and saves it.

    python scripts/train_qat.py --output_dir outputs/digits                                     # handwritten digits
    python scripts/train_qat.py --task byte-lm --structure blockdiag --output_dir outputs/lm    # next byte of a manual
    python scripts/train_qat.py --task folder --dataset my_texts --output_dir outputs/texts     # csv, json, parquet or text files
    torchrun --nproc_per_node 2 scripts/train_qat.py --output_dir outputs/digits                # two GPUs
    accelerate launch --multi_gpu --num_processes 2 scripts/train_qat.py --output_dir outputs/digits

Either starts two processes without GPUs too, with --use_cpu after the script's name. (accelerate's own --cpu starts one, however
many --num_processes says: it leaves more to mpirun.)

A run that was killed, at any moment, is taken up by the same command, and ends with the same weights. All arguments of
transformers.TrainingArguments can be given as well (num_train_epochs and max_steps are those of the float training). It leaves in
the output folder: float/model, qat/model, the integer model in frozen/, results.json for its model card, and a plot. With
--push_to_hub the integer model goes to the Hub, once it is measured.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _environment import environment
from _tasks import DEFAULTS, TASKS, Task
from huggingface_hub import snapshot_download
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction, HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed

from gruqat_hf import PRESETS, GruQatConfig, GruQatQuantizationConfig
from gruqat_hf.layers.report import report
from gruqat_hf.training import QATCallback, QATTrainer, last_complete_checkpoint

logger = logging.getLogger("train_qat")


@dataclass
class Arguments:
    """What is trained, and how it is quantized."""

    task: str = field(default="digits", metadata={"help": "what to train on", "choices": list(TASKS)})
    dataset: str | None = field(default=None, metadata={"help": "task folder: the folder"})
    text_column: str = field(default="text", metadata={"help": "task folder: column of the texts"})
    label_column: str = field(
        default="label", metadata={"help": "task folder: column of the classes; without it, a language model"}
    )
    sequence_length: int = field(default=128, metadata={"help": "bytes of a text"})
    text_bytes: int | None = field(default=None, metadata={"help": "task byte-lm: read only so much of the text"})
    fold: int = field(default=0, metadata={"help": "task digits: which fifth is the test set, 0 to 4"})
    float_model: str | None = field(default=None, metadata={"help": "float checkpoint (folder or Hub id) to start QAT from"})
    hidden_size: int = field(default=64, metadata={"help": "width of the state"})
    num_hidden_layers: int = field(default=2, metadata={"help": "layers above each other"})
    embedding_size: int = field(default=64, metadata={"help": "width of the embedding of bytes"})
    dropout: float = field(default=0.0, metadata={"help": "between layers and before a classification head"})
    structure: str = field(default="monarch", metadata={"help": "kind of the hidden weights"})
    structure_input: str = field(default="dense", metadata={"help": "kind of the input weights"})
    nblocks: int = field(default=4, metadata={"help": "blocks of monarch and blockdiag weights"})
    recipe: str = field(default="int8_state16", metadata={"help": f"JSON file of a QuantRecipe, or one of {', '.join(PRESETS)}"})
    qat_epochs: float = field(default=6.0, metadata={"help": "epochs of QAT"})
    qat_max_steps: int = field(default=-1, metadata={"help": "steps of QAT, instead of epochs"})
    qat_learning_rate: float | None = field(default=None, metadata={"help": "default: a third of the learning rate"})
    scale_learning_rate: float | None = field(default=None, metadata={"help": "of learned scales; default: 1/100 of QAT's"})
    fake_quant_from: float = field(default=0.0, metadata={"help": "round from this step of QAT on (below 1: share of the steps)"})
    observe_until: float | None = field(
        default=None, metadata={"help": "observers stand still from this step of QAT on, likewise"}
    )
    calibration_batches: int = field(default=16, metadata={"help": "batches seen before QAT, and before freezing"})


class Run:
    """One run and the stages that it consists of; each starts from what the one before it left on disk."""

    def __init__(self, arguments: Arguments, training: TrainingArguments) -> None:
        self.arguments, self.training = arguments, training
        self.out = Path(training.output_dir)
        self.task: Task = TASKS[arguments.task](arguments)
        self.remember_settings()

    def remember_settings(self) -> None:
        """Refuse to go on with a run that was started with other settings."""
        settings = asdict(self.arguments)
        for name in ("seed", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "weight_decay"):
            settings[name] = getattr(self.training, name)
        settings["gradient_accumulation_steps"] = self.training.gradient_accumulation_steps
        settings["processes"] = self.training.world_size
        path = self.out / "settings.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        differ = (name for name, value in settings.items() if before.get(name) != value)
        if changed := [f"{name}: {before.get(name)!r}, now {settings[name]!r}" for name in differ]:
            raise SystemExit(f"{self.out} holds a run with other settings ({'; '.join(changed)}); choose another --output_dir")
        if self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(settings, indent=1) + "\n")

    @property
    def is_main(self) -> bool:
        return self.training.process_index == 0

    def trainer(self, model: PreTrainedModel, stage: str, callbacks: list[Any] | None = None, **changes: Any) -> QATTrainer:
        """A trainer that leaves its checkpoints in the stage's folder."""
        args = copy.copy(self.training)
        for name, value in {"output_dir": str(self.out / stage), "push_to_hub": False, **changes}.items():
            setattr(args, name, value)
        return QATTrainer(
            model=model,
            args=args,
            data_collator=self.task.collate,
            train_dataset=self.task.train,
            eval_dataset=self.task.test,
            compute_metrics=self.task.metrics,
            callbacks=callbacks,
            scale_learning_rate=self.arguments.scale_learning_rate,
        )

    def finish(self, trainer: QATTrainer, target: Path) -> None:
        """Save the model, in one move, so that it is there as a whole or not at all."""
        partial = target.with_name(target.name + ".partial")
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(partial))
        if self.is_main:
            _write(partial / "log_history.json", json.dumps(trainer.state.log_history) + "\n")
        trainer.accelerator.wait_for_everyone()
        if self.is_main:
            partial.rename(target)
        trainer.accelerator.wait_for_everyone()

    def stage(self, name: str, start: Callable[[], PreTrainedModel], **settings: Any) -> Path:
        """Train one stage, or take it up where it was left; returns the folder of its model."""
        target = self.out / name / "model"
        if target.exists():
            logger.info("%s is trained already", name)
            return target
        set_seed(self.training.seed)
        trainer = self.trainer(start(), name, **settings)
        trainer.train(last_complete_checkpoint(self.out / name))
        self.finish(trainer, target)
        return target

    def new_model(self) -> PreTrainedModel:
        arguments = self.arguments
        config = GruQatConfig(
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            dropout=arguments.dropout,
            structure_hidden=_structure(arguments.structure, arguments.nblocks),
            structure_input=_structure(arguments.structure_input, arguments.nblocks),
            **self.task.config,
        )
        return self.task.auto_class.from_config(config)

    def prepared_model(self, float_model: Path) -> PreTrainedModel:
        quantization = GruQatQuantizationConfig(_recipe(self.arguments.recipe))
        model = self.task.auto_class.from_pretrained(float_model, quantization_config=quantization)
        return self.calibrate(model.to(self.training.device))

    def calibrate(self, model: PreTrainedModel) -> PreTrainedModel:
        """Show the model the first batches of the training data; all processes see the same."""
        loader = self.batches(self.task.train, self.training.per_device_train_batch_size)
        return model.calibrate(loader, n_batches=self.arguments.calibration_batches, progress=not self.training.disable_tqdm)

    def train_float(self) -> Path:
        if (given := self.arguments.float_model) is not None:
            return Path(given if Path(given).is_dir() else snapshot_download(given))
        return self.stage("float", self.new_model)

    def train_qat(self, float_model: Path) -> Path:
        arguments = self.arguments
        callback = QATCallback(
            fake_quant_from=_steps(arguments.fake_quant_from),
            observe_until=None if arguments.observe_until is None else _steps(arguments.observe_until),
            freeze_at_end=False,  # calibrated once more, below
            log_quantizers="total",
        )
        rate = self.training.learning_rate / 3 if arguments.qat_learning_rate is None else arguments.qat_learning_rate
        return self.stage(
            "qat",
            lambda: self.prepared_model(float_model),
            callbacks=[callback],
            learning_rate=rate,
            num_train_epochs=arguments.qat_epochs,
            max_steps=arguments.qat_max_steps,
        )

    def freeze(self, float_model: Path, qat_model: Path) -> dict[str, Any] | None:
        """Calibrate, freeze, measure every state, save; returns the results, in the main process."""
        load = self.task.auto_class.from_pretrained
        model = self.calibrate(load(qat_model).to(self.training.device))
        if not self.is_main:
            return None
        target = self.out / "frozen"
        shutil.rmtree(target, ignore_errors=True)
        logits = {"float": self.predict(load(float_model)), "qat": self.predict(model)}
        logits["frozen"] = self.predict(model.freeze())
        model.save_pretrained(target)
        logits["reloaded"] = self.predict(load(target))
        path = self.out / "results.json"
        results = self.results(model, logits, float_model, target)
        _write(path, json.dumps(results, indent=1) + "\n")
        model.save_pretrained(target, results=path)  # once more, for the numbers in its card
        if self.training.push_to_hub:
            self.publish(model, path)
        return results

    def publish(self, model: PreTrainedModel, results: Path) -> None:
        training = self.training
        model.push_to_hub(
            training.hub_model_id or self.out.resolve().name,
            results=results,
            token=training.hub_token,
            private=training.hub_private_repo,
            revision=training.hub_revision,
        )

    def batches(self, rows: Any, size: int) -> DataLoader:
        return DataLoader(rows, batch_size=size, collate_fn=self.task.collate)

    def predict(self, model: PreTrainedModel) -> np.ndarray:
        """Logits for the whole test set; a shorter batch is filled up with zeros."""
        model = model.to(self.training.device).eval()
        parts = []
        batches = self.test_batches()
        bar = tqdm(batches, desc=f"measure {model.quant_state}", leave=False, disable=self.training.disable_tqdm)
        with torch.inference_mode():
            for batch in bar:
                inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
                parts.append(model(**inputs).logits.float().cpu())
        return _joined(parts, 0.0)

    def labels(self) -> np.ndarray:
        return _joined([batch["labels"] for batch in self.test_batches()], -100)

    def test_batches(self) -> DataLoader:
        return self.batches(self.task.test, self.training.per_device_eval_batch_size)

    def results(
        self,
        model: PreTrainedModel,
        logits: dict[str, np.ndarray],
        float_model: Path,
        frozen: Path,
    ) -> dict[str, Any]:
        """What the model card is made of."""
        arguments, training = self.arguments, self.training
        where = environment(str(training.device))
        labels = self.labels()
        values = {state: self.task.metrics(EvalPrediction(logits[state], labels)) for state in ("float", "qat", "frozen")}
        stages = {stage: _history(self.out / stage / "model") for stage in ("float", "qat")}
        return {
            "format": 1,
            "name": f"gru-{arguments.task}-{arguments.structure}-{Path(arguments.recipe).stem}",
            "task": self.task.name,
            "dataset": self.task.dataset,
            "data_preparation": self.task.preparation,
            "metrics": [
                {**metric, "values": {state: values[state][metric["type"]] for state in values}} for metric in self.task.described
            ],
            "bit_identical": {
                "QAT in eval mode and frozen": bool(np.array_equal(logits["qat"], logits["frozen"])),
                "frozen, and saved and loaded": bool(np.array_equal(logits["frozen"], logits["reloaded"])),
            },
            "bytes": {"float": _weight_bytes(float_model), "frozen": _weight_bytes(frozen)},
            "parameters": self.task.auto_class.from_pretrained(float_model).num_parameters(),
            "speed": [self.speed(model)],
            "config": {key: value for key, value in model.config.to_dict().items() if key in _SHAPE},
            "training": {
                **{stage: _summary(history) for stage, history in stages.items() if history},
                "batch size": training.train_batch_size * training.world_size * training.gradient_accumulation_steps,
                "seed": training.seed,
                "processes": training.world_size,
                "command": " ".join(["python", "scripts/train_qat.py", *sys.argv[1:]]),
            },
            "plots": self.plot(stages),
            "limits": self.task.limits,
            **where,
        }

    @torch.inference_mode()
    def speed(self, model: PreTrainedModel) -> dict[str, Any]:
        """Median time of a batch of 16 test sequences on this machine, as set up here."""
        batch = self.task.collate([self.task.test[i] for i in range(min(16, len(self.task.test)))])
        batch = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        model.eval()
        times = []
        for _ in range(23):
            started = time.perf_counter()
            model(**batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - started))
        size, steps = next(iter(batch.values())).shape[:2]
        path = report(model).layers[0].path
        value = float(np.median(times[3:]))
        return {"what": f"frozen, a batch of {size} sequences of {steps} steps", "value": value, "unit": "ms", "path": path}

    def plot(self, stages: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
        """Loss by step of both trainings, where matplotlib is installed."""
        try:
            import matplotlib
        except ImportError:
            return []
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        offset = 0
        for stage, colour in (("float", "#4c566a"), ("qat", "#5e81ac")):
            points = [entry for entry in stages[stage] if "loss" in entry]
            if points:
                axes.plot([offset + p["step"] for p in points], [p["loss"] for p in points], color=colour, label=stage)
                offset += points[-1]["step"]
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        if self.is_main:
            figure.savefig(self.out / "training_loss.png", dpi=130)
        plt.close(figure)
        return [{"path": "training_loss.png", "caption": "Training loss: float, then QAT"}]


_SHAPE = ("vocab_size", "input_size", "hidden_size", "num_hidden_layers", "bidirectional", "structure_hidden", "structure_input")


def _structure(kind: str, nblocks: int) -> dict[str, Any]:
    return {"kind": kind, "nblocks": nblocks} if kind in ("monarch", "blockdiag") else {"kind": kind}


def _recipe(name: str) -> Any:
    return json.loads(Path(name).read_text(encoding="utf-8")) if name.endswith(".json") else name


def _steps(value: float) -> int | float:
    return value if 0.0 < value < 1.0 else round(value)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _history(model: Path) -> list[dict[str, Any]]:
    path = model / "log_history.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _summary(history: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    return {
        "steps": max(entry["step"] for entry in history),
        "epochs": round(max(entry.get("epoch", 0.0) for entry in history), 3),
        "highest logged learning rate": max(rates, default=0.0),
    }


def _joined(parts: list[torch.Tensor], fill: float) -> np.ndarray:
    """Batches one after the other; where they have a length, all of the longest."""
    if parts[0].dim() == 1 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(parts).numpy()
    longest = max(part.shape[1] for part in parts)
    whole = [torch.full((len(part), longest, *part.shape[2:]), fill, dtype=part.dtype) for part in parts]
    for target, part in zip(whole, parts):
        target[:, : part.shape[1]] = part
    return torch.cat(whole).numpy()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def parse(command: list[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        logging_steps=25,
        save_steps=200,
        save_total_limit=2,
        per_device_eval_batch_size=64,
        report_to="none",
    )
    chosen = HfArgumentParser(Arguments).parse_args_into_dataclasses(command, return_remaining_strings=True)[0]
    if chosen.task in DEFAULTS:
        parser.set_defaults(**DEFAULTS[chosen.task])
    arguments, training = parser.parse_args_into_dataclasses(command)
    training.use_cache = True  # Trainer writes it into the config, and generation from the saved model would do without its cache
    return arguments, training


def main(command: list[str] | None = None) -> int:
    arguments, training = parse(command)
    logging.basicConfig(format="%(message)s", level=logging.INFO if training.process_index == 0 else logging.WARNING)
    run = Run(arguments, training)
    float_model = run.train_float()
    qat_model = run.train_qat(float_model)
    results = run.freeze(float_model, qat_model)
    if results is None:
        return 0
    for metric in results["metrics"]:
        print(metric["name"] + ": " + ", ".join(f"{state} {value:.4f}" for state, value in metric["values"].items()))
    print(f"bytes: float {results['bytes']['float']:,}, frozen {results['bytes']['frozen']:,}")
    for pair, same in results["bit_identical"].items():
        print(f"{pair}: {'the same bits' if same else 'DIFFERENT'}")
    print(f"the integer model: {run.out / 'frozen'}")
    return 0 if all(results["bit_identical"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
