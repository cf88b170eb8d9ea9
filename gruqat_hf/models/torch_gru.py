"""Weights from and to torch.nn.GRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers import GRULayer, GRUStack, QuantState
from .configuration_gruqat import GruQatConfig


def config_of(gru: nn.GRU, **fields: Any) -> GruQatConfig:
    """The config of a dense model shaped like ``gru``.

    Raises:
        ValueError: not a torch.nn.GRU.
    """
    if not isinstance(gru, nn.GRU):
        raise ValueError(f"from_torch takes a torch.nn.GRU, got {type(gru).__name__}")
    return GruQatConfig(
        input_size=gru.input_size,
        hidden_size=gru.hidden_size,
        num_hidden_layers=gru.num_layers,
        bidirectional=gru.bidirectional,
        bias=gru.bias,
        dropout=gru.dropout,
        **fields,
    )


def read_gru(stack: GRUStack, gru: nn.GRU) -> None:
    """Copy the weights of ``gru`` into a float, dense stack of the same shape."""
    for index, directions in enumerate(stack.layers):
        for direction, layer in enumerate(directions):
            layer.load_state_dict(GRULayer.from_torch(gru, index, reverse=direction == 1).state_dict())


@torch.no_grad()
def write_gru(stack: GRUStack, batch_first: bool) -> nn.GRU:
    """A torch.nn.GRU with the weights of a float, dense stack.

    Raises:
        ValueError: another state or structure.
    """
    if stack.quant_state != QuantState.FLOAT:
        right = "dequantize()" if stack.quant_state == QuantState.FROZEN else "freeze() and dequantize()"
        raise ValueError(f"to_torch() needs the float state, but the model is {stack.quant_state}; call {right} first")
    for layer in stack.flat_layers():
        for name in ("structure_hidden", "structure_input"):
            if (kind := getattr(layer, name).kind) != "dense":
                raise ValueError(f"to_torch() needs dense weights, but {name} is {kind!r}; torch.nn.GRU has no such structure")
    first = next(stack.flat_layers())
    weight = first.dense_parameters()[0]
    gru = nn.GRU(
        stack.input_size,
        stack.hidden_size,
        stack.num_layers,
        bias=first.bias,
        batch_first=batch_first,
        dropout=stack.dropout,
        bidirectional=stack.bidirectional,
        device=weight.device,
        dtype=weight.dtype,
    )
    for index, directions in enumerate(stack.layers):
        for direction, layer in enumerate(directions):
            suffix = f"l{index}_reverse" if direction == 1 else f"l{index}"
            for name, values in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), layer.dense_parameters()):
                if values is not None:
                    getattr(gru, f"{name}_{suffix}").copy_(values)
    return gru.train(stack.training)
