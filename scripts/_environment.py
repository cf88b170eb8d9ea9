"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gruqat_hf

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton", "numpy", "scikit-learn")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "gruqat-hf": gruqat_hf.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(device: str = "cpu") -> dict[str, Any]:
    """Date, machine and versions, as JSON types."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {"cpu": cpu_name(), "cores": cores, "threads": torch.get_num_threads(), "system": platform.system()}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "machine": machine, "versions": versions()}
