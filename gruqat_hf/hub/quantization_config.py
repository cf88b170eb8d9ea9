"""What ``config.quantization_config`` holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quantization import QuantRecipe

#: Version of the layout of quantized checkpoints that this package writes, and the newest that it reads.
FORMAT_VERSION = 1

STATES = ("qat", "frozen")


class GruQatQuantizationConfig(QuantizationConfigMixin):
    """How a model is quantized, and how far it has come.

    Args:
        recipe: name of a preset, a :class:`QuantRecipe` or its dict.
        state: "qat" (fake-quantized, trainable) or "frozen" (integers). A checkpoint carries the state of the model that was
            saved; for ``from_pretrained(float_checkpoint, quantization_config=...)`` it is the state to bring the model to.
        format_version: layout of the checkpoint.
        quant_method: "gruqat".

    Raises:
        ValueError: a value out of range, a checkpoint of a newer format, or an argument that does not exist.
    """

    quant_method: str = "gruqat"

    def __init__(
        self,
        recipe: QuantRecipe | Mapping[str, Any] | str | None = None,
        *,
        state: str = "qat",
        format_version: int = FORMAT_VERSION,
        quant_method: str = "gruqat",
        **kwargs: Any,
    ) -> None:
        # The version first: a newer format may well have arguments and recipes that this one does not know.
        self.format_version = format_version
        if kwargs:
            raise ValueError(
                f"GruQatQuantizationConfig has no argument {', '.join(sorted(kwargs))}; it takes recipe, state and format_version"
            )
        self.quant_method = quant_method
        self.recipe = recipe
        self.state = state

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(value))

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "state": self.state,
            "recipe": self.recipe.to_dict(),
        }

    def get(self, key: str, default: Any = None) -> Any:
        """As ``dict.get``: transformers reads a config in memory like one from a file."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GruQatQuantizationConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))


def _check_version(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"GruQatQuantizationConfig.format_version must be an integer of at least 1, got {value!r}")
    if value > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has gruqat format {value}, this version of gruqat-hf reads up to {FORMAT_VERSION}; "
            "upgrade with pip install -U gruqat-hf"
        )
    return value


def _check_state(value: Any) -> str:
    if value not in STATES:
        raise ValueError(f"GruQatQuantizationConfig.state must be 'qat' or 'frozen', got {value!r}; a float model has no config")
    return str(value)


def _check_recipe(value: Any) -> QuantRecipe:
    if value is None:
        raise ValueError(
            "GruQatQuantizationConfig needs a recipe: a preset's name such as 'int8_state16', a QuantRecipe or its dict"
        )
    try:
        return QuantRecipe.of(value)
    except TypeError as error:
        raise ValueError(f"GruQatQuantizationConfig.recipe has a value of the wrong type: {error}") from error


def _check_method(value: Any) -> str:
    if value != "gruqat":
        raise ValueError(f"GruQatQuantizationConfig.quant_method is 'gruqat', got {value!r}")
    return "gruqat"


_CHECKS = {"format_version": _check_version, "state": _check_state, "quant_method": _check_method, "recipe": _check_recipe}
