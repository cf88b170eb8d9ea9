"""The three states of a model, and what transformers has to know about each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers import GRUStack, QuantState
from ..layers.lifecycle import require_calibrated, require_state, run_calibration
from ..layers.report import Report, report
from ..quantization import QuantRecipe
from .parts import (
    dequantize_parts,
    freeze_parts,
    lags_behind,
    parts_of,
    prepare_parts,
    recipe_in_force,
    require_one_state,
    require_one_table,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_METHOD = "gruqat"


class LifecycleMixin:
    """prepare_qat, calibrate, freeze and dequantize for a model whose :meth:`get_stack` gives its GRU stack.

    Each call changes the stack, the embedding and the head, and then brings the config, and everything that transformers reads
    off a quantized model, into line with them.
    """

    #: Arguments of forward() that calibration passes on from a batch; one that is no mask is needed.
    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "inputs_embeds")

    def get_stack(self) -> GRUStack:
        """The GRU layers of the model."""
        return self.base_model.stack  # type: ignore[attr-defined]

    @property
    def quant_state(self) -> QuantState:
        """ "float", "qat" or "frozen", read off the layers."""
        return self.get_stack().quant_state

    def report(self) -> Report:
        """What the layers are made of, as a table when printed: structures, bits, bytes beside a dense fp32 GRU's, and which scan
        backend ran last and why."""
        return report(self)  # type: ignore[arg-type]

    def prepare_qat(self, config: QuantizationConfigMixin | QuantRecipe | Mapping[str, Any] | str) -> Self:
        """Make a float model a fake-quantized one that trains; returns itself.

        Args:
            config: a GruQatQuantizationConfig, a QuantRecipe, a dict of either, or a preset's name.

        Raises:
            ValueError: no such recipe, or one that the layers, the embedding or the head cannot have; or a model that ties its
                output layer to the embedding but was loaded with another weight there; nothing is changed.
            LifecycleError: the model is not in the float state.
        """
        require_one_table(self)  # type: ignore[arg-type]
        self.attach_quantizers(recipe_of(config))
        self.sync_quantization()
        return self

    def attach_quantizers(self, recipe: QuantRecipe) -> None:
        """The part of :meth:`prepare_qat` that changes modules."""
        stack = self.get_stack()
        stack.prepare_qat(recipe)
        try:
            prepare_parts(self, recipe)  # type: ignore[arg-type]
        except ValueError:
            for layer in stack.flat_layers():
                layer.abandon_qat()
            raise

    def uncalibrated(self) -> list[str]:
        """Names of the quantizers that have no scale yet."""
        return [*self.get_stack().uncalibrated(), *(name for part in parts_of(self) for name in part.uncalibrated())]  # type: ignore[arg-type]

    def calibrate(self, loader: Iterable[Any], n_batches: int | None = None, *, progress: bool = True) -> Self:
        """Observe the ranges of ``n_batches`` batches (None: all) without training on them; returns itself.

        Args:
            loader: gives dicts of the model's inputs and, optionally, ``attention_mask`` (other entries, such as labels, are
                left out), tuples whose first entry is the input, or the input itself.
            progress: whether a progress bar is shown.

        Ranges go on from what was observed before, in training or by an earlier call; a learned scale takes its first value from
        the first batch, if nothing was observed before, and no other.

        Raises:
            ValueError: no batch, or one without inputs.
            LifecycleError: the model is not in the QAT state.
        """
        require_state("calibrate", self.quant_state, QuantState.QAT)
        run_calibration(self, loader, lambda batch: self(**self._model_inputs(batch)), n_batches, progress)  # type: ignore[arg-type, operator]
        return self

    def freeze(self) -> Self:
        """Replace quantized weights by integers and observers by fixed grids; returns itself.

        It also brings along an embedding and a head that a call on the stack or the base model alone left behind.

        Raises:
            LifecycleError: the model is not in the QAT state, or a quantizer has observed nothing yet; nothing is changed.
            ValueError: a weight with NaN or infinity in it; nothing is changed.
        """
        if not lags_behind(self, QuantState.FROZEN):  # type: ignore[arg-type]
            require_state("freeze", self.quant_state, QuantState.QAT)
        require_calibrated(self.uncalibrated())
        for part in parts_of(self):  # type: ignore[arg-type]
            part.require_finite()
        self.freeze_modules()
        self.sync_quantization()
        return self

    def freeze_modules(self) -> None:
        """The part of :meth:`freeze` that changes modules."""
        stack = self.get_stack()
        if stack.quant_state == QuantState.QAT:
            stack.freeze()
        freeze_parts(self)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype | None = None) -> Self:
        """Make a frozen model a float one with the values its integers stand for; returns itself.

        Butterfly and ldr weights come back dense, and the config says so. It also brings along an embedding and a head that a
        call on the stack or the base model alone left behind.

        Args:
            dtype: of the result; None keeps the model's.

        Raises:
            LifecycleError: the model is not frozen.
        """
        dtype = self.dtype if dtype is None else dtype  # type: ignore[attr-defined]
        if not lags_behind(self, QuantState.FLOAT):  # type: ignore[arg-type]
            self.get_stack().dequantize()
        dequantize_parts(self)  # type: ignore[arg-type]
        self.sync_quantization()
        return self.to(dtype)  # type: ignore[attr-defined]

    def sync_quantization(self) -> None:
        """Make config and quantizer say what the layers are: a config that claims otherwise would be saved with the weights.

        Raises:
            LifecycleError: embedding or head are in a state that the layers are not in.
        """
        stack = self.get_stack()
        require_one_state(self)  # type: ignore[arg-type]
        config = self.config  # type: ignore[attr-defined]
        layer = next(stack.flat_layers())
        config.structure_hidden, config.structure_input = layer.structure_hidden, layer.structure_input
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]  # type: ignore[attr-defined]
        if stack.quant_state == QuantState.FLOAT:
            for model in models:
                _clear_quantization(model)
            return
        recipe = recipe_in_force(self, stack.recipe)  # type: ignore[arg-type]
        quantizer = AutoHfQuantizer.from_config(
            {"quant_method": _METHOD, "state": str(stack.quant_state), "recipe": recipe}, pre_quantized=True
        )
        for model in models:
            model.hf_quantizer = quantizer
            model.is_quantized = True
            model.quantization_method = _METHOD
            model.config.quantization_config = quantizer.quantization_config
            model.config._is_quantized = True

    def _model_inputs(self, batch: Any) -> dict[str, Tensor]:
        if isinstance(batch, Mapping):
            names = (*self.input_names, "attention_mask")
            inputs = {name: batch[name] for name in names if batch.get(name) is not None}
            needed = [name for name in self.input_names if not name.endswith("mask")]
            if not inputs.keys() & set(needed):
                raise ValueError(f"calibrate(loader): a batch needs {' or '.join(needed)}, got only {', '.join(map(str, batch))}")
        else:
            first = batch[0] if isinstance(batch, (tuple, list)) else batch
            inputs = {self.main_input_name: first}  # type: ignore[attr-defined]
        return {name: torch.as_tensor(value).to(self.device) for name, value in inputs.items()}  # type: ignore[attr-defined]


def recipe_of(config: QuantizationConfigMixin | QuantRecipe | Mapping[str, Any] | str) -> QuantRecipe:
    """The recipe in a quantization config, a recipe itself, a dict of either, or a preset's name.

    Raises:
        ValueError: none of these.
    """
    in_dict = isinstance(config, Mapping) and "quant_method" in config
    if not in_dict and not isinstance(config, QuantizationConfigMixin):
        return QuantRecipe.of(config)
    method = config["quant_method"] if in_dict else config.quant_method
    if method != _METHOD:
        raise ValueError(f"prepare_qat takes a GruQatQuantizationConfig, got one of quant_method {method!r}")
    return (AutoQuantizationConfig.from_dict(dict(config)) if in_dict else config).recipe


def _clear_quantization(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method != _METHOD:
        return  # another method's, on a head for example
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.config._is_quantized = False
