"""The table and the figures of a GPU benchmark, from the JSON that scripts/benchmark.py gpu wrote.

python scripts/plot_benchmarks.py                            # the newest benchmarks/gpu-*.json into docs/images; prints the table
python scripts/plot_benchmarks.py benchmarks/gpu-2026-01-01.json --out outputs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS, PORTABLE, CUDNN, PEER = "gruqat-hf", "gruqat-hf triton", "cuDNN tf32", "gru-qat 0.5.0"
TITLES = {"infer": "inference, both in CUDA graphs", "train": "train step, ours in a CUDA graph, cuDNN eager"}

Shape = tuple[int, ...]


class Results:
    """Times by what was measured; None where that failed or was left out."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.rows = [row for row in report["rows"] if "ms" in row]
        self._times = {self._key(row): row["ms"] for row in self.rows}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (tuple(row["shape"]), row["library"], row["structure"], row["state"], row["mode"], row["launch"])

    @property
    def shapes(self) -> list[Shape]:
        return list(dict.fromkeys(tuple(row["shape"]) for row in self.rows if row["library"] == OURS))

    @property
    def structures(self) -> list[str]:
        return list(dict.fromkeys(row["structure"] for row in self.rows if row["library"] == OURS))

    def ms(self, shape: Shape, library: str, structure: str, state: str, mode: str, launch: str) -> float | None:
        return self._times.get((shape, library, structure, state, mode, launch))

    def best(self, shape: Shape, library: str, structure: str, state: str, mode: str) -> float | None:
        """The faster of an eager call and a CUDA graph."""
        times = [self.ms(shape, library, structure, state, mode, launch) for launch in ("eager", "graph")]
        return min((time for time in times if time is not None), default=None)

    def peak(self, shape: Shape, library: str, structure: str) -> float | None:
        """Memory that a training step takes at its peak, MB."""
        wanted = (shape, library, structure, "float", "train", "eager")
        return next((row.get("peak_mb") for row in self.rows if self._key(row) == wanted), None)

    def speedup(self, shape: Shape, structure: str, state: str, mode: str, library: str = OURS) -> float | None:
        """Times faster than cuDNN: in inference both in a CUDA graph, in training ours in a graph beside cuDNN's eager step."""
        ours = self.best(shape, library, structure, state, mode)
        cudnn = self.ms(shape, CUDNN, "dense", "float", mode, "graph" if mode == "infer" else "eager")
        return None if ours is None or cudnn is None else cudnn / ours

    def over_peer(self, shape: Shape, structure: str, mode: str, library: str = OURS) -> float | None:
        """Times faster than gru-qat, both at their best."""
        ours = self.best(shape, library, structure, "float", mode)
        peer = self.best(shape, PEER, structure, "float", mode)
        return None if ours is None or peer is None else peer / ours


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(report: dict[str, Any], shape: Shape = (512, 32, 512)) -> str:
    """Milliseconds and speed-ups at one shape, as Markdown."""
    results = Results(report)
    lines = [
        "| hidden weights | infer, ms | × cuDNN | frozen int8, ms | train, ms | × cuDNN | peak MB | QAT train, ms "
        "| × gru-qat, infer / train |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, library in ((name, library) for name in results.structures for library in (OURS, PORTABLE)):
        if results.best(shape, library, name, "float", "infer") is None:
            continue
        cells = [
            _number(results.best(shape, library, name, "float", "infer"), ".3f"),
            _number(results.speedup(shape, name, "float", "infer", library), ".1f"),
            _number(results.best(shape, library, name, "frozen", "infer"), ".3f"),
            _number(results.best(shape, library, name, "float", "train"), ".3f"),
            _number(results.speedup(shape, name, "float", "train", library), ".1f"),
            _number(results.peak(shape, library, name), ".0f"),
            _number(results.best(shape, library, name, "qat", "train"), ".3f"),
            " / ".join(_number(results.over_peer(shape, name, mode, library), ".1f") for mode in ("infer", "train")),
        ]
        lines.append(f"| {name}{', portable kernels' if library == PORTABLE else ''} | {' | '.join(cells)} |")
    infer = _number(results.ms(shape, CUDNN, "dense", "float", "infer", "graph"), ".2f")
    train = _number(results.ms(shape, CUDNN, "dense", "float", "train", "eager"), ".2f")
    peak = _number(results.peak(shape, CUDNN, "dense"), ".0f")
    captured = _number(results.ms(shape, CUDNN, "dense", "float", "train", "graph"), ".2f")
    machine, versions = report["machine"], report["versions"]
    lines.append(
        f"\nT, B, H = {shape}; tf32. Ours: the better of eager and CUDA graph. × cuDNN: times faster than its GRU in "
        f"inference, {infer} ms in a CUDA graph, and than its train step, {train} ms and {peak} MB, eager, as nn.GRU is trained; "
        f"in a graph that takes {captured} ms. × gru-qat: than the PyPI package {PEER}, the better of what ran; – not measured. "
        f"{machine.get('gpu')}, torch {versions['torch']}, triton {versions.get('triton')}, {report['date']}."
    )
    return "\n".join(lines)


def plot_speed(report: dict[str, Any], mode: str, path: Path) -> None:
    """Times faster than cuDNN, by structure and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = Results(report)
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    width = 0.8 / len(results.shapes)
    for i, shape in enumerate(results.shapes):
        heights = [results.speedup(shape, name, "float", mode) or 0.0 for name in results.structures]
        axes.bar([x + i * width for x in range(len(heights))], heights, width, label=f"T, B, H = {shape}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(results.structures))], results.structures)
    axes.set(yscale="log", ylabel="times faster than cuDNN tf32", title=TITLES[mode])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(f"{axes.get_title()} ({report['machine'].get('gpu')})")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="?", help="default: the newest in benchmarks/")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the figures; default: %(default)s")
    arguments = parser.parse_args()
    source = arguments.json or max((ROOT / "benchmarks").glob("gpu-*.json"), default=None)
    if source is None:
        parser.error("no benchmarks/gpu-*.json; run scripts/benchmark.py gpu first")
    report = json.loads(source.read_text(encoding="utf-8"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for mode in ("infer", "train"):
        plot_speed(report, mode, arguments.out / f"gpu-{mode}.png")
    print(table(report))


if __name__ == "__main__":
    main()
