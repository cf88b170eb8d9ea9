"""A layer's scan by the Triton kernels against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from kernel_helpers import distance, matmul_precision
from torch import Tensor

from gruqat_hf.layers import GRULayer
from gruqat_hf.quantization import PRESETS, QuantizerConfig, QuantRecipe
from gruqat_hf.scan import ScanInputs, scan_reference

STRUCTURES: dict[str, dict[str, Any]] = {
    "diagonal": {"kind": "diagonal"},
    "blockdiag": {"kind": "blockdiag", "nblocks": 4},
    "monarch": {"kind": "monarch", "nblocks": 4},
    "butterfly": {"kind": "butterfly"},
    "dense": {"kind": "dense"},
    "circulant": {"kind": "circulant"},
    "ldr": {"kind": "ldr"},
}

_LEARNED = QuantizerConfig(scheme="lsq", observer="ema")
_LEARNED_WEIGHT = QuantizerConfig(scheme="lsq", granularity="channel", observer="ema")
_AFFINE = QuantizerConfig(symmetric=False, observer="ema")

#: Recipes beyond the presets.
RECIPES: dict[str, QuantRecipe] = {
    "learned": QuantRecipe(
        x=_LEARNED,
        h=_LEARNED,
        state=replace(_LEARNED, granularity="channel"),
        weight_input=_LEARNED_WEIGHT,
        weight_hidden=_LEARNED_WEIGHT,
        mid_hidden=_LEARNED,
    ),
    "affine": QuantRecipe(
        x=_AFFINE, h=_AFFINE, state=_AFFINE, weight_input=_LEARNED_WEIGHT, weight_hidden=_LEARNED_WEIGHT, mid_hidden=_LEARNED
    ),
    "groups": replace(
        PRESETS["int4_per_group_64"],
        weight_hidden=QuantizerConfig(bits=4, granularity="group", group_size=4, observer="dynamic"),
    ),
}

#: Recipes with a grid of the gate pre-activations.
GATE_RECIPES: dict[str, QuantRecipe] = {
    "tensor": replace(PRESETS["int8_state16"], gates=QuantizerConfig(observer="fixed")),
    "gate": replace(PRESETS["int8_state16"], gates=QuantizerConfig(granularity="gate", observer="ema")),
    "channel": replace(RECIPES["groups"], gates=QuantizerConfig(bits=6, granularity="channel", observer="minmax")),
    "affine": replace(RECIPES["affine"], gates=replace(_AFFINE, granularity="gate")),
    "learned": replace(RECIPES["learned"], gates=replace(_LEARNED, granularity="channel")),
}


def build(
    structure: Mapping[str, Any], recipe: QuantRecipe | str | None, hidden: int, inputs: int, device: torch.device, **kwargs: Any
) -> GRULayer:
    """A layer in eval mode, calibrated on values of standard deviation 2 where it is quantized."""
    layer = GRULayer(inputs, hidden, structure_hidden=structure, recipe=recipe, **kwargs)
    if recipe is not None:
        layer.backend = "reference"
        layer.train()
        layer(torch.randn(4, 3, inputs) * 2)
    return layer.eval().to(device)


def clip(layer: GRULayer) -> GRULayer:
    """Scales so small that states leave their grids, each a different one."""
    with torch.no_grad():
        for point, factor in ((layer.h, 0.5), (layer.state, 0.7), (layer.weight_hidden.mid, 0.6), (layer.gates, 0.3)):
            if point is not None:
                point.scale.mul_(factor)
    return layer


def gradients(
    layer: GRULayer, backend: str, x: Tensor, h0: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs, last state, and gradients of a random functional of both with respect to the input, h0 and every parameter."""
    layer.backend = backend
    layer.zero_grad(set_to_none=True)
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    out, last = layer(x, h0, mask)
    _functional(out, last).backward()
    return out.detach(), last.detach(), _collected(layer, x, h0)


def _functional(out: Tensor, last: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator).to(value) for value in (out, last)]
    return (out * weights[0]).sum() + (last * weights[1]).sum()


def _collected(layer: GRULayer, x: Tensor, h0: Tensor) -> dict[str, Tensor]:
    found = {"x": x.grad, "h0": h0.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    return {name: value.clone() for name, value in found.items() if value is not None}


def check(
    layer: GRULayer,
    steps: int,
    rows: int,
    *,
    masked: bool = False,
    precision: str = "highest",
    states_within: float = 2e-5,
    gradients_within: float = 1e-3,
    backend: str = "triton",
) -> None:
    """Outputs, last state and every gradient by the kernels are those of the reference; quantized, states bit for bit. Of a float
    layer the scan is judged, see :func:`scan_gradients`.

    Inference goes by the prepared plan, training by the custom operators; both are checked.
    """
    device = next(layer.parameters()).device
    x, h0 = torch.randn(steps, rows, layer.input_size) * 2, torch.rand(rows, layer.hidden_size) * 2 - 1
    x, h0 = x.to(device), h0.to(device)
    mask = (torch.rand(steps, rows) > 0.3).to(device) if masked else None
    if layer.recipe is None:
        out, last, wanted = scan_gradients(layer, x, h0, mask, precision)
    else:
        with matmul_precision("highest"):
            out, last, wanted = gradients(layer, "reference", x, h0, mask)
    with matmul_precision(precision):
        found_out, found_last, found = gradients(layer, backend, x, h0, mask)
        assert layer.last_path.startswith(backend)
        with torch.no_grad():
            planned_out, planned_last = layer(x, h0, mask)
    for states, reference in ((found_out, out), (found_last, last), (planned_out, out), (planned_last, last)):
        if layer.recipe is not None:
            assert torch.equal(states, reference)
        else:
            assert (found_distance := distance(states, reference)) <= states_within, found_distance
    assert found.keys() == wanted.keys()
    distances = {name: distance(found[name], gradient) for name, gradient in wanted.items()}
    assert max(distances.values()) <= gradients_within, distances


def scan_gradients(
    layer: GRULayer, x: Tensor, h0: Tensor, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As :func:`gradients`, of a float layer with the reference's scan in fp32, but an input product as exact as ``precision``.

    That product is PyTorch's: rounding both operands to tf32 moves the states of a layer with 512 inputs by 3.2e-4 already,
    whatever the scan does.
    """
    layer.backend = "triton"
    layer.zero_grad(set_to_none=True)
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    with matmul_precision(precision):
        gi = layer._input_product(x, mask)
    apart = gi.detach().requires_grad_()
    operand, bias = layer._operand(layer.weight_hidden), layer._bias(layer.bias_hidden)
    with matmul_precision("highest"):
        states, last = scan_reference(ScanInputs(apart, h0, operand, bias, mask=mask, reverse=layer.reverse))
        out = states if mask is None else states.masked_fill(~mask.unsqueeze(-1), 0.0)
        _functional(out, last).backward()
    with matmul_precision(precision):
        gi.backward(apart.grad)
    return out.detach(), last.detach(), _collected(layer, x, h0)
