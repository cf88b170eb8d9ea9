"""Figures of the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, ScalarFormatter

COLOURS = {"dense": "#4c566a", "blockdiag": "#d08770", "monarch": "#5e81ac", "butterfly": "#a3be8c", "diagonal": "#b48ead"}


def plot_training_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Training loss and test error by epoch, QAT after float."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    offset = 0.0
    for phase, colour in (("float", "#4c566a"), ("QAT", "#5e81ac")):
        points = [point for point in history if point["phase"] == phase]
        epochs = [offset + point["epoch"] for point in points]
        curves = ((left, [point["loss"] for point in points]), (right, [100 * (1 - point["test_accuracy"]) for point in points]))
        for axes, values in curves:
            axes.plot(epochs, values, "o-", markersize=3, color=colour, label=phase)
        offset = epochs[-1] if epochs else offset
    for axes, title in ((left, "training loss"), (right, "test error, %")):
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.minorticks_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_accuracy_vs_size(structures: dict[str, Any], path: Path) -> None:
    """Test accuracy against the size of model.safetensors: each structure in float (hollow) and frozen (filled)."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, outcome in structures.items():
        colour = COLOURS.get(kind, "black")
        sizes = [outcome["bytes"][state] / 1024 for state in ("float", "frozen")]
        accuracies = [100 * outcome["accuracy"][state] for state in ("float", "frozen")]
        axes.plot(sizes, accuracies, "-", color=colour, alpha=0.4)
        axes.plot(sizes[0], accuracies[0], "o", color=colour, markerfacecolor="white")
        axes.plot(sizes[1], accuracies[1], "o", color=colour, label=kind)
    axes.set(xscale="log", xlabel="model.safetensors, KiB", ylabel="test accuracy, %", title="hollow: float, filled: frozen int8")
    ticks = [2**power for power in range(2, 12)]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high], labels=[str(tick) for tick in ticks if low <= tick <= high])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
