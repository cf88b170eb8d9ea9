"""Configuration of the models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from ..scan import check_backend
from ..sharing.shim import auto_map, write_shim
from ..structures import StructureConfig, structure_class

_STRUCTURES = ("structure_hidden", "structure_input")

# Beyond these no weight could be held anyway; a damaged config.json is refused before memory is asked for.
_LARGEST = {
    "input_size": 1 << 20,
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "vocab_size": 1 << 31,
    "prediction_length": 1 << 20,
}


class GruQatConfig(PreTrainedConfig):
    """Shape and structure of a GRU model; all arguments by keyword.

    Args:
        input_size: features of a time step; the width of the embedding when there is a vocabulary.
        hidden_size: width of the hidden state of each layer and direction.
        num_hidden_layers: number of stacked layers.
        bidirectional: whether each layer also reads the sequence backwards.
        bias: whether the layers have their two biases.
        dropout: probability, in [0, 1), of dropping an output between layers in training.
        structure_hidden: structure of the hidden weights: a :class:`StructureConfig`, its dict or a kind's name. The attribute is
            a dict always; :attr:`hidden_structure` is the StructureConfig.
        structure_input: the same for the input weights; see :attr:`input_structure`.
        vocab_size: number of tokens; None for a model that takes float features ``inputs_embeds`` instead of ``input_ids``.
        classifier_dropout: probability of dropping before a classification head; None for the value of ``dropout``.
        use_cache: whether a unidirectional model returns its recurrent state as ``past_key_values``.
        tie_word_embeddings: whether a language model's output layer has the embedding as its weight.
        prediction_length: number of steps that a time-series model forecasts.
        forecast_loss: loss of a time-series model: "mse" or "l1".
        pad_token_id, bos_token_id, eos_token_id: special tokens; the padding token's embedding stays zero.
        backend: name of the scan backend to force, as ``GRUQAT_BACKEND`` does for all models, or None. Of this process: it is
            neither saved nor in :meth:`to_dict`.

    Raises:
        ValueError: a value that no model can have.
    """

    model_type = "gruqat"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    input_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    dropout: float = 0.0
    structure_hidden: dict[str, Any] | str | StructureConfig | None = None
    structure_input: dict[str, Any] | str | StructureConfig | None = None
    vocab_size: int | None = None
    classifier_dropout: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    prediction_length: int = 1
    forecast_loss: str = "mse"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    backend: str | None = None

    def __setattr__(self, key: str, value: Any) -> None:
        if key in _STRUCTURES:
            value = _structure(key, value).to_dict()
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.dtype, str) and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"GruQatConfig.dtype must name a torch dtype, such as 'float32', got {self.dtype!r}")
        num_labels = kwargs.get("num_labels")
        if num_labels is not None:
            _check_integer("num_labels", num_labels, 1, None)
        super().__post_init__(**kwargs)
        self.check()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save config.json, with the file that makes ``trust_remote_code=True`` find the classes.

        Args:
            push_to_hub: whether to upload both to the repository ``repo_id`` (by default named after the folder) as well; further
                arguments go to ``push_to_hub()``.
        """
        self.auto_map = auto_map(getattr(self, "auto_map", None))
        super().save_pretrained(save_directory)
        write_shim(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Does nothing for the package's own class: checkpoints refer to the package and carry no copy of its source."""
        if cls is not GruQatConfig:
            super().register_for_auto_class(auto_class)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without what belongs to a process and not to a model."""
        fields = super().to_dict()
        fields.pop("backend", None)
        return fields

    @property
    def hidden_structure(self) -> StructureConfig:
        """Structure of the hidden weights."""
        return StructureConfig.of(self.structure_hidden)

    @property
    def input_structure(self) -> StructureConfig:
        """Structure of the input weights."""
        return StructureConfig.of(self.structure_input)

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def check(self) -> None:
        """Refuse values that no model can have; run at construction and again when a model is built.

        Raises:
            ValueError: naming the field, its value and the values that would do.
        """
        for name in ("input_size", "hidden_size", "num_hidden_layers"):
            _check_integer(name, getattr(self, name), 1, _LARGEST[name])
        _check_integer("prediction_length", self.prediction_length, 1, _LARGEST["prediction_length"])
        if self.forecast_loss not in ("mse", "l1"):
            raise ValueError(f"GruQatConfig.forecast_loss must be 'mse' or 'l1', got {self.forecast_loss!r}")
        for name in ("bidirectional", "bias", "use_cache", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"GruQatConfig.{name} must be True or False, got {getattr(self, name)!r}")
        _check_probability("dropout", self.dropout)
        if self.classifier_dropout is not None:
            _check_probability("classifier_dropout", self.classifier_dropout)
        if not self.id2label:
            raise ValueError("GruQatConfig.id2label is empty; give num_labels of at least 1, or a label for each class")
        try:
            check_backend(self.backend)
        except ValueError as error:
            raise ValueError(f"GruQatConfig.backend: {error}") from error
        self._check_structures()
        self._check_tokens()
        quantization = getattr(self, "quantization_config", None)
        if not (quantization is None or isinstance(quantization, dict) or hasattr(quantization, "quant_method")):
            raise ValueError(
                f"GruQatConfig.quantization_config must be a GruQatQuantizationConfig or its dict, got {quantization!r}; "
                "leave it out for a float model"
            )

    def _check_structures(self) -> None:
        widths = {self.input_size} if self.num_hidden_layers == 1 else {self.input_size, self.hidden_size * self.num_directions}
        checks = [("structure_hidden", self.hidden_structure, self.hidden_size)]
        checks += [("structure_input", self.input_structure, width) for width in sorted(widths)]
        for name, structure, width in checks:
            try:
                structure_class(structure).check_sizes(width, self.hidden_size, structure)
            except ValueError as error:
                raise ValueError(f"GruQatConfig.{name}: {error}") from error

    def _check_tokens(self) -> None:
        if self.vocab_size is None:
            return
        _check_integer("vocab_size", self.vocab_size, 1, _LARGEST["vocab_size"])
        if self.pad_token_id is not None:
            _check_integer("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)


def _structure(name: str, value: Any) -> StructureConfig:
    try:
        return StructureConfig.of(dict(value) if isinstance(value, Mapping) else value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"GruQatConfig.{name}: {error}") from error


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"GruQatConfig.{name} must be {bounds}, got {value!r}")


def _check_probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"GruQatConfig.{name} must be a number in [0, 1), got {value!r}")
