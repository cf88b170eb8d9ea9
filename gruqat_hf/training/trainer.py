"""transformers' Trainer with what quantization-aware training adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from ..hub.checks import check_names, read_headers, spec_of
from ..layers import QuantState
from ..quantization import QuantRecipe
from .callback import QATCallback
from .checkpoints import is_complete, last_complete_checkpoint
from .parameter_groups import learned_scales, separate_scales
from .publishing import PublishingMixin


class QATTrainer(PublishingMixin, Trainer):
    """A Trainer that gives learned scales an optimizer group of their own, resumes only from checkpoints that were written to
    their end, shows the metrics of a :class:`QATCallback` to every logger, and uploads checkpoints that load, with a real card.

    All else is Trainer's; a plain Trainer with a QATCallback trains QAT as well. (Publish what it trained with
    ``model.push_to_hub()``: its own ``push_to_hub()`` replaces the model card.)

    Args:
        args, kwargs: Trainer's.
        scale_learning_rate: of learned scales (LSQ), which never have weight decay; None for a hundredth of
            ``args.learning_rate``.
    """

    def __init__(self, *args: Any, scale_learning_rate: float | None = None, **kwargs: Any) -> None:
        if scale_learning_rate is not None and not scale_learning_rate > 0:
            raise ValueError(f"QATTrainer.scale_learning_rate must be positive, got {scale_learning_rate!r}")
        self.scale_learning_rate = scale_learning_rate
        model = args[0] if args else kwargs.get("model")
        if getattr(model, "quant_state", None) == QuantState.FROZEN:  # transformers would recommend adapters
            raise ValueError(
                "QATTrainer cannot train a model in the frozen state, whose weights are integers; load the checkpoint that it "
                "was frozen from, or call model.dequantize().prepare_qat(recipe)"
            )
        super().__init__(*args, **kwargs)
        self._qat_callback_first()

    def _qat_callback_first(self) -> None:
        # Loggers such as TensorBoard's come before the callbacks of the user, and would miss what those add to a log.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, QATCallback))

    def add_callback(self, callback: Any) -> None:
        super().add_callback(callback)
        self._qat_callback_first()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        scales = learned_scales(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in scales]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given:
            separate_scales(optimizer, self.model if model is None else model, self.scale_learning_rate)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; with ``resume_from_checkpoint=True`` a checkpoint that a killed training left half
        written is passed over.

        Raises:
            ValueError: ``resume_from_checkpoint=True`` and no checkpoint is complete; a checkpoint that is not; or one of a model
                in another state, of another recipe or with other tensors.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: no complete checkpoint in {self.args.output_dir}; call train() to start anew"
                )
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise ValueError(
                f"resume_from_checkpoint: {resume_from_checkpoint} holds no whole {TRAINER_STATE_NAME}, and the training would "
                "begin anew with its weights; pass a complete checkpoint, or load the model from there and call train()"
            )
        if resume_from_checkpoint:
            self._refuse_other_model(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _refuse_other_model(self, checkpoint: Path) -> None:
        """Trainer loads what has the same name, and goes on with whatever the rest happens to be."""
        config = getattr(self.model, "config", None)
        if not hasattr(self.model, "quant_state") or not (checkpoint / CONFIG_NAME).is_file():
            return
        quantization = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8")).get("quantization_config") or {}
        saved, present = quantization.get("state", "float"), str(self.model.quant_state)
        if saved != present:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is of a model in the {saved} state, this one is in the {present} state; "
                "load the model from there instead, and give each training an output_dir of its own"
            )
        if quantization and QuantRecipe.of(quantization["recipe"]) != config.quantization_config.recipe:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} was trained with another recipe than this model's; resume with the recipe "
                f"that its {CONFIG_NAME} holds, or begin a new training"
            )
        files = sorted(str(file) for file in checkpoint.glob("model*.safetensors"))
        if files:
            check_names(self.model, spec_of(self.model), read_headers(files))
