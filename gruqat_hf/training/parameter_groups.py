"""Optimizer groups: learned scales (LSQ) are no weights and are not to be pulled towards zero."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..quantization import FakeQuantize

#: Rate of learned scales as a share of the weights' rate. Adam moves every parameter by about its rate at each step, however
#: small its gradient, and an int8 scale is a hundredth of the values that it scales.
SCALE_RATE = 0.01


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales that training learns, by name; empty for a recipe without ``scheme="lsq"``."""
    scales: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            scales.update(module.named_parameters(prefix=path, recurse=False))
    return scales


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights with weight decay, biases without, learned scales without and with a rate of their own.

    For a training loop of one's own, or for ``Trainer(optimizers=(AdamW(parameter_groups(model, lr=...)), None))``;
    :class:`QATTrainer` does the same by itself.

    Args:
        lr: learning rate.
        weight_decay: of the weights.
        scale_lr: learning rate of the learned scales; None for a hundredth of ``lr``.
    """
    scales = {id(parameter) for parameter in learned_scales(model).values()}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [(name, parameter) for name, parameter in trained if id(parameter) not in scales]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in others if "bias" not in name], "lr": lr, "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in others if "bias" in name], "lr": lr, "weight_decay": 0.0},
        _scale_group([parameter for _, parameter in trained if id(parameter) in scales], lr, scale_lr),
    ]
    return [group for group in groups if group["params"]]


def separate_scales(optimizer: Optimizer, model: nn.Module, lr: float | None = None) -> None:
    """Move the learned scales of ``model`` out of the groups of a new ``optimizer`` into one of their own, the last.

    Args:
        lr: their learning rate; None for a hundredth of the optimizer's.
    """
    scales = {id(parameter): parameter for parameter in learned_scales(model).values() if parameter.requires_grad}
    if not scales:
        return
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scales]
    optimizer.add_param_group(_scale_group(list(scales.values()), float(optimizer.defaults["lr"]), lr))


def _scale_group(scales: list[nn.Parameter], lr: float, scale_lr: float | None) -> dict[str, Any]:
    return {"params": scales, "lr": SCALE_RATE * lr if scale_lr is None else scale_lr, "weight_decay": 0.0}
