"""What transformers calls while it loads and saves a quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from ..layers.lifecycle import fake_quantizers
from ..models.parts import heads_of, require_one_table
from .checks import TensorSpec, check_names, check_tensors, read_headers, spec_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from ..models.linear import WideLinear
    from .quantization_config import GruQatQuantizationConfig


class GruQatHfQuantizer(HfQuantizer):
    """Builds the skeleton of a quantized checkpoint before its tensors are set, and checks the tensors before and after.

    For a float checkpoint (``from_pretrained(..., quantization_config=...)``) it quantizes the model once it is loaded.
    """

    quantization_config: GruQatQuantizationConfig

    def __init__(self, quantization_config: GruQatQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._spec: dict[str, TensorSpec] = {}
        self._new_heads: dict[str, WideLinear] = {}
        self._state_dict: Mapping[str, Tensor] | None = None

    @contextmanager
    def saves(self, state_dict: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Have ``save_pretrained`` inside write ``state_dict``, such as one gathered from all ranks, not the model's own."""
        self._state_dict = state_dict
        try:
            yield
        finally:
            self._state_dict = None

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Mapping[str, Tensor] | None, dict[str, str]]:
        # transformers replaces the state dict that save_pretrained was given by this one.
        return self._state_dict, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.state == "qat"

    @property
    def is_qat_trainable(self) -> bool:
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            return model
        found = read_headers(checkpoint_files) if checkpoint_files else None
        model.attach_quantizers(self.quantization_config.recipe)
        self._new_heads = {} if found is None else _new_heads(model, found)
        if self.quantization_config.state == "frozen":
            for head in self._new_heads.values():
                head.abandon_qat()  # its random weights have to be trained, in float
            model.freeze_modules()
        self._spec = spec_of(model)
        if found is not None:
            # Before anything is allocated: a damaged config may ask for any size, and the loader casts what it reads.
            check_names(model, self._spec, found, self._new_heads)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            for quantizer in fake_quantizers(model):
                quantizer.forget_calibration_state()
            for head in self._new_heads.values():
                head.renew_quantizer()
            check_tensors(model, self._spec)
            _refuse_two_tables(model)
            return model
        model.prepare_qat(self.quantization_config)
        if self.quantization_config.state == "frozen":
            _require_calibrated(model)
            model.freeze()
        return model

    def check_state_dict(self, model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> None:
        """Check tensors that were passed to ``from_pretrained(state_dict=...)`` rather than read from files.

        Raises:
            ValueError: naming the tensors that are missing, extra, misshapen or of another type.
        """
        if self.pre_quantized:
            found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype, False) for name, tensor in state_dict.items()}
            check_names(model, self._spec, found)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # config.dtype, which transformers passes on, is a string once the model was saved.
        return model.dequantize(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _new_heads(model: PreTrainedModel, found: Mapping[str, TensorSpec]) -> dict[str, WideLinear]:
    """Heads, by path, that another class's checkpoint has nothing of, or not in this size: they start from random weights."""
    if type(model).__name__ in (model.config.architectures or ()):
        return {}
    new = {}
    for path, head in heads_of(model).items():
        held = found.get(f"{path}.weight", found.get(f"{path}.weight_codes"))
        resized = held is not None and held.shape[:1] != (head.out_features,)
        if resized or not any(name.startswith(f"{path}.") for name in found):
            new[path] = head
    return new


def _refuse_two_tables(model: PreTrainedModel) -> None:
    try:
        require_one_table(model)
    except ValueError as error:
        raise ValueError(
            "the checkpoint holds lm_head.weight beside the embedding that its config.json ties it to, and they differ; one of "
            "them, or tie_word_embeddings, was edited. Save it again from the model it came from"
        ) from error


def _require_calibrated(model: PreTrainedModel) -> None:
    if points := model.uncalibrated():
        raise ValueError(
            f"a float checkpoint cannot be loaded straight to state='frozen' with this recipe: {', '.join(points)} must observe "
            "data first. Load it with state='qat' (or prepare_qat()), then calibrate(loader) and freeze(); or use the preset "
            "'int8_dynamic', which needs no calibration"
        )
