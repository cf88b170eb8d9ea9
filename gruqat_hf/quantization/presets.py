"""Recipes by name."""

from __future__ import annotations

from dataclasses import replace

from .config import QuantizerConfig, QuantRecipe

_INT8 = QuantizerConfig(bits=8, observer="ema")
_UNIT_INT8 = QuantizerConfig(bits=8, observer="fixed")
_UNIT_INT16 = QuantizerConfig(bits=16, observer="fixed")
_WEIGHT_INT8 = QuantizerConfig(bits=8, granularity="channel", observer="dynamic")
_WEIGHT_INT4 = QuantizerConfig(bits=4, granularity="group", group_size=64, observer="dynamic")

_INT8_PER_CHANNEL = QuantRecipe(
    x=_INT8,
    h=_UNIT_INT8,
    state=_UNIT_INT8,
    weight_input=_WEIGHT_INT8,
    weight_hidden=_WEIGHT_INT8,
    mid_input=_INT8,
    mid_hidden=_INT8,
    embedding=_WEIGHT_INT8,
    head=_WEIGHT_INT8,
    head_input=_UNIT_INT8,
    name="int8_per_channel",
)
_INT8_STATE16 = replace(_INT8_PER_CHANNEL, state=_UNIT_INT16, head_input=_UNIT_INT16, name="int8_state16")

#: Named recipes. ``int8_state16`` is the one to start from: int8 weights and matmul operands, 16-bit carried state.
#: ``int8_per_channel`` carries the state in 8 bits as well. ``int4_per_group_64`` has 4-bit weights with a scale per 64 inputs.
#: ``int8_dynamic`` takes the input's range from each call and needs no calibration, so that a float checkpoint can be frozen
#: in one call; its outputs then depend on how a batch is split, and its range of the value between monarch factors is bounded
#: from the weights at prepare_qat and does not follow training. ``int8_hidden`` quantizes only the hidden state.
#:
#: All but ``fp32`` and ``int8_hidden`` quantize embedding and head as well: int8, a scale for each token and each output, and the
#: head reads the state on the very grid that it is carried on (8 or 16 bits), which loses nothing. ``int4_per_group_64`` keeps
#: these two at 8 bits: no sum evens out the rounding of a token's row, a logit shows that of its own, and 64 need not divide
#: the embedding's width.
PRESETS: dict[str, QuantRecipe] = {
    "fp32": QuantRecipe(name="fp32"),
    "int8_per_channel": _INT8_PER_CHANNEL,
    "int8_state16": _INT8_STATE16,
    "int4_per_group_64": replace(_INT8_STATE16, weight_input=_WEIGHT_INT4, weight_hidden=_WEIGHT_INT4, name="int4_per_group_64"),
    "int8_hidden": QuantRecipe(h=_UNIT_INT8, state=_UNIT_INT8, name="int8_hidden"),
    "int8_dynamic": replace(
        _INT8_STATE16,
        x=QuantizerConfig(bits=8, observer="dynamic"),
        mid_input=QuantizerConfig(bits=8, observer="dynamic"),
        mid_hidden=_UNIT_INT8,
        name="int8_dynamic",
    ),
}
