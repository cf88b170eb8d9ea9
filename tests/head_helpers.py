"""Small models of every head, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from model_helpers import features, small_config

from gruqat_hf import (
    GruQatForAudioClassification,
    GruQatForAudioFrameClassification,
    GruQatForCausalLM,
    GruQatForSequenceClassification,
    GruQatForTimeSeriesPrediction,
    GruQatForTokenClassification,
)

VOCABULARY = 23
STATES = ("float", "qat", "frozen")

HEADS: dict[str, type] = {
    "sequence": GruQatForSequenceClassification,
    "token": GruQatForTokenClassification,
    "lm": GruQatForCausalLM,
    "audio": GruQatForAudioClassification,
    "frame": GruQatForAudioFrameClassification,
    "series": GruQatForTimeSeriesPrediction,
}


def ids(batch: int = 4, steps: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))


def head_model(head: str, state: str = "float", recipe: Any = "int8_state16", seed: int = 0, **fields: Any) -> Any:
    """A small model in eval mode, brought to ``state`` on random data."""
    torch.manual_seed(seed)
    fields = {"structure_hidden": {"kind": "monarch", "nblocks": 4}, **fields}
    if head == "lm":
        fields = {"vocab_size": VOCABULARY, **fields}
    model = HEADS[head](small_config(**fields)).eval()
    return to_state(model, state, recipe)


def to_state(model: Any, state: str, recipe: Any = "int8_state16") -> Any:
    if state == "float":
        return model
    batches = [{model.main_input_name: inputs_of(model, seed=seed)} for seed in range(2)]
    model.prepare_qat(recipe).calibrate(batches, progress=False)
    return model.freeze() if state == "frozen" else model


def inputs_of(model: Any, batch: int = 4, steps: int = 6, seed: int = 1) -> torch.Tensor:
    """What the model reads: ids or features."""
    if model.main_input_name == "input_ids":
        return ids(batch, steps, seed)
    return features(batch, steps, model.config.input_size, seed)


def run(model: Any, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits, forecasts or last hidden states."""
    with torch.no_grad():
        return model(**{model.main_input_name: x}, **inputs)[model.stream_output]
