"""What train_qat.py trains on: data that is at hand without a download, and what there is to measure on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, EvalPrediction

Rows = Any  # a map-style dataset of dicts


@dataclass
class Task:
    """One task.

    Attributes:
        name: as the Hub calls it.
        auto_class: of the model.
        train, test: rows, dicts of the model's inputs.
        config: fields of GruQatConfig that the data decides.
        dataset: for the model card: name, split and so on.
        preparation: how the inputs are made, for the model card.
        metrics: from logits and labels.
        described: of each metric: what the model card needs to know.
        pad_with: value that pads each input of unequal length; None where all lengths are equal.
        limits: for the model card.
    """

    name: str
    auto_class: Any
    train: Rows
    test: Rows
    config: dict[str, Any]
    dataset: dict[str, Any]
    preparation: str
    metrics: Callable[[EvalPrediction], dict[str, float]]
    described: list[dict[str, Any]]
    pad_with: dict[str, int] | None = None
    limits: list[str] = field(default_factory=list)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch, sequences padded on the right to the longest."""
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [torch.as_tensor(row[name]) for row in rows]
            if self.pad_with is not None and name in self.pad_with:
                batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=self.pad_with[name])
            else:
                batch[name] = torch.stack(values)
        return batch


ACCURACY = {"type": "accuracy", "name": "Accuracy", "higher_is_better": True}
BITS_PER_BYTE = {"type": "bits_per_byte", "name": "Bits per byte", "higher_is_better": False}
BYTE_ACCURACY = {"type": "accuracy", "name": "Next byte guessed right", "higher_is_better": True}


def _accuracy(result: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}


def _next_byte(result: EvalPrediction) -> dict[str, float]:
    logits, labels = torch.as_tensor(result.predictions)[:, :-1], torch.as_tensor(result.label_ids)[:, 1:]
    real = labels != -100
    logits, labels = logits[real].double(), labels[real]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return {"bits_per_byte": float(loss / np.log(2)), "accuracy": float((logits.argmax(-1) == labels).double().mean())}


