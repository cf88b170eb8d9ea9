"""Small trainings that several test files use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_helpers import features, small_model
from transformers import TrainingArguments

from gruqat_hf import PRESETS, QuantizerConfig
from gruqat_hf.training import QATTrainer

LSQ = QuantizerConfig(scheme="lsq", observer="minmax")
LEARNED = replace(PRESETS["int8_state16"], x=LSQ, weight_hidden=replace(LSQ, granularity="channel"), name="learned")


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    x = features(count)
    return [{"inputs_embeds": sequence, "labels": label} for sequence, label in zip(x, (x.sum((1, 2)) > 0).long())]


def trainer_of(model: Any, out: Path, callbacks: list[Any] | None = None, cls: type = QATTrainer, **settings: Any) -> Any:
    known = {name: settings.pop(name) for name in ("scale_learning_rate", "optimizers") if name in settings}
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(out), **{**defaults, **settings})
    return cls(model=model, args=args, train_dataset=rows(), eval_dataset=rows(8), callbacks=callbacks, **known)


def qat(recipe: Any = "int8_state16", **fields: Any) -> Any:
    return small_model(**fields).prepare_qat(recipe)
