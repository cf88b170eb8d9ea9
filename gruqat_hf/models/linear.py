"""The linear layer of heads, quantizable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arithmetic.integer_matmul import wide_integer_matmul
from ..layers.execution import grid_for, with_idle_scales
from ..layers.lifecycle import QuantState
from ..layers.plain_weight import PlainWeight
from ..operands import Factor
from ..quantization import FakeQuantize, FrozenGrid, Grid, QuantizerConfig, ScaleLayout, scheme_class


class WideLinear(PlainWeight, nn.Linear):
    """torch.nn.Linear for a head, whose result does not depend on the device or on what else is in the batch.

    With weight and input quantized it is an exact integer product: ``float(acc) * (s_input * s_weight)``, group terms in
    ascending order, ``+ bias``, each operation rounded on its own. Otherwise its sums run in float64: a float32 product rounds by
    its order of summation, which depends on batch size and device, while the quantized state it reads does not. In float64 such
    differences are gone once the result is rounded. ``wide_sums=False`` leaves the sums in the type of the weight, for a
    vocabulary whose model trains or is in float, with no equal bits to keep. The result has the type of the weight, where
    anything is quantized fp32.

    Attributes:
        input: quantizer of what the layer reads, or None.
    """

    point = "head"
    input: FakeQuantize | FrozenGrid | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input = None

    @classmethod
    def of(cls, linear: nn.Linear) -> WideLinear:
        """A layer with the Parameters of ``linear``, not copies of them."""
        new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def quant_state(self) -> QuantState:
        if self.is_frozen or isinstance(self.input, FrozenGrid):
            return QuantState.FROZEN
        return QuantState.FLOAT if self.quantizer is None and self.input is None else QuantState.QAT

    @property
    def configs(self) -> dict[str, QuantizerConfig | None]:
        return {**super().configs, "head_input": None if self.input is None else self.input.config}

    def prepare_qat(self, weight: QuantizerConfig | None, input: QuantizerConfig | None = None) -> None:
        """Attach fake-quantizers to the weight and to what it is multiplied with, a GRU's state (of magnitude at most 1).

        Raises:
            ValueError: a config that its value cannot have.
        """
        super().prepare_qat(weight)
        if input is not None:
            layout = ScaleLayout.of_activation(input, (self.in_features,))
            device = None if self.weight is None else self.weight.device
            quantizer = scheme_class(input.scheme)(input, layout, known_range=1.0, name="head_input", device=device)
            self.input = quantizer.train(self.training)

    def abandon_qat(self) -> None:
        super().abandon_qat()
        self.input = None

    def take_quantizers(self, other: WideLinear) -> None:
        """Go on as ``other`` did, whose place this layer takes; its weight may have other rows."""
        self.input, self.quantizers, self.quantizer_config = other.input, other.quantizers, other.quantizer_config
        self.fit_quantizer()

    def freeze(self) -> None:
        super().freeze()
        if isinstance(self.input, FakeQuantize):
            self.input = FrozenGrid(self.input).train(self.training)

    def dequantize(self) -> None:
        super().dequantize()
        self.input = None

    def forward(
        self, input: Tensor, dropout: nn.Module | None = None, table: Factor | None = None, wide_sums: bool = True
    ) -> Tensor:
        """``[..., in_features]`` of any float type → ``[..., out_features]``.

        Args:
            dropout: applied to the input once it is on its grid: what dropout scales up need not fit the grid.
            table: the weight ``[out_features, in_features]`` of an embedding that the layer is tied to, in its present state;
                None for the layer's own.
            wide_sums: False for float products in the type of the weight, as torch.nn.Linear's.
        """
        if table is None and self.quant_state == QuantState.FLOAT:
            return _float_product(input if dropout is None else dropout(input), self.weight, self.bias, wide_sums)
        if not torch.is_autocast_enabled(input.device.type):
            return self._quantized(input, dropout, table, wide_sums)
        # Codes are exact in fp32 only; autocast would round sums of products to half precision.
        with torch.autocast(input.device.type, enabled=False):
            return self._quantized(input, dropout, table, wide_sums)

    def _quantized(self, input: Tensor, dropout: nn.Module | None, table: Factor | None, wide_sums: bool) -> Tensor:
        factor = self.table() if table is None else _at(table, input.device)
        rows = with_idle_scales(self, input.float()).flatten(0, -2)
        grid = None if self.input is None else grid_for(self.input, rows)
        if grid is None or not factor.is_quantized:
            rows = rows if grid is None else grid.round_trip(rows)
            rows = rows if dropout is None else dropout(rows)
            bias = None if self.bias is None else self.bias.float()
            product = _float_product(rows, factor.dequantize(), bias, wide_sums)
        else:
            codes = grid.codes(rows)
            product = _integer_product(codes if dropout is None else dropout(codes), grid, factor)
            product = product if self.bias is None else product + self.bias.float()
        return product.unflatten(0, input.shape[:-1])


def run_head(
    head: nn.Module, state: Tensor, dropout: nn.Module | None = None, table: Factor | None = None, *, wide_sums: bool = True
) -> Tensor:
    """``head`` of ``state`` ``[..., in_features]``; a module of the user's own in its place gets the state after dropout."""
    if isinstance(head, WideLinear):
        return head(state, dropout, table, wide_sums)
    return head(state if dropout is None else dropout(state))


def _float_product(input: Tensor, weight: Tensor, bias: Tensor | None, wide_sums: bool) -> Tensor:
    if not wide_sums or input.device.type == "mps":  # which has no float64
        return nn.functional.linear(input.to(weight.dtype), weight, bias)
    bias = None if bias is None else bias.double()
    return nn.functional.linear(input.double(), weight.double(), bias).to(weight.dtype)


def _integer_product(codes: Tensor, grid: Grid, factor: Factor) -> Tensor:
    """Codes ``[n, row]`` times a quantized weight ``[rows, row]`` → ``[n, rows]``."""
    assert factor.scale is not None
    width = codes.shape[-1] // factor.groups
    total: Tensor | None = None
    for j in range(factor.groups):
        part = slice(j * width, (j + 1) * width)
        exact = wide_integer_matmul(codes[:, part], factor.values[:, part].T, grid.magnitude, factor.qmax)
        term = exact * (grid.scale * factor.scale[:, j])
        total = term if total is None else total + term
    assert total is not None
    return total


def _at(factor: Factor, device: torch.device) -> Factor:
    scale = None if factor.scale is None else factor.scale.to(device)
    return Factor(factor.values.to(device), scale, factor.qmax)
