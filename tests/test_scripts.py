"""The scripts do what README says, on less training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.hf

ROOT = Path(__file__).resolve().parent.parent


def run_script(name: str, *args: object, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_quickstart(tmp_path):
    out = tmp_path / "quickstart"
    text = run_script("quickstart.py", "--out", out, "--epochs", 4, "--qat-epochs", 1, "--structures", "monarch", cwd=tmp_path)
    assert text.count("bit-identical") == 2
    results = json.loads((out / "results.json").read_text())
    main, dense = results["structures"]["monarch"], results["structures"]["dense"]
    assert set(main["accuracy"]) == {"float", "qat", "frozen", "reloaded"}
    assert main["accuracy"]["reloaded"] == main["accuracy"]["frozen"] == main["accuracy"]["qat"]
    assert min(min(outcome["accuracy"].values()) for outcome in (main, dense)) > 0.6
    assert main["bytes"]["frozen"] < 0.25 * dense["bytes"]["float"]
    assert main["parameters"] < 0.6 * dense["parameters"]
    for name in ("gru-monarch-int8/model.safetensors", "training_curves.png", "accuracy_vs_size.png"):
        assert (out / name).stat().st_size > 0, name


def test_convergence(tmp_path):
    out = tmp_path / "convergence.json"
    tasks = ["digits-monarch", "adding-50"]
    run_script("convergence.py", "--tasks", *tasks, "--seeds", 1, "--scale", 0.01, "--out", out, cwd=tmp_path)
    report = json.loads(out.read_text())
    assert {"date", "machine", "versions", "settings", "summary", "results"} <= set(report)
    presets = {task: [entry["preset"] for entry in report["results"] if entry["task"] == task] for task in tasks}
    assert presets["digits-monarch"] == ["float", "int8_per_channel", "int8_state16", "int4_per_group_64"]
    assert presets["adding-50"] == ["float", "int8_state16", "int8_per_channel"]
    # What was measured in QAT is what was frozen.
    assert all(entry["value"] == entry["qat_eval"] for entry in report["results"] if entry["preset"] != "float")
