"""Measured results, as a training script writes them and a model card shows them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..quantization import QuantRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Layout of the JSON; docs: model_cards/README.md.
FORMAT = 1

STATES = ("float", "qat", "frozen")

# Fields of a config.json that say nothing of the model itself.
_NO_SHAPE = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")

# Where results and the model must agree, if the results say anything of it: numbers of another model must not get into its card.
_SHAPE = ("vocab_size", "input_size", "hidden_size", "num_hidden_layers", "bidirectional", "structure_hidden", "structure_input")


class Results(NamedTuple):
    """Contents of a results JSON.

    Attributes:
        data: the JSON.
        folder: what paths in it are relative to.
    """

    data: dict[str, Any]
    folder: Path

    @property
    def plots(self) -> list[tuple[Path, str]]:
        """Image files and what they show."""
        return [(self.folder / plot["path"], str(plot.get("caption", ""))) for plot in self.data.get("plots") or []]

    def completed(self, model: PreTrainedModel, name: str) -> Results:
        """With what the model was, so that its card can be made again without it, and with ``name`` if the results have none."""
        config = json.loads(model.config.to_json_string(use_diff=True))
        quantization = config.pop("quantization_config", {})
        model_is = {
            "architecture": type(model).__name__,
            "config": {key: value for key, value in config.items() if key not in _NO_SHAPE},
            "recipe": quantization.get("recipe"),
            "state": str(model.quant_state),
        }
        return Results({"name": name, **self.data, **model_is}, self.folder)

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse results of another model.

        Args:
            config: ``model.config.to_dict()``.

        Raises:
            ValueError: naming the field, and both its values.
        """
        said = self.data.get("config") or {}
        for name in _SHAPE:
            if name in said and said[name] != config.get(name):
                raise ValueError(
                    f"the results are of another model: their config has {name}={said[name]!r}, this model {config.get(name)!r}; "
                    "pass the results.json that the training of this model wrote"
                )
        measured, present = self.data.get("recipe"), (config.get("quantization_config") or {}).get("recipe")
        if measured and present and QuantRecipe.of(measured) != QuantRecipe.of(present):
            raise ValueError(
                f"the results are of another recipe ({_name(measured)}) than this model's ({_name(present)}); "
                "pass the results.json that the training of this model wrote"
            )


def _name(recipe: Mapping[str, Any] | str) -> str:
    return recipe if isinstance(recipe, str) else recipe.get("name") or "one without a name"


def read_results(source: Results | Mapping[str, Any] | str | os.PathLike) -> Results:
    """Read and check results.

    Args:
        source: path of a JSON file, or its contents (paths in it are then relative to the working directory).

    Raises:
        ValueError: a field that is missing, of another type or no finite number, or a plot that does not exist.
        OSError: a file that cannot be read.
    """
    if isinstance(source, Results):
        return source
    if isinstance(source, Mapping):
        name, folder, data = "results", Path(), dict(source)
    else:
        name, folder = os.fspath(source), Path(source).parent
        try:
            data = json.loads(Path(source).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
    results = Results(data, folder)
    problem = _problem(data)
    if problem is None:
        missing = [str(path) for path, _ in results.plots if not path.is_file()]
        problem = f"plots: {', '.join(missing)} do not exist" if missing else None
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    return results


def _problem(data: Any) -> str | None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format") if isinstance(data, dict) else type(data).__name__
        return f"format must be {FORMAT}, got {given!r}"
    if not isinstance(data.get("task"), str):
        return f"task must be a string such as 'sequence-classification', got {data.get('task')!r}"
    dataset = data.get("dataset")
    if not isinstance(dataset, dict) or not isinstance(dataset.get("name"), str):
        return f"dataset must be an object with a name, got {dataset!r}"
    metrics = data.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return f"metrics must be a list of at least one metric, got {metrics!r}"
    for metric in metrics:
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            return f"a metric must be an object with a type such as 'accuracy', got {metric!r}"
        values = metric.get("values")
        if not isinstance(values, dict) or not values:
            return f"metric {metric['type']} must have values by state ({', '.join(STATES)}), got {values!r}"
        for state, value in values.items():
            if state not in STATES:
                return f"metric {metric['type']} has a value for {state!r}; states are {', '.join(STATES)}"
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                return f"metric {metric['type']} must be a finite number in state {state}, got {value!r}"
    for plot in data.get("plots") or []:
        if not isinstance(plot, dict) or not isinstance(plot.get("path"), str):
            return f"a plot must be an object with a path, got {plot!r}"
    return None
