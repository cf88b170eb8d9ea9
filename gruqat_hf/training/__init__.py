"""Quantization-aware training with transformers' Trainer. Not imported with the package: Trainer takes a while to import."""

from .callback import QATCallback
from .checkpoints import last_complete_checkpoint
from .metrics import quantizer_metrics
from .parameter_groups import learned_scales, parameter_groups
from .trainer import QATTrainer

__all__ = [
    "QATCallback",
    "QATTrainer",
    "last_complete_checkpoint",
    "learned_scales",
    "parameter_groups",
    "quantizer_metrics",
]
