"""CPU speed of float and frozen layers beside torch.nn.GRU, and of QAT training; writes dated JSON under benchmarks/.

Every round calls each model once, one after the other, so that other load on the machine hits all alike; "times" is the median
over rounds of nn.GRU's time divided by the model's. Layers are called as users call them.

    python scripts/benchmark.py cpu              # everything, 1 and 2 threads, into benchmarks/
    python scripts/benchmark.py cpu --rounds 5 --threads 1 --out /tmp
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _environment import environment
from torch import nn
from tqdm import tqdm

from gruqat_hf import GRULayer

ROOT = Path(__file__).resolve().parent.parent
#: T, B, H: sequences of one row, of a batch, of a small layer, and single steps of a stream.
SHAPES = [(64, 1, 512), (64, 32, 512), (100, 1, 128), (1, 1, 512)]
TRAINING_SHAPE = (64, 32, 128)
STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "blockdiag 8": {"kind": "blockdiag", "nblocks": 8},
    "monarch 8": {"kind": "monarch", "nblocks": 8},
    "butterfly": {"kind": "butterfly"},
    "diagonal": {"kind": "diagonal"},
    "circulant": {"kind": "circulant"},
    "ldr": {"kind": "ldr"},
}
PRESET = "int8_state16"
BASELINE = "torch.nn.GRU"
DYNAMIC = "torch dynamic int8 GRU"


def inference_models(steps: int, rows: int, hidden: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name: the two GRUs of torch, then "state / hidden structure / input structure"."""
    x, h0 = torch.randn(steps, rows, hidden), torch.zeros(rows, hidden)
    gru = nn.GRU(hidden, hidden).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(nn.ModuleList([nn.GRU(hidden, hidden)]), {nn.GRU})[0]
    calls: dict[str, Callable[[], object]] = {BASELINE: lambda: gru(x, h0[None]), DYNAMIC: lambda: dynamic(x, h0[None])}
    for name, structure in STRUCTURES.items():
        for side in ("dense", "same"):
            if name == "dense" and side == "same":
                continue
            for state in ("float", "frozen"):
                own = None if side == "dense" else structure
                layer = GRULayer(hidden, hidden, structure_hidden=structure, structure_input=own).eval()
                if state == "frozen":
                    layer.prepare_qat(PRESET).eval().calibrate([x], progress=False).freeze()
                calls[f"{state} / {name} / {side}"] = lambda layer=layer: layer(x, h0)
    return calls


def training_models() -> dict[str, Callable[[], object]]:
    """One forward and backward pass each."""
    steps, rows, hidden = TRAINING_SHAPE
    x = torch.randn(steps, rows, hidden)
    models: dict[str, nn.Module] = {BASELINE: nn.GRU(hidden, hidden)}
    for name, structure in STRUCTURES.items():
        for state, recipe in (("float", None), ("qat", PRESET)):
            models[f"{state} / {name} / dense"] = GRULayer(hidden, hidden, structure_hidden=structure, recipe=recipe)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        out, _ = model(x)
        out.square().mean().backward()

    return {name: (lambda model=model: step(model)) for name, model in models.items()}


def measure(calls: dict[str, Callable[[], object]], rounds: int, repeats: int, bar: tqdm) -> dict[str, dict[str, float]]:
    """Milliseconds: median and least over rounds of ``repeats`` calls each, and how many times faster than the baseline."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats)
        bar.update()
    base = seconds[BASELINE]
    return {
        name: {
            "median_ms": round(1e3 * median(own), 5),
            "least_ms": round(1e3 * min(own), 5),
            "times": round(median(theirs / mine for theirs, mine in zip(base, own)), 3),
            "times_by_least": round(min(base) / min(own), 3),
        }
        for name, own in seconds.items()
    }


def priority() -> int:
    """How nice this process is to others, by itself or by Linux's group of its session; negative where it goes first."""
    own = os.nice(0) if hasattr(os, "nice") else 0
    try:
        return own + int(Path("/proc/self/autogroup").read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return own


def run(threads: list[int], rounds: int) -> dict[str, Any]:
    settings = {"preset": PRESET, "rounds": rounds, "nice": priority()}
    results: dict[str, Any] = {**environment(), "settings": settings, "inference": [], "training": []}
    # Before any layer is built, so that no first call waits for the compiler.
    from gruqat_hf.scan.cpu.library import library

    built = library()
    results["kernels"] = built if isinstance(built, str) else built.level
    started, load = time.perf_counter(), os.getloadavg()
    with tqdm(total=len(threads) * (len(SHAPES) + 1) * rounds, unit="round") as bar:
        for count in threads:
            torch.set_num_threads(count)
            for shape in SHAPES:
                bar.set_description(f"{count} threads, {shape}")
                models = inference_models(*shape)
                with torch.inference_mode():
                    measured = measure(models, rounds, 100 if shape[0] == 1 else 1, bar)
                results["inference"].append({"threads": count, "shape": shape, "models": measured})
            bar.set_description(f"{count} threads, training")
            measured = measure(training_models(), rounds, 1, bar)
            results["training"].append({"threads": count, "shape": TRAINING_SHAPE, "models": measured})
    results["load"] = {"before": load, "after": os.getloadavg()}
    results["seconds"] = round(time.perf_counter() - started, 1)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = run(args.threads, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"cpu-{results['date']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
