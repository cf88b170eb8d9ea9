"""What the tests of the CPU kernels share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gruqat_hf.layers import GRULayer
from gruqat_hf.quantization import PRESETS, QuantizerConfig, QuantRecipe
from gruqat_hf.scan.cpu import library

BUILT = library.library()
needs_kernels = pytest.mark.skipif(isinstance(BUILT, str), reason=f"no CPU kernels here: {BUILT}")

STRUCTURES = {
    "dense": {"kind": "dense"},
    "blockdiag": {"kind": "blockdiag", "nblocks": 4},
    "blockdiag_uneven": {"kind": "blockdiag", "nblocks": 2},
    "monarch": {"kind": "monarch", "nblocks": 4},
    "monarch_per_gate": {"kind": "monarch", "nblocks": 2, "per_gate": True},
    "butterfly": {"kind": "butterfly"},
    "butterfly_pairs": {"kind": "butterfly", "factor_pairs": 2},
    "circulant": {"kind": "circulant"},
    "ldr": {"kind": "ldr"},
    "diagonal": {"kind": "diagonal"},
}
_AFFINE = QuantizerConfig(symmetric=False, observer="ema")
_GROUPS = QuantizerConfig(bits=4, granularity="group", group_size=2, observer="dynamic")
RECIPES: dict[str, QuantRecipe] = {
    "int8_per_channel": PRESETS["int8_per_channel"],
    "int8_state16": PRESETS["int8_state16"],
    "int4_per_group_64": PRESETS["int4_per_group_64"],
    "int8_dynamic": PRESETS["int8_dynamic"],
    "groups": replace(PRESETS["int8_state16"], weight_input=_GROUPS, weight_hidden=_GROUPS, name=None),
    "float_state": replace(PRESETS["int8_state16"], state=None, name=None),
    "affine": replace(
        PRESETS["int8_state16"],
        x=_AFFINE,
        h=_AFFINE,
        mid_input=_AFFINE,
        mid_hidden=replace(_AFFINE, granularity="gate"),
        gates=QuantizerConfig(granularity="channel", observer="ema"),
        state=QuantizerConfig(granularity="channel", observer="ema"),
        name=None,
    ),
}
#: T, B, hidden size, reversed, masked, with h0.
SHAPES = [
    (1, 1, 32, False, False, True),
    (7, 3, 24, True, True, True),
    (9, 11, 64, False, True, False),
    (70, 1, 4, True, False, False),
]


def fitting(structure: str, hidden: int) -> int:
    """``hidden``, or the next size below it that the structure can have."""
    return 1 << (hidden.bit_length() - 1) if STRUCTURES[structure]["kind"] == "butterfly" else hidden


def build_layer(structure: str, hidden: int, recipe: QuantRecipe | str | None = None, **kwargs) -> GRULayer:
    """A frozen layer (float without a recipe)."""
    inputs = kwargs.pop("inputs", hidden)
    layer = GRULayer(inputs, hidden, structure_input=STRUCTURES[structure], structure_hidden=STRUCTURES[structure], **kwargs)
    if recipe is None:
        return layer.eval()
    layer.prepare_qat(recipe)
    return layer.eval().calibrate([torch.randn(6, 3, inputs)], progress=False).freeze()


def run(layer: GRULayer, backend: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    layer.backend = backend
    with torch.no_grad():
        result = layer(*inputs)
    assert layer.last_path.startswith(backend)
    layer.backend = None
    return result


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.allclose(left, right, rtol=0, atol=0, equal_nan=True) for left, right in zip(a, b))


def inputs_for(
    steps: int, rows: int, width: int, hidden: int, masked: bool, with_h0: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = torch.randn(steps, rows, width) * 1.5
    return x, torch.rand(rows, hidden) * 2 - 1 if with_h0 else None, torch.rand(steps, rows) > 0.3 if masked else None
