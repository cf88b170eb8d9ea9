"""Small models of every head, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from model_helpers import features, small_config

from gruqat_hf import (
    PRESETS,
    GruQatForAudioClassification,
    GruQatForAudioFrameClassification,
    GruQatForCausalLM,
    GruQatForSequenceClassification,
    GruQatForTimeSeriesPrediction,
    GruQatForTokenClassification,
    QuantizerConfig,
    QuantRecipe,
)
from gruqat_hf.quantization import POINTS

VOCABULARY = 23
STATES = ("float", "qat", "frozen")

WEIGHT = QuantizerConfig(granularity="channel", observer="dynamic")
LAYERS = {point: getattr(PRESETS["int8_state16"], point) for point in POINTS}

HEADS: dict[str, type] = {
    "sequence": GruQatForSequenceClassification,
    "token": GruQatForTokenClassification,
    "lm": GruQatForCausalLM,
    "audio": GruQatForAudioClassification,
    "frame": GruQatForAudioFrameClassification,
    "series": GruQatForTimeSeriesPrediction,
}

#: Recipes that quantize embedding and head in different ways.
PART_RECIPES: dict[str, Any] = {
    **{name: name for name in PRESETS if name not in ("fp32", "int8_hidden", "int8_dynamic")},
    "packed": QuantRecipe(
        **LAYERS,
        embedding=QuantizerConfig(bits=3, granularity="group", group_size=4, observer="minmax"),
        head=QuantizerConfig(bits=4, granularity="group", group_size=8, observer="ema"),
        head_input=QuantizerConfig(bits=16, symmetric=False, observer="minmax"),
    ),
    "learned": QuantRecipe(
        **LAYERS,
        embedding=QuantizerConfig(granularity="channel", scheme="lsq"),
        head=QuantizerConfig(bits=5, scheme="lsq", granularity="tensor"),
        head_input=QuantizerConfig(scheme="lsq"),
    ),
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


def model_of(head: str, state: str, recipe: Any = "int8_state16", **fields: Any) -> Any:
    """As :func:`head_model`; text heads read ids, the others features."""
    if head in ("sequence", "token"):
        fields = {"vocab_size": VOCABULARY, **fields}
    return head_model(head, state, recipe, classifier_dropout=0.2, **fields)


def train_once(model: Any) -> Any:
    """One step of training, as in an ordinary loop."""
    x = inputs_of(model)
    model.train()
    outputs = model(**{model.main_input_name: x})[model.stream_output]
    outputs.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return model.eval()
