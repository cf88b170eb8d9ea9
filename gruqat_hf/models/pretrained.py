"""What every model of the package has in common."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..layers.lifecycle import LifecycleError, QuantState
from ..layers.plain_weight import PlainWeight
from ..layers.recurrent import GRUBase
from ..layers.weight import StructuredWeight
from ..quantization import FakeQuantize, FrozenGrid, Observer
from ..sharing.saving import SharingMixin
from ..structures import Structure
from .configuration_gruqat import GruQatConfig
from .lifecycle import LifecycleMixin
from .parts import heads_of, parts_of
from .streaming import StreamingMixin

logger = logging.getLogger("gruqat_hf")


class GruQatPreTrainedModel(LifecycleMixin, StreamingMixin, SharingMixin, PreTrainedModel):
    """Base of the models: initialisation, loading, saving and the lifecycle of quantization."""

    config_class = GruQatConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"  # of the class, by convention its first argument; an instance knows what it takes
    supports_gradient_checkpointing = True
    _no_split_modules = ["GRULayer"]  # noqa: RUF012  (transformers reads and replaces it)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: GruQatConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)
        self.main_input_name = "inputs_embeds" if config.vocab_size is None else "input_ids"
        self.head_names: tuple[str, ...] = ()

    def post_init(self) -> None:
        """As transformers'; also notes which modules are output layers, for a user may put others in their place."""
        super().post_init()
        self.head_names = tuple(heads_of(self))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    # A frozen model without biases has no parameter to read these from.
    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the float parameters; scales are fp32 whatever it is."""
        own = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return next(own, None) or getattr(self.config, "dtype", None) or torch.float32

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """As :meth:`GruQatModel.set_input_embeddings`, for the model inside."""
        self.base_model.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the number of tokens; see ``transformers.PreTrainedModel.resize_token_embeddings``.

        In QAT the scales of tokens that stay are kept; an optimizer that learns scales has to be made anew, as for the weights.
        Where the padding token goes, ``config.pad_token_id`` becomes None, with a warning.

        Raises:
            LifecycleError: embedding or output layer are frozen to integers.
        """
        if any(part.is_frozen for part in parts_of(self)):
            raise LifecycleError(
                "resize_token_embeddings() needs float weights, but embedding or head are frozen to integers; call dequantize(), "
                "resize, then prepare_qat(recipe), calibrate(loader) and freeze() again"
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for part in parts_of(self):
            part.fit_quantizer()
        pad = self.config.pad_token_id
        if pad is not None and pad >= embeddings.num_embeddings:
            logger.warning(
                "resize_token_embeddings() removed the padding token: pad_token_id was %d and is None now; set "
                "config.pad_token_id to one of the %d tokens left",
                pad,
                embeddings.num_embeddings,
            )
            for config in (self.config, getattr(self, "generation_config", None)):
                if config is not None and config.pad_token_id == pad:
                    config.pad_token_id = None
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Set the own tensors of ``module`` that no checkpoint has set."""
        for name, values in _initial_values(module).items():
            init.copy_(getattr(module, name), values)

    @classmethod
    def _from_config(cls, config: GruQatConfig, **kwargs: Any) -> Any:
        # The model of a config alone is a float one, and its config must not claim otherwise.
        if getattr(config, "quantization_config", None) is not None:
            config = copy.deepcopy(config)
            del config.quantization_config
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of any state; see ``transformers.PreTrainedModel.from_pretrained``.

        ``quantization_config=GruQatQuantizationConfig(recipe, state=...)`` brings a float checkpoint to QAT, or, where the recipe
        needs no calibration (preset "int8_dynamic"), to integers.

        Raises:
            ValueError: a quantized checkpoint with tensors missing, extra, misshapen, of another type or with impossible values,
                a float one whose layers are of another structure or state, or a config that no model can have.
        """
        with_info = kwargs.pop("output_loading_info", False)
        state_dict = kwargs.get("state_dict")
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if state_dict is not None and hasattr(getattr(model, "hf_quantizer", None), "check_state_dict"):
            model.hf_quantizer.check_state_dict(model, state_dict)
        _refuse_other_layers(model, info)
        model.sync_quantization()
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Save in the present state; see ``transformers.PreTrainedModel.save_pretrained``."""
        self.sync_quantization()
        quantizer = getattr(self, "hf_quantizer", None)
        passes_on = quantizer.saves(state_dict) if hasattr(quantizer, "saves") else nullcontext()
        with passes_on:
            return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)


def _initial_values(module: nn.Module) -> Mapping[str, Tensor]:
    """Fresh values of the parameters and buffers that ``module`` itself owns."""
    if isinstance(module, Structure):
        return module.initial_parameters()
    if isinstance(module, (FakeQuantize, Observer)):
        return module.initial_values(next(module.buffers()).device)
    if isinstance(module, GRUBase):
        return _uniform({"bias_input": module.bias_input, "bias_hidden": module.bias_hidden}, module.hidden_size**-0.5)
    if isinstance(module, nn.Linear):
        fresh = _uniform({"weight": module.weight, "bias": module.bias}, module.in_features**-0.5)
        return {**fresh, **_placeholders(module)}
    if isinstance(module, nn.Embedding) and module.weight is not None:
        weight = torch.empty_like(module.weight, requires_grad=False).normal_()
        if module.padding_idx is not None:
            weight[module.padding_idx] = 0.0
        return {"weight": weight}
    if isinstance(module, (StructuredWeight, FrozenGrid, PlainWeight)):
        return _placeholders(module)
    return {}


def _placeholders(module: nn.Module) -> dict[str, Tensor]:
    """For a frozen module: only a damaged checkpoint leaves its buffers unset, and is refused; until then they are no garbage."""
    own = module.named_buffers(recurse=False)
    return {name: torch.ones_like(buffer) if "scale" in name else torch.zeros_like(buffer) for name, buffer in own}


def _uniform(parameters: Mapping[str, Tensor | None], bound: float) -> dict[str, Tensor]:
    return {
        name: torch.empty_like(parameter, requires_grad=False).uniform_(-bound, bound)
        for name, parameter in parameters.items()
        if parameter is not None
    }


def _refuse_other_layers(model: GruQatPreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that holds other tensors than the model's layers, or codes where embedding or head have a float weight:
    transformers would warn and draw random weights."""
    names = {id(module): name for name, module in model.base_model.named_modules()}
    inside = f"{names[id(model.get_stack())]}."

    def in_layers(kind: str) -> list[str]:
        bare = (name.removeprefix(f"{model.base_model_prefix}.") for name in info[kind])
        return sorted(name for name in bare if name.startswith(inside))

    parts = {name for name, module in model.named_modules() if isinstance(module, PlainWeight)}
    codes = [name for name in info["unexpected_keys"] if name.endswith("_codes") and name.rpartition(".")[0] in parts]
    if codes and model.quant_state == QuantState.FLOAT:
        raise ValueError(
            f"the checkpoint holds integers, {', '.join(sorted(codes))}, but its config.json (or the config passed) says float "
            "there, and the weight would be random; load it with the config it was saved with, quantization_config included"
        )
    missing, extra = in_layers("missing_keys"), in_layers("unexpected_keys")
    if missing and extra:
        raise ValueError(
            "the checkpoint's layers are of another structure or state than its config.json says (or than the config passed): "
            f"missing {', '.join(missing[:5])}; found instead {', '.join(extra[:5])}. Load it with the config it was saved with, "
            "quantization_config included"
        )
