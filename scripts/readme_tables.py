"""Puts the numbers of the newest JSON in benchmarks/ into README.md, between `<!-- begin NAME -->` and `<!-- end NAME -->`.

`--check` changes nothing and fails if README.md differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plot_benchmarks import table as gpu_table

ROOT = Path(__file__).resolve().parent.parent


def measured_on(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    chip = machine.get("gpu") or machine["cpu"]
    return f"{chip}, torch {versions['torch']}, transformers {versions['transformers']}, {results['date']}"


def quickstart(results: dict[str, Any]) -> str:
    """Accuracy, size and bit identity of the quickstart's main model."""
    main, dense = results["structures"]["monarch"], results["structures"]["dense"]
    rows = [("dense float", dense["accuracy"]["float"], dense["bytes"]["float"], dense["parameters"])]
    names = {"float": "float", "qat": "QAT", "frozen": results["settings"]["preset"], "reloaded": "reloaded in a new process"}
    for state, name in names.items():
        size = main["bytes"]["float" if state in ("float", "qat") else "frozen"]
        rows.append((f"monarch {name}", main["accuracy"][state], size, main["parameters"]))
    lines = ["| 2 layers, 64 wide | test accuracy | model.safetensors | parameters |", "|---|---|---|---|"]
    lines += [f"| {name} | {100 * accuracy:.2f} % | {size:,} bytes | {count:,} |" for name, accuracy, size, count in rows]
    same = [f"{pair}: {'bit-identical' if equal else 'different'}" for pair, equal in results["bit_identical"].items()]
    lines.append(f"\nLogits, {'; '.join(same)}. The whole run took {results['seconds']:.0f} s ({measured_on(results)}).")
    return "\n".join(lines)


def convergence(results: dict[str, Any]) -> str:
    """Frozen models beside float ones."""
    lines = ["| task | frozen as | seeds | result | against float |", "|---|---|---|---|---|"]
    for entry in results["summary"]:
        if entry["metric"] == "mse":
            value, against = f"squared error {entry['mean']:.2e}", f"{entry['times_float']:.2f} ×"
        else:
            value, against = f"accuracy {100 * entry['mean']:.2f} %", f"{-entry['points_below_float']:+.2f} points"
        against = "" if entry["preset"] == "float" else against
        lines.append(f"| {entry['task']} | {entry['preset']} | {entry['seeds']} | {value} | {against} |")
    lines.append(f"\n({measured_on(results)})")
    return "\n".join(lines)


def cpu(results: dict[str, Any]) -> str:
    """How many times faster than torch.nn.GRU, for each number of threads."""
    baseline, dynamic = "torch.nn.GRU", "torch dynamic int8 GRU"
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for entry in results["inference"]:
        by_shape.setdefault("T {}, B {}, H {}".format(*entry["shape"]), []).append(entry["models"])
    threads = " / ".join(str(count) for count in dict.fromkeys(entry["threads"] for entry in results["inference"]))

    def row(title: str, name: str, field: str, digits: int) -> str:
        cells = (" / ".join(f"{models[name][field]:.{digits}f}" for models in runs) for runs in by_shape.values())
        return f"| {title} | {' | '.join(cells)} |"

    lines = [f"| {threads} threads | {' | '.join(by_shape)} |", "|---" * (len(by_shape) + 1) + "|"]
    lines.append(row("nn.GRU fp32, ms", baseline, "median_ms", 2))
    lines.append(row("torch's dynamic int8 GRU: times faster", dynamic, "times", 1))
    for name in next(iter(by_shape.values()))[0]:
        state, *structures = name.split(" / ")
        if structures and (structures[1] == "dense" or structures[0] == "diagonal"):
            side = "" if structures[1] == "dense" else ", input diagonal too"
            lines.append(row(f"{structures[0]}, {state}{side}: times faster", name, "times", 1))
    shape = "T {}, B {}, H {}".format(*results["training"][0]["shape"])
    lines += ["", f"Time of a training step, {shape}, as a multiple of nn.GRU's in fp32:", ""]
    names = [name for name in results["training"][0]["models"] if name.startswith("qat")]
    lines += [f"| {threads} threads | {' | '.join(name.split(' / ')[1] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    cells = (" / ".join(f"{1 / entry['models'][name]['times']:.1f}" for entry in results["training"]) for name in names)
    lines.append(f"| QAT | {' | '.join(cells)} |")
    loads = " to ".join(f"{results['load'][when][0]:.1f}" for when in ("before", "after"))
    settings = results["settings"]
    kernels = f"kernels for {results['kernels']}, {settings['rounds']} rounds, load average {loads}"
    if settings["nice"] < 0:
        kernels += ", this process going before the others"
    about = f"Hidden structures, inputs dense unless said; frozen as {settings['preset']}; {kernels}"
    lines.append(f"\n{about} ({measured_on(results)}).")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "quickstart": quickstart,
    "convergence": convergence,
    "cpu": cpu,
    "gpu": gpu_table,
}


def filled(text: str) -> str:
    """README's text with every section that has results in benchmarks/ made anew."""
    for name, make in SECTIONS.items():
        files = sorted((ROOT / "benchmarks").glob(f"{name}-*.json"))
        if not files:
            continue
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{make(json.loads(files[-1].read_text(encoding='utf-8')))}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = filled(text)
    if args.check:
        if new != text:
            print("README.md differs from benchmarks/; run: python scripts/readme_tables.py", file=sys.stderr)
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
