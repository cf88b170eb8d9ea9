"""How one value is quantized, and how all values of a GRU layer are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

GRANULARITIES = ("tensor", "gate", "channel", "group")

#: Quantization points of a layer and the granularities each can have. An activation that a product sums over has one scale:
#: a scale that varies along the summed dimension could not be taken out of the integer sum.
POINTS: dict[str, tuple[str, ...]] = {
    "x": ("tensor",),
    "h": ("tensor",),
    "state": ("tensor", "channel"),
    "weight_input": GRANULARITIES,
    "weight_hidden": GRANULARITIES,
    "mid_input": ("tensor", "gate"),
    "mid_hidden": ("tensor", "gate"),
    "gates": ("tensor", "gate", "channel"),
}

#: Quantization points of a model besides its layers; a bare layer or stack has none of them and leaves them alone.
MODEL_POINTS: dict[str, tuple[str, ...]] = {
    "embedding": ("tensor", "channel", "group"),
    "head": ("tensor", "channel", "group"),
    "head_input": ("tensor",),
}

#: Points that are weights, there before any data.
WEIGHT_POINTS = frozenset({"weight_input", "weight_hidden", "embedding", "head"})

#: Points that can have 16 bits: those that no product of a layer sums over.
WIDE_POINTS = frozenset({"state", "head_input"})

#: Points whose values exist only step by step inside a scan, so that no scale can be taken from the tensor at hand.
SCAN_POINTS = frozenset({"h", "state", "mid_hidden", "gates"})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class QuantizerConfig:
    """How one value is put on an integer grid (design: ``q = clamp(rint(v / scale) + zero_point, qmin, qmax)``).

    Args:
        bits: 2 to 8; 16 as well for the carried state and a head's input. Symmetric grids are restricted:
            ``qmax = 2**(bits-1) - 1 = -qmin``.
        granularity: what shares a scale: "tensor", "gate", "channel" (an output row of a weight; of an embedding, a token) or
            "group" (``group_size`` neighbours along the input dimension).
        group_size: with "group" only: weights per scale; must divide the operand's row, or exceed it (one group a row).
        symmetric: False adds a zero point (activations only).
        scheme: where the scale comes from: "observed" (an observer), "lsq" (learned step size, Esser et al. 2020), or a scheme
            added with :func:`gruqat_hf.quantization.register_scheme`.
        observer: "dynamic" (range of the tensor at hand), "minmax" (running extremes), "ema" (moving average of extremes),
            "percentile" (moving average of a percentile of magnitudes) or "fixed". For "lsq" it gives the initial scale.
        scale: "fixed" only: the scale; None takes it from the range that is known beforehand (1 for the hidden state).
        zero_point: "fixed" and affine only.
        ema_decay: weight of the past in "ema" and "percentile", in [0, 1).
        percentile: for "percentile": share of values kept inside the range, in (50, 100].

    Raises:
        ValueError: a field out of range, or one that the other fields leave without meaning.
    """

    bits: int = 8
    granularity: str = "tensor"
    group_size: int | None = None
    symmetric: bool = True
    scheme: str = "observed"
    observer: str = "ema"
    scale: float | None = None
    zero_point: int | None = None
    ema_decay: float = 0.99
    percentile: float = 99.9

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(
                f"QuantizerConfig.bits must be 2 to 8, or 16 for the carried state or a head's input, got {self.bits!r}"
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"QuantizerConfig.granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}")
        for name in ("scheme", "observer"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"QuantizerConfig.{name} must be a name, got {getattr(self, name)!r}")
        if self.granularity == "group":
            if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
                raise ValueError(f"granularity 'group' needs QuantizerConfig.group_size of at least 1, got {self.group_size!r}")
        elif self.group_size is not None:
            raise ValueError(
                f"QuantizerConfig.group_size={self.group_size!r} needs granularity='group', got {self.granularity!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"QuantizerConfig.symmetric must be True or False, got {self.symmetric!r}")
        if not _is_number(self.ema_decay) or not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"QuantizerConfig.ema_decay must lie in [0, 1), got {self.ema_decay!r}")
        if not _is_number(self.percentile) or not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"QuantizerConfig.percentile must lie in (50, 100], got {self.percentile!r}")
        self._check_fixed()

    def _check_fixed(self) -> None:
        if self.scale is not None:
            if self.observer != "fixed":
                raise ValueError(f"QuantizerConfig.scale={self.scale!r} needs observer='fixed', got {self.observer!r}")
            # 1/scale must be finite in fp32 too.
            if not (_is_number(self.scale) and 1e-37 <= self.scale <= 1e37):
                raise ValueError(f"QuantizerConfig.scale must be a positive finite number, 1e-37 to 1e37, got {self.scale!r}")
        if self.zero_point is not None:
            if self.observer != "fixed" or self.symmetric:
                raise ValueError(f"QuantizerConfig.zero_point={self.zero_point!r} needs observer='fixed' and symmetric=False")
            if self.scale is None:
                raise ValueError(
                    f"QuantizerConfig.zero_point={self.zero_point!r} needs a scale with it: QuantizerConfig(scale=...)"
                )
            is_integer = isinstance(self.zero_point, int) and not isinstance(self.zero_point, bool)
            if not (is_integer and self.qmin <= self.zero_point <= self.qmax):
                raise ValueError(
                    f"QuantizerConfig.zero_point must be an integer in [{self.qmin}, {self.qmax}], got {self.zero_point!r}"
                )

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        return -self.qmax if self.symmetric else -self.qmax - 1

    @classmethod
    def of(cls, value: QuantizerConfig | Mapping[str, Any]) -> QuantizerConfig:
        """A config from itself or its dict.

        Raises:
            ValueError: unknown fields, or another type.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"a quantizer is a QuantizerConfig or its dict, got {type(value).__name__}: {value!r}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"QuantizerConfig has no field {', '.join(unknown)}; its fields: {', '.join(sorted(known))}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class QuantRecipe:
    """Which values of a GRU layer, and of the model around it, are quantized, and how; None leaves a value in float.

    Args:
        x: input of the layer, summed over by the input product.
        h: hidden state on the matmul side, summed over by the hidden product.
        state: hidden state on the write side, as carried from step to step.
        weight_input, weight_hidden: the weights; every factor of a structured weight is quantized by the same rule.
        mid_input, mid_hidden: value between the two factors of a monarch operand; ignored by other operands.
        gates: gate pre-activations.
        embedding: the embedding of a model with a vocabulary; "channel" is a token's row.
        head: weight of a model's output layer; its bias stays in float. Where the model ties the output layer to the embedding,
            both are one table: give the same for both, or only one of them.
        head_input: what the output layer reads, before dropout.

    Products are exact integer products, the same on every device, where both sides are quantized; a product with one side left in
    float is computed in fp32. So is a head's: its logits are exact with both ``head`` and ``head_input``; with one of them it
    computes in float, as a float head does.

    Raises:
        ValueError: a quantizer that its point cannot have, naming the field.
    """

    x: QuantizerConfig | None = None
    h: QuantizerConfig | None = None
    state: QuantizerConfig | None = None
    weight_input: QuantizerConfig | None = None
    weight_hidden: QuantizerConfig | None = None
    mid_input: QuantizerConfig | None = None
    mid_hidden: QuantizerConfig | None = None
    gates: QuantizerConfig | None = None
    embedding: QuantizerConfig | None = None
    head: QuantizerConfig | None = None
    head_input: QuantizerConfig | None = None
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for point, granularities in {**POINTS, **MODEL_POINTS}.items():
            config = getattr(self, point)
            if config is None:
                continue
            if not isinstance(config, QuantizerConfig):
                config = QuantizerConfig.of(config)
                object.__setattr__(self, point, config)
            if config.granularity not in granularities:
                raise ValueError(
                    f"QuantRecipe.{point} cannot have granularity {config.granularity!r}; possible: {', '.join(granularities)}"
                )
            if config.bits == 16 and point not in WIDE_POINTS:
                raise ValueError(
                    f"QuantRecipe.{point} has 16 bits, which only the carried state and a head's input can have; use 2 to 8"
                )
            if not config.symmetric and point in WEIGHT_POINTS:
                raise ValueError(f"QuantRecipe.{point} is affine; weights are symmetric, use symmetric=True")
            if config.observer == "dynamic" and point in SCAN_POINTS:
                raise ValueError(
                    f"QuantRecipe.{point} cannot be observed dynamically: its values exist only inside the scan; "
                    "use observer='fixed', 'ema', 'minmax' or 'percentile'"
                )

    @classmethod
    def of(cls, value: QuantRecipe | Mapping[str, Any] | str) -> QuantRecipe:
        """A recipe from itself, its dict or a preset's name.

        Raises:
            ValueError: unknown preset, unknown fields, or another type.
        """
        from .presets import PRESETS

        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(f"there is no preset {value!r}; presets: {', '.join(sorted(PRESETS))}")
            return PRESETS[value]
        if not isinstance(value, Mapping):
            raise ValueError(f"a recipe is a QuantRecipe, its dict or a preset's name, got {type(value).__name__}: {value!r}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"QuantRecipe has no field {', '.join(unknown)}; its fields: {', '.join(sorted(known))}")
        return cls(**value)

    @property
    def quantizes(self) -> bool:
        """Whether any value of a layer is quantized."""
        return any(getattr(self, point) is not None for point in POINTS)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; points left in float are left out."""
        points = {point: config.to_dict() for point in (*POINTS, *MODEL_POINTS) if (config := getattr(self, point)) is not None}
        return points if self.name is None else {"name": self.name, **points}
