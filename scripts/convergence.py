"""Does QAT reach the accuracy of float? Digits and the adding problem, several seeds, frozen models measured.

Every run trains in float, then goes on from the same weights for the same number of steps twice: in float and in QAT. So a
quantized model is compared with a float model that was trained just as long. Plain torch loops: AdamW, cosine decay, gradient
clipping. Writes dated JSON under benchmarks/.

    python scripts/convergence.py                                            # everything
    python scripts/convergence.py --tasks adding-50 --presets int8_state16 --seeds 1
    python scripts/convergence.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _environment import environment
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gruqat_hf import GRULayer, GruQatConfig, GruQatForSequenceClassification, GruQatQuantizationConfig, StructureConfig

HERE = Path(__file__).resolve().parent
HIDDEN = 64
MONARCH = StructureConfig("monarch", nblocks=4)


class AddingModel(nn.Module):
    """A GRU layer and a linear read-out of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = GRULayer(2, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 2]`` → ``[B]``."""
        return self.head(self.gru(x)[1]).squeeze(-1)


class Adding:
    """Add the two values in [0, 1] that are marked, one in each half of T steps; a constant guess has a squared error of 1/6.

    Inputs are centred, as for any symmetric grid; rounding them to 8 bits alone then costs 2 * (1/254)^2 / 12 = 2.6e-6.
    """

    metric = "mse"
    presets = ("int8_state16", "int8_per_channel")
    batch, test_batch, lr, qat_lr = 64, 4096, 4e-3, 1e-3

    def __init__(self, length: int, device: str, float_steps: int = 1500, qat_steps: int = 500) -> None:
        self.length, self.device = length, device
        self.float_steps, self.qat_steps = float_steps, qat_steps

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs ``[T, B, 2]`` (2 * value - 1, and -1 or 1 as the marker) and sums of the values ``[B]``."""
        half = self.length // 2
        values = torch.rand(self.length, batch, generator=generator)
        first = torch.randint(0, half, (batch,), generator=generator)
        second = torch.randint(half, self.length, (batch,), generator=generator)
        every = torch.arange(batch)
        markers = torch.full_like(values, -1.0)
        markers[first, every] = markers[second, every] = 1.0
        x = torch.stack([2 * values - 1, markers], -1)
        return x.to(self.device), (values[first, every] + values[second, every]).to(self.device)

    def start(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        self.test = self.draw(self.test_batch, torch.Generator().manual_seed(10_000))
        return AddingModel().to(self.device)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(20_000 + seed)
        while True:
            yield self.draw(self.batch, generator)

    def loss(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(model(x), target)

    @torch.inference_mode()
    def measure(self, model: nn.Module) -> float:
        model.eval()
        x, target = self.test
        return float(F.mse_loss(model(x), target))

    def prepare(self, model: nn.Module, preset: str) -> None:
        model.gru.prepare_qat(preset)

    def calibrate(self, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        model.gru.calibrate((x for x, _ in batches), n_batches=16, progress=False)

    def freeze(self, model: nn.Module) -> None:
        model.gru.freeze()


class Digits:
    """The quickstart's task and model; a seed is also the fold of images that is tested on."""

    metric = "accuracy"
    presets = ("int8_per_channel", "int8_state16", "int4_per_group_64")
    batch, lr, qat_lr = 64, 6e-3, 2e-3

    def __init__(self, structure: StructureConfig, device: str) -> None:
        self.structure, self.device = structure, device
        self.float_steps, self.qat_steps = 700, 250

    def start(self, seed: int) -> nn.Module:
        from _digits import FOLDS, digits

        torch.manual_seed(seed)
        self.train_x, self.train_y, self.test_x, self.test_y = (part.to(self.device) for part in digits(seed % FOLDS))
        config = GruQatConfig(
            input_size=8, hidden_size=HIDDEN, num_hidden_layers=2, structure_hidden=self.structure, num_labels=10
        )
        return GruQatForSequenceClassification(config).to(self.device)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(20_000 + seed)
        while True:
            for chosen in torch.randperm(len(self.train_x), generator=generator).split(self.batch):
                yield self.train_x[chosen.to(self.device)], self.train_y[chosen.to(self.device)]

    def loss(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return model(inputs_embeds=x, labels=target).loss

    def measure(self, model: nn.Module) -> float:
        from _digits import predict

        return float((predict(model, self.test_x).argmax(-1) == self.test_y).float().mean())

    def prepare(self, model: nn.Module, preset: str) -> None:
        model.prepare_qat(GruQatQuantizationConfig(preset))

    def calibrate(self, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        model.calibrate(({"inputs_embeds": x} for x, _ in batches), n_batches=16, progress=False)

    def freeze(self, model: nn.Module) -> None:
        model.freeze()


TASKS = {
    "digits-monarch": lambda device: Digits(MONARCH, device),
    "digits-dense": lambda device: Digits(StructureConfig("dense"), device),
    "adding-50": lambda device: Adding(50, device),
    "adding-100": lambda device: Adding(100, device, float_steps=2000),
    "adding-50-long": lambda device: Adding(50, device, float_steps=4000, qat_steps=1500),
}


def train(task, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float, label: str) -> None:
    """AdamW with cosine decay to zero after a short warm-up; gradients clipped to norm 1."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    warmup = min(50, steps // 10)

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    interval = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(range(steps), desc=f"{label:<34}", unit="step", mininterval=interval, maxinterval=interval) as bar:
        for step in bar:
            loss = task.loss(model, *next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 49:
                bar.set_postfix_str(f"loss {loss.item():.3g}", refresh=False)


def run(name: str, task, seed: int, presets: list[str]) -> Iterator[dict[str, Any]]:
    """One seed of one task: a result for float and one for each preset."""

    def result(preset: str, started: float, **values: float) -> dict[str, Any]:
        seconds = round(time.perf_counter() - started, 1)
        return {"task": name, "seed": seed, "preset": preset, "metric": task.metric, **values, "seconds": seconds}

    started = time.perf_counter()
    model = task.start(seed)
    train(task, model, task.batches(seed), task.float_steps, task.lr, f"{name} seed {seed} float")
    trained = task.measure(model)
    weights = copy.deepcopy(model.state_dict())

    train(task, model, task.batches(1_000 + seed), task.qat_steps, task.qat_lr, f"{name} seed {seed} float, on")
    yield result("float", started, before_fine_tuning=trained, value=task.measure(model))

    for preset in presets:
        started = time.perf_counter()
        model = task.start(seed)
        model.load_state_dict(weights)
        task.prepare(model, preset)
        task.calibrate(model, task.batches(2_000 + seed))
        after_training_quantization = task.measure(model)
        train(task, model, task.batches(1_000 + seed), task.qat_steps, task.qat_lr, f"{name} seed {seed} {preset}")
        task.calibrate(model, task.batches(2_000 + seed))
        qat = task.measure(model)
        task.freeze(model)
        yield result(preset, started, before_fine_tuning=after_training_quantization, qat_eval=qat, value=task.measure(model))


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, beside float's."""
    summary = []
    for task, preset in dict.fromkeys((entry["task"], entry["preset"]) for entry in results):
        entries = [entry for entry in results if (entry["task"], entry["preset"]) == (task, preset)]
        values = [entry["value"] for entry in entries]
        reference = fmean(entry["value"] for entry in results if (entry["task"], entry["preset"]) == (task, "float"))
        line = {"task": task, "preset": preset, "metric": entries[0]["metric"], "seeds": len(values), "mean": fmean(values)}
        if entries[0]["metric"] == "mse":
            line["times_float"] = fmean(values) / reference
        else:
            line["points_below_float"] = 100 * (reference - fmean(values))
        summary.append(line)
    return summary


def show(summary: list[dict[str, Any]]) -> str:
    lines = [f"{'task':<16}{'frozen as':<20}{'seeds':>6}{'mean':>12}  against float"]
    for entry in summary:
        against = f"{entry['times_float']:.2f} x" if "times_float" in entry else f"{-entry['points_below_float']:+.2f} points"
        lines.append(f"{entry['task']:<16}{entry['preset']:<20}{entry['seeds']:>6}{entry['mean']:>12.5f}  {against}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--presets", nargs="+", help="default: those that each task is judged by")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N-1; digits has 5 folds")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all step counts, for a quick look")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: benchmarks/convergence-DATE.json")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    where = environment(args.device)
    out = args.out or HERE.parent / "benchmarks" / f"convergence-{where['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for name in args.tasks:
        task = TASKS[name](args.device)
        task.float_steps, task.qat_steps = (max(1, round(args.scale * steps)) for steps in (task.float_steps, task.qat_steps))
        settings[name] = {key: getattr(task, key) for key in ("float_steps", "qat_steps", "batch", "lr", "qat_lr")}
        for seed in range(args.seeds):
            for entry in run(name, task, seed, args.presets or list(task.presets)):
                results.append(entry)
                # Written after every result, so that an interrupted run leaves what it had.
                report = {**where, "settings": settings, "summary": summarise(results), "results": results}
                partial = out.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                partial.replace(out)
    print(f"\n{show(summarise(results))}\n\n{out}")


if __name__ == "__main__":
    main()