def digits(arguments: Any) -> Task:
    """scikit-learn's handwritten digits, row by row."""
    from _digits import digits as load

    data = load(arguments.fold)

    def rows(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
        return [{"inputs_embeds": image, "labels": label} for image, label in zip(x, y)]

    return Task(
        name="sequence-classification",
        auto_class=AutoModelForSequenceClassification,
        train=rows(data.train_x, data.train_y),
        test=rows(data.test_x, data.test_y),
        config={"input_size": 8, "num_labels": 10},
        dataset={
            "name": "Optical Recognition of Handwritten Digits (as in scikit-learn)",
            "url": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            "license": "CC BY 4.0",
            "description": "8 by 8 pixels of 17 grey levels, 1,797 images",
            "split": "test",
            "examples": {"train": len(data.train_x), "test": len(data.test_x)},
        },
        preparation="an image is 8 time steps (rows, top to bottom) of 8 pixels, scaled from 0 to 16 to -1 to 1.",
        metrics=_accuracy,
        described=[ACCURACY],
    )


def byte_lm(arguments: Any) -> Task:
    """The reference of the Python language that ships with Python, byte by byte."""
    import platform
    from pydoc_data.topics import topics

    text = "\n\n".join(str(topics[name]) for name in sorted(topics)).encode()
    if arguments.text_bytes is not None:
        text = text[: arguments.text_bytes]
    length = arguments.sequence_length
    pieces = torch.frombuffer(bytearray(text[: len(text) // length * length]), dtype=torch.uint8).long().view(-1, length)
    # Every tenth piece is left out of training: the topics differ, and a test set of the last ones would be of another kind.
    is_test = torch.arange(len(pieces)) % 10 == 9

    def rows(chosen: Tensor) -> list[dict[str, Tensor]]:
        return [{"input_ids": piece, "labels": piece} for piece in chosen]

    return Task(
        name="text-generation",
        auto_class=AutoModelForCausalLM,
        train=rows(pieces[~is_test]),
        test=rows(pieces[is_test]),
        config={"vocab_size": 256, "input_size": arguments.embedding_size},
        dataset={
            "name": f"The Python Language Reference (pydoc_data.topics of Python {platform.python_version()})",
            "url": "https://docs.python.org/3/reference/",
            "license": "PSF-2.0",
            "description": f"{len(text):,} bytes of text in pieces of {length}",
            "language": "en",
            "split": "test",
            "examples": {"train": int((~is_test).sum()), "test": int(is_test.sum())},
        },
        preparation="the UTF-8 bytes of a text are the token ids; there are no special tokens.",
        metrics=_next_byte,
        described=[BITS_PER_BYTE, BYTE_ACCURACY],
        limits=["It has read one manual, and knows nothing but its style."],
    )


PADDING = 256


def folder(arguments: Any) -> Task:
    """Texts in a local folder (csv, json, parquet or text files), read by the datasets library: classified if there are labels,
    else continued."""
    if importlib.util.find_spec("datasets") is None:
        raise SystemExit("--task folder reads files with the datasets library, which is not installed: pip install datasets")
    from datasets import DatasetDict, load_dataset

    if arguments.dataset is None or not Path(arguments.dataset).exists():
        raise SystemExit(f"--task folder needs --dataset, a folder that exists; got {arguments.dataset!r}")
    loaded = load_dataset(str(arguments.dataset))
    if "test" not in loaded and "validation" in loaded:
        loaded["test"] = loaded["validation"]
    if "test" not in loaded:
        loaded = DatasetDict(loaded["train"].train_test_split(test_size=0.1, seed=0))
    text, label = arguments.text_column, arguments.label_column
    columns = loaded["train"].column_names
    if text not in columns:
        raise SystemExit(f"--text_column {text!r} is not in the data, whose columns are {', '.join(columns)}")
    classes = sorted(set(loaded["train"][label])) if label in columns else None

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = list(str(row[text]).encode()[: arguments.sequence_length]) or [PADDING]
        if classes is None:
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
        if row[label] not in classes:
            raise SystemExit(f"the test data has the label {row[label]!r}, which the training data has not")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": classes.index(row[label])}

    train, test = (loaded[split].map(encode, remove_columns=loaded[split].column_names) for split in ("train", "test"))
    config: dict[str, Any] = {"vocab_size": 257, "pad_token_id": PADDING, "input_size": arguments.embedding_size}
    if classes is not None:
        config |= {"num_labels": len(classes), "id2label": {index: str(name) for index, name in enumerate(classes)}}
    return Task(
        name="text-generation" if classes is None else "sequence-classification",
        auto_class=AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification,
        train=train,
        test=test,
        config=config,
        dataset={
            "name": Path(arguments.dataset).resolve().name,
            "split": "test",
            "examples": {"train": len(train), "test": len(test)},
        },
        preparation=f"the first {arguments.sequence_length} UTF-8 bytes of a text are the token ids; {PADDING} is padding.",
        metrics=_next_byte if classes is None else _accuracy,
        described=[BITS_PER_BYTE, BYTE_ACCURACY] if classes is None else [ACCURACY],
        pad_with={"input_ids": PADDING, "attention_mask": 0, **({"labels": -100} if classes is None else {})},
    )


TASKS: dict[str, Callable[[Any], Task]] = {"digits": digits, "byte-lm": byte_lm, "folder": folder}

#: Arguments of each task, where the command line says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"learning_rate": 6e-3, "num_train_epochs": 20.0, "per_device_train_batch_size": 64},
    "byte-lm": {"learning_rate": 4e-3, "num_train_epochs": 8.0, "per_device_train_batch_size": 64, "hidden_size": 256},
    "folder": {"learning_rate": 4e-3, "num_train_epochs": 3.0, "per_device_train_batch_size": 32},
}
