"""The weight of an embedding or of a head in its three states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..operands import Factor
from ..quantization import FakeQuantize, QuantizerConfig, ScaleLayout, scheme_class
from ..quantization.fp32 import KeepsFloat32
from .codes import FrozenFactor, drop_codes, store_codes
from .lifecycle import QuantState
from .plan_cache import Watch


class PlainWeight(KeepsFloat32, nn.Module):
    """A module with one weight ``[rows, row]`` that is quantized as it is; mixed into torch.nn.Embedding and torch.nn.Linear.

    In float and QAT it is the Parameter ``weight`` under its usual name, in QAT with the fake-quantizer ``quantizers["weight"]``.
    Frozen, ``weight`` is None and there are buffers ``weight_codes`` (int8; uint8 with two codes a byte for up to 4 bits) and
    ``weight_scale`` (fp32).

    Attributes:
        point: name of the weight's point in QuantRecipe.
        weight_shape: ``(rows, row)``, whatever the state; where a head is tied, of the table that it shares.
        quantizer_config: how the weight is quantized; None where it is left in float.
    """

    point: ClassVar[str]
    weight_shape: tuple[int, int]
    float32_tensors = frozenset({"weight_scale"})
    weight: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantizers = nn.ModuleDict()
        self.quantizer_config: QuantizerConfig | None = None
        self._frozen: FrozenFactor | None = None
        self._kept: tuple[Watch, Factor] | None = None

    @property
    def quantizer(self) -> FakeQuantize | None:
        """That of the weight, in QAT."""
        return self.quantizers["weight"] if "weight" in self.quantizers else None

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is codes."""
        return self._frozen is not None

    @property
    def quant_state(self) -> QuantState:
        if self.is_frozen:
            return QuantState.FROZEN
        return QuantState.FLOAT if self.quantizer is None else QuantState.QAT

    @property
    def scale_count(self) -> int:
        """How many scales the weight has; 0 in float."""
        if self.is_frozen:
            return self.weight_scale.numel()
        return 0 if self.quantizer is None else self.quantizer.scale.numel()

    @property
    def configs(self) -> dict[str, QuantizerConfig | None]:
        """How each point of QuantRecipe that lies in this module is quantized at present."""
        return {self.point: self.quantizer_config}

    def prepare_qat(self, weight: QuantizerConfig | None) -> None:
        """Attach the fake-quantizer; None leaves the weight in float.

        Raises:
            ValueError: a config that the weight cannot have.
        """
        if weight is None:
            return
        assert self.weight is not None
        values = self.weight
        layout = ScaleLayout.of_weight(weight, tuple(values.shape), False, self.point)
        quantizer = scheme_class(weight.scheme)(weight, layout, name=self.point, known_range=None, device=values.device)
        quantizer.observer.replicated = True
        if values.device.type != "meta":
            quantizer.initialise(values)
        self.quantizers["weight"] = quantizer.train(self.training)
        self.quantizer_config = weight

    def renew_quantizer(self) -> None:
        """Start the weight's quantizer afresh, from the weight as it is now."""
        if self.quantizer is not None:
            PlainWeight.prepare_qat(self, self.quantizer_config)

    def abandon_qat(self) -> None:
        """Take the quantizers off again, as if prepare_qat had not been called."""
        self.quantizers = nn.ModuleDict().train(self.training)
        self.quantizer_config = self._kept = None

    @torch.no_grad()
    def fit_quantizer(self) -> None:
        """Grow or shrink the quantizer's state with the weight's rows, after these were added or removed.

        Rows that stay keep their ranges and learned scales; new ones get theirs from the weight.
        """
        old = self.quantizer
        if old is None or self.weight is None or old.layout.shape == tuple(self.weight.shape):
            return
        self.renew_quantizer()
        new = self.quantizer
        assert new is not None
        for name, kept in old.state_dict().items():
            target = new.state_dict()[name]
            if target.shape == kept.shape:
                target.copy_(kept)
            else:
                rows = min(target.shape[0], kept.shape[0])
                target[:rows].copy_(kept[:rows])
        new.observer_enabled, new.fake_quant_enabled = old.observer_enabled, old.fake_quant_enabled
        new.forget_calibration_state()

    def factor(self) -> Factor:
        """The weight as the present state has it, fp32; differentiable with respect to ``weight``."""
        if self._frozen is not None:
            return Factor(self._frozen.unpack(self.weight_codes), self.weight_scale, self._frozen.qmax)
        assert self.weight is not None
        quantizer = self.quantizer
        quantized = None if quantizer is None else quantizer.quantize_weight(self.weight)
        return Factor(self.weight.float()) if quantized is None else Factor(*quantized, quantizer.config.qmax)

    def table(self) -> Factor:
        """As :meth:`factor`; in eval mode without gradients the codes of QAT are kept, as int8, until something changes."""
        quantizer = self.quantizer
        if quantizer is None or torch.is_grad_enabled() or not self._can_keep(quantizer):
            self._kept = None  # a training step may follow, and fused optimizers change weights without counting a version
            return self.factor()
        kept = self._kept
        if kept is None or not kept[0].sees_no_change():
            watch, factor = Watch(self), self.factor()
            kept = self._kept = watch, Factor(factor.values.to(torch.int8), factor.scale, factor.qmax)
        return kept[1]

    def _can_keep(self, quantizer: FakeQuantize) -> bool:
        # Offloaded weights are to leave no copy in memory; FSDP gathers its own at addresses and version numbers that may repeat.
        borrowed = hasattr(self, "_hf_hook") or getattr(self, "_is_fsdp_managed_module", False)
        if borrowed or torch.compiler.is_compiling() or self.weight is None or self.weight.device.type == "meta":
            return False
        return quantizer.is_active and not quantizer.is_watching

    def train(self, mode: bool = True) -> PlainWeight:
        """As torch.nn.Module's; also forgets what was kept of the weight: it may have been swapped through ``.data``."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlainWeight:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        # What is kept belongs to this object's tensors; a copy or a pickle makes its own.
        return {**self.__dict__, "_kept": None}

    def uncalibrated(self) -> list[str]:
        """Names of the quantizers that have no scale yet."""
        return [module.name for module in self.modules() if isinstance(module, FakeQuantize) and not module.is_calibrated]

    def require_finite(self) -> None:
        """Refuse to freeze a weight with NaN or infinity in it: it has no codes.

        Raises:
            ValueError: naming the weight.
        """
        if self.quantizer is not None and self.weight is not None and self.weight.device.type != "meta":
            if not bool(torch.isfinite(self.weight).all()):
                raise ValueError(
                    f"freeze(): the {self.point} holds NaN or infinity; load a checkpoint from before training diverged"
                )

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the weight by its codes, if it is quantized."""
        if self.quantizer is not None:
            self.quantizers.eval()  # what is frozen is what eval mode computes with: all rounded, nothing observed once more
            factor = self.factor()
            assert self.quantizer_config is not None and factor.scale is not None
            self._frozen = store_codes(self, "weight", factor.values.to(torch.int8), factor.scale, self.quantizer_config)
            self.quantizers = nn.ModuleDict().train(self.training)
            self.weight = self._kept = None

    @torch.no_grad()
    def dequantize(self) -> None:
        """Back to a float weight, with the values that the codes stand for, fp32."""
        if self.is_frozen:
            values = self.factor().dequantize()
            drop_codes(self, "weight")
            self._frozen = None
            self.weight = nn.Parameter(values)
        self.quantizer_config = None

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self._frozen is None:
            return text
        return f"{text}, weight: {self._frozen.bits}-bit codes, {self.weight_scale.numel()} scales"
