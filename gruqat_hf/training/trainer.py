"""transformers' Trainer with what quantization-aware training adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .callback import QATCallback
from .checkpoints import last_complete_checkpoint
from .parameter_groups import learned_scales, separate_scales


class QATTrainer(Trainer):
    """A Trainer that gives learned scales an optimizer group of their own, resumes only from checkpoints that were written to
    their end, and shows the metrics of a :class:`QATCallback` to every logger.

    All else is Trainer's; a plain Trainer with a QATCallback trains QAT as well.

    Args:
        args, kwargs: Trainer's.
        scale_learning_rate: of learned scales (LSQ), which never have weight decay; None for a hundredth of
            ``args.learning_rate``.
    """

    def __init__(self, *args: Any, scale_learning_rate: float | None = None, **kwargs: Any) -> None:
        if scale_learning_rate is not None and not scale_learning_rate > 0:
            raise ValueError(f"QATTrainer.scale_learning_rate must be positive, got {scale_learning_rate!r}")
        self.scale_learning_rate = scale_learning_rate
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
            ValueError: ``resume_from_checkpoint=True`` and no checkpoint is complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: no complete checkpoint in {self.args.output_dir}; call train() to start anew"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)
