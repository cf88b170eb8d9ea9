"""Trains a 2-layer Monarch GRU on handwritten digits in float, then in QAT, freezes it to int8, saves it, loads it in a new
process, and compares it with a dense float GRU of the same width and with the other structures.

Leaves in the output folder: the checkpoints (gru-monarch-int8 and its peers), results.json, training_curves.png,
accuracy_vs_size.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _digits import BATCH, Digits, digits, predict
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from gruqat_hf import GruQatConfig, GruQatForSequenceClassification, GruQatQuantizationConfig, StructureConfig

HERE = Path(__file__).resolve().parent
PRESET = "int8_state16"
MAIN = "monarch"
STRUCTURES = {
    "monarch": StructureConfig("monarch", nblocks=4),
    "dense": StructureConfig("dense"),
    "blockdiag": StructureConfig("blockdiag", nblocks=4),
    "butterfly": StructureConfig("butterfly"),
    "diagonal": StructureConfig("diagonal"),
}
HIDDEN = 64
# One thread: steps this small cost more to share out than to compute, and results do not depend on the machine's core count.
THREADS = 1


@dataclass
class Outcome:
    """One structure's way from float to frozen; sizes are those of model.safetensors."""

    structure: dict[str, Any]
    accuracy: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Progress(TrainerCallback):
    """One bar for a training; keeps the loss and the test accuracy of each epoch."""

    def __init__(self, label: str, phase: str, history: list[dict[str, Any]]) -> None:
        self.label, self.phase, self.history = label, phase, history
        self.loss = float("nan")

    def on_train_begin(self, args, state, control, **kwargs):
        interval = 0.2 if sys.stderr.isatty() else 5.0
        self.bar = tqdm(total=state.max_steps, desc=f"{self.label:<18}", unit="step", mininterval=interval, maxinterval=interval)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        accuracy = metrics["eval_accuracy"]
        self.history.append({"phase": self.phase, "epoch": round(state.epoch, 3), "loss": self.loss, "test_accuracy": accuracy})
        self.bar.set_postfix_str(f"loss {self.loss:.3f}, test {accuracy:.4f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def rows(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"inputs_embeds": pixels, "labels": label} for pixels, label in zip(x, y)]


def train(model, data: Digits, phase: str, label: str, epochs: float, lr: float, seed: int, out: Path, history: list) -> None:
    """Train with transformers.Trainer; the model is in float or in QAT."""
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=512,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(data.train_x, data.train_y),
        eval_dataset=rows(data.test_x, data.test_y),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
        callbacks=[Progress(label, phase, history)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(kind: str, data: Digits, out: Path, epochs: tuple[float, float], seed: int) -> tuple[Outcome, dict[str, Tensor]]:
    """Float training, QAT, calibration, freezing and saving of one structure; also the logits before and after freezing.

    Args:
        epochs: of float training and of QAT.
    """
    started = time.perf_counter()
    set_seed(seed)
    structure = STRUCTURES[kind]
    outcome = Outcome(structure.to_dict())
    config = GruQatConfig(input_size=8, hidden_size=HIDDEN, num_hidden_layers=2, structure_hidden=structure, num_labels=10)
    model = GruQatForSequenceClassification(config)
    outcome.parameters = model.num_parameters()

    def measure(state: str) -> Tensor:
        logits = predict(model, data.test_x)
        outcome.accuracy[state] = float((logits.argmax(-1) == data.test_y).float().mean())
        return logits

    train(model, data, "float", f"{kind} float", epochs[0], 6e-3, seed, out, outcome.history)
    measure("float")
    model.save_pretrained(out / f"gru-{kind}-float")
    outcome.bytes["float"] = file_bytes(out / f"gru-{kind}-float")

    model.prepare_qat(GruQatQuantizationConfig(PRESET))
    train(model, data, "QAT", f"{kind} QAT", epochs[1], 2e-3, seed, out, outcome.history)
    loader = DataLoader(rows(data.train_x, data.train_y), batch_size=BATCH)
    model.calibrate(loader, n_batches=64)
    logits = {"qat": measure("qat")}

    model.freeze()
    logits["frozen"] = measure("frozen")
    model.save_pretrained(out / f"gru-{kind}-int8")
    outcome.bytes["frozen"] = file_bytes(out / f"gru-{kind}-int8")
    outcome.seconds = round(time.perf_counter() - started, 1)
    return outcome, logits


def reload_logits(checkpoint: Path, out: Path) -> Tensor:
    """Logits of the saved checkpoint, from a new process."""
    print(f"loading {checkpoint.name} in a new process ...", flush=True)
    target = out / "reloaded_logits.npy"
    command = [sys.executable, HERE / "quickstart_reload.py", checkpoint, target, "--threads", THREADS]
    subprocess.run([str(part) for part in command], check=True)
    return torch.from_numpy(np.load(target))


def table(results: dict[str, Any]) -> str:
    """The results as the lines that the quickstart ends with."""
    main, dense = results["structures"][MAIN], results["structures"]["dense"]
    dense_bytes, dense_parameters = dense["bytes"]["float"], dense["parameters"]

    def line(name: str, accuracy: float, size: int, parameters: int) -> str:
        share, values = f"{size / dense_bytes:.2f}x", f"{parameters / dense_parameters:.2f}x"
        return f"{name:<30}{accuracy:>14.4f}{size:>16,}{share:>8}{parameters:>13,}{values:>8}"

    names = {"float": "float", "qat": "QAT", "frozen": f"frozen {PRESET}", "reloaded": "reloaded, new process"}
    lines = [
        f"{'':<30}{'test accuracy':>14}{'bytes on disk':>16}{'':>8}{'parameters':>13}{'':>8}",
        line(f"dense float, {HIDDEN} wide", dense["accuracy"]["float"], dense_bytes, dense_parameters),
    ]
    for state, name in names.items():
        size = main["bytes"]["float" if state in ("float", "qat") else "frozen"]
        lines.append(line(f"{MAIN} {name}", main["accuracy"][state], size, main["parameters"]))
    lines.append("")
    for pair, same in results["bit_identical"].items():
        lines.append(f"test logits, {pair}: {'bit-identical' if same else 'DIFFERENT'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "outputs" / "quickstart", help="output folder")
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES), help="compared structures")
    parser.add_argument("--epochs", type=float, default=25, help="of float training")
    parser.add_argument("--qat-epochs", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="keep results.json in benchmarks/ too, for README.md")
    args = parser.parse_args()

    from _environment import environment
    from quickstart_plots import plot_accuracy_vs_size, plot_training_curves

    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    data = digits()
    print(f"{len(data.train_x)} training and {len(data.test_x)} test digits, 8 steps of 8 pixels each", flush=True)

    outcomes: dict[str, Outcome] = {}
    for kind in dict.fromkeys([MAIN, "dense", *args.structures]):
        outcomes[kind], logits = run(kind, data, args.out, (args.epochs, args.qat_epochs), args.seed)
        if kind == MAIN:
            main_logits = logits
    reloaded = reload_logits(args.out / f"gru-{MAIN}-int8", args.out)
    outcomes[MAIN].accuracy["reloaded"] = float((reloaded.argmax(-1) == data.test_y).float().mean())

    settings = {"epochs": args.epochs, "qat_epochs": args.qat_epochs, "seed": args.seed}
    results = {
        **environment(),
        "settings": {"preset": PRESET, "hidden_size": HIDDEN, "batch": BATCH, **settings},
        "structures": {kind: asdict(outcome) for kind, outcome in outcomes.items()},
        "bit_identical": {
            "QAT eval = frozen": torch.equal(main_logits["qat"], main_logits["frozen"]),
            "frozen = reloaded": torch.equal(main_logits["frozen"], reloaded),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(results, indent=1) + "\n"
    (args.out / "results.json").write_text(text, encoding="utf-8")
    if args.record:
        kept = HERE.parent / "benchmarks" / f"quickstart-{results['date']}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text, encoding="utf-8")
    plot_training_curves(results["structures"][MAIN]["history"], args.out / "training_curves.png")
    plot_accuracy_vs_size(results["structures"], args.out / "accuracy_vs_size.png")

    print(f"\n{table(results)}\n\ncheckpoint: {args.out / f'gru-{MAIN}-int8'}")
    print(f"plots and results.json: {args.out}   ({results['seconds']:.0f} s)")
    return 0 if all(results["bit_identical"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
