"""A structured weight in its three states."""

from __future__ import annotations

import torch
from torch import nn

from ..operands import BlockDiagonalOperand, Factor, MonarchOperand, Operand
from ..quantization import FakeQuantize, FrozenGrid, QuantizerConfig, ScaleLayout, scheme_class
from ..quantization.fp32 import KeepsFloat32
from ..structures import Structure, StructureConfig, build_structure
from .codes import FrozenFactor, drop_codes, store_codes


class StructuredWeight(KeepsFloat32, nn.Module):
    """The weight of one side of a GRU, ``[3, out_features, in_features]``, held as a structure's parameters or as frozen codes.

    Attributes:
        config: the structure.
        structure: its parameters; None once the weight is frozen to codes.
        quantizers: in QAT, one fake-quantizer for each factor of the operand.
        mid: quantizer of the value between the factors of a monarch operand, or None.

    Frozen codes are buffers ``{factor}_codes`` (int8; uint8 with two codes a byte for up to 4 bits) and ``{factor}_scale``
    (fp32).
    """

    mid: FakeQuantize | FrozenGrid | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: StructureConfig,
        *,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.config, self.name = in_features, out_features, config, name
        self.structure: Structure | None = build_structure(config, in_features, out_features, device=device, dtype=dtype)
        self.quantizers = nn.ModuleDict()
        self.mid = None
        self.quantizer_config: QuantizerConfig | None = None
        self._frozen: dict[str, FrozenFactor] = {}
        self._operand_type: type[Operand] = type(self._float_operand())

    def _float_operand(self) -> Operand:
        assert self.structure is not None
        with torch.no_grad():
            operand = self.structure.lower()
        return operand.replace({name: Factor(factor.values.detach()) for name, factor in operand.factors.items()})

    @property
    def is_frozen(self) -> bool:
        return bool(self._frozen)

    def prepare_qat(self, weight: QuantizerConfig | None, mid: QuantizerConfig | None, *, unit_input: bool) -> None:
        """Attach quantizers.

        Args:
            unit_input: whether the input's magnitude is at most 1, as the hidden state's is; then the range of ``mid`` is known.
        """
        assert self.structure is not None
        operand = self._float_operand()
        self.quantizer_config = weight
        if weight is not None:
            for factor_name, factor in operand.factors.items():
                shape, device = tuple(factor.values.shape), factor.values.device
                name = f"{self.name}.{factor_name}"
                layout = ScaleLayout.of_weight(weight, shape, self.structure.rows_share_values, name)
                quantizer = scheme_class(weight.scheme)(weight, layout, name=name, known_range=None, device=device)
                quantizer.observer.replicated = True
                if device.type != "meta":
                    quantizer.initialise(factor.values)
                self.quantizers[factor_name] = quantizer
        if mid is not None and isinstance(operand, MonarchOperand):
            gates, blocks, rank, _ = operand.first.values.shape
            device = operand.first.values.device
            known_range = None
            if unit_input:
                # |mid| <= sum of |first| over the input, as |h| <= 1. On meta any value serves: the checkpoint brings the scale.
                known_range = 1.0 if device.type == "meta" else float(operand.first.values.abs().sum(-1).max()) or 1.0
            layout = ScaleLayout.of_activation(mid, (gates, blocks, rank))
            self.mid = scheme_class(mid.scheme)(mid, layout, known_range=known_range, name=f"{self.name}.mid", device=device)
            self.mid.range_follows_weights = unit_input

    def operand(self) -> Operand:
        """The operand as the present state has it; differentiable with respect to the structure's parameters."""
        if self._frozen:
            return self._operand_type(**self._frozen_factors())
        assert self.structure is not None
        # Called as a module, not by lower(): hooks that bring offloaded parameters to the device run on calls.
        operand = self.structure()
        if not self.quantizers:
            return operand
        factors: dict[str, Factor] = {}
        for factor_name, quantizer in self.quantizers.items():
            factor = operand.factors[factor_name]
            quantized = quantizer.quantize_weight(factor.values)
            factors[factor_name] = factor if quantized is None else Factor(*quantized, quantizer.config.qmax)
        return operand.replace(factors)

    def _frozen_factors(self) -> dict[str, Factor]:
        stored = {name: frozen.unpack(getattr(self, f"{name}_codes")) for name, frozen in self._frozen.items()}
        codes = self.structure_class.unpack_codes(stored, self.in_features)
        return {
            factor_name: Factor(codes[factor_name], getattr(self, f"{factor_name}_scale"), frozen.qmax)
            for factor_name, frozen in self._frozen.items()
        }

    def require_finite(self) -> None:
        """Refuse to freeze weights with NaN or infinity in them: they have no codes.

        Raises:
            ValueError: naming the weight.
        """
        for factor_name, factor in self._float_operand().factors.items() if self.quantizers else ():
            if factor.values.device.type != "meta" and not bool(torch.isfinite(factor.values).all()):
                raise ValueError(
                    f"freeze(): {self.name}.{factor_name} holds NaN or infinity; load a checkpoint from before training diverged"
                )

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the parameters by integer codes, if the weight is quantized, and the mid quantizer by its grid."""
        if self.quantizers:
            assert self.structure is not None
            self.quantizers.eval()  # what is frozen is what eval mode computes with: all rounded, nothing observed once more
            operand = self.operand()
            self.structure_class = type(self.structure)
            codes = {name: factor.values.to(torch.int8) for name, factor in operand.factors.items()}
            for factor_name, stored in self.structure_class.pack_codes(codes).items():
                scale, config = operand.factors[factor_name].scale, self.quantizers[factor_name].config
                self._frozen[factor_name] = store_codes(self, factor_name, stored, scale, config)
            self.structure = None
            self.quantizers = nn.ModuleDict()
        if isinstance(self.mid, FakeQuantize):
            self.mid = FrozenGrid(self.mid)
        self.train(self.training)  # the new modules too

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> None:
        """Back to float parameters, with the values that the codes stand for.

        A structure that its operand cannot be turned back into (butterfly, ldr) becomes dense, and ``config`` says so.
        """
        if self._frozen:
            operand = self._operand_type(**self._frozen_factors())
            device = next(iter(operand.factors.values())).values.device
            invertible = self.structure_class.invertible
            if not invertible:
                self.config = StructureConfig("dense")
            structure = build_structure(self.config, self.in_features, self.out_features, device=device, dtype=dtype)
            if not invertible:
                operand = BlockDiagonalOperand(Factor(operand.to_dense().unsqueeze(1)))
            structure.load_operand(operand)
            for factor_name in self._frozen:
                drop_codes(self, factor_name)
            self._frozen = {}
            self.structure = structure
            self._operand_type = type(self._float_operand())
        self.mid = None
        self.quantizer_config = None

    def extra_repr(self) -> str:
        parts = [f"{self.in_features} -> 3 x {self.out_features}", self.config.kind]
        for factor_name, frozen in self._frozen.items():
            scale = getattr(self, f"{factor_name}_scale")
            parts.append(f"{factor_name}: {frozen.bits}-bit codes, {scale.numel()} scales")
        return ", ".join(parts)
