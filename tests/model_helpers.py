"""Small models and inputs that several test files use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from gruqat_hf import GruQatConfig, GruQatForSequenceClassification, GruQatModel

KINDS: dict[str, Any] = {
    "dense": "dense",
    "diagonal": "diagonal",
    "blockdiag": {"kind": "blockdiag", "nblocks": 2},
    "monarch": {"kind": "monarch", "nblocks": 4},
    "butterfly": "butterfly",
    "circulant": "circulant",
    "ldr": {"kind": "ldr", "rank": 2},
}


def small_config(**fields: Any) -> GruQatConfig:
    return GruQatConfig(**{"input_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_labels": 3, **fields})


def small_model(seed: int = 0, head: bool = True, **fields: Any) -> Any:
    torch.manual_seed(seed)
    cls = GruQatForSequenceClassification if head else GruQatModel
    return cls(small_config(**fields)).eval()


def features(batch: int = 4, steps: int = 6, size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, steps, size, generator=torch.Generator().manual_seed(seed))


def in_state(model: Any, state: str, recipe: Any = "int8_state16") -> Any:
    """Bring a float model to ``state``."""
    if state == "float":
        return model
    model.prepare_qat(recipe).calibrate([features(seed=seed) for seed in range(3)], progress=False)
    return model.freeze() if state == "frozen" else model


def output_of(model: Any, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(inputs_embeds=x, **inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def run_python(code: str, *args: str) -> str:
    """Run ``code`` in a new process, in the package's root; its standard output."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
