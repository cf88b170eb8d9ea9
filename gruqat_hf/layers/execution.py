"""How a layer runs: which weights, grids and backend a forward pass reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..quantization import FakeQuantize, FrozenGrid, Grid
from ..scan import (
    BACKEND_VARIABLE,
    LayerWeights,
    OperandProduct,
    Plan,
    ScanGrids,
    ScanInputs,
    observe_scan,
    prepare_plan,
    run_scan,
)
from .lifecycle import QuantState
from .weight import StructuredWeight


class GRUExecution(nn.Module):
    """The forward pass of one direction of one layer.

    Attributes:
        weight_input, weight_hidden: the weights of the two sides.
        bias_input, bias_hidden: ``[3 * hidden_size]``, gates in the order r, z, n, or None.
        x, h, state, gates: quantizers of the points of :class:`QuantRecipe`, or None.
        backend: name of the scan backend to force, or None.
        last_path: which backend ran the last forward pass, and why.
    """

    hidden_size: int
    weight_input: StructuredWeight
    weight_hidden: StructuredWeight
    bias_input: nn.Parameter | None
    bias_hidden: nn.Parameter | None
    x: FakeQuantize | FrozenGrid | None
    h: FakeQuantize | FrozenGrid | None
    state: FakeQuantize | FrozenGrid | None
    gates: FakeQuantize | FrozenGrid | None

    def __init__(self) -> None:
        super().__init__()
        self.backend: str | None = None
        self.last_path = "not run yet"
        self._cached_plan: tuple[object, Plan | None, str] | None = None
        self._state = QuantState.FLOAT

    def __getstate__(self) -> dict[str, object]:
        # A plan belongs to this object's tensors; a copy or a pickle makes its own.
        return {**self.__dict__, "_cached_plan": None}

    def _layer_weights(self) -> LayerWeights:
        """Weights and grids as they stand; only where no grid depends on the input and nothing observes."""
        return LayerWeights(
            input=self.weight_input.operand(),
            hidden=self.weight_hidden.operand(),
            bias_input=self._bias(self.bias_input),
            bias_hidden=self._bias(self.bias_hidden),
            x=_fixed_grid(self.x),
            mid_input=_fixed_grid(self.weight_input.mid),
            grids=self._scan_grids(),
            quantized=self._state != QuantState.FLOAT,
        )

    def _scan_grids(self) -> ScanGrids:
        return ScanGrids(
            h=_fixed_grid(self.h),
            mid=_fixed_grid(self.weight_hidden.mid),
            gates=_fixed_grid(self.gates),
            state=_fixed_grid(self.state),
        )

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        return (bias if self._state == QuantState.FLOAT else bias.float()).view(3, -1)

    def _quantizers(self) -> Iterator[FakeQuantize | FrozenGrid]:
        points = (self.x, self.weight_input.mid, self.h, self.weight_hidden.mid, self.gates, self.state)
        return (quantizer for quantizer in points if quantizer is not None)

    @property
    def _is_static(self) -> bool:
        """Whether the coming forward pass reads grids that are fixed beforehand and changes nothing."""
        for quantizer in self._quantizers():
            if quantizer.is_dynamic or (isinstance(quantizer, FakeQuantize) and quantizer.is_observing):
                return False
        return not any(q.is_observing for w in (self.weight_input, self.weight_hidden) for q in w.quantizers.values())

    def _plan(self, x: Tensor) -> Plan | None:
        """The prepared inference of the chosen backend, or None where it has none; kept until a weight changes."""
        tensors = [*self.parameters(), *self.buffers()]
        key = (x.device, x.dtype, self.backend, os.environ.get(BACKEND_VARIABLE), torch.get_float32_matmul_precision())
        key += tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._cached_plan is None or self._cached_plan[0] != key:
            with torch.no_grad():
                self._cached_plan = (key, *prepare_plan(self._layer_weights(), x, self.backend))
        self.last_path = self._cached_plan[2]
        return self._cached_plan[1]

    def _run(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """All states ``[T, B, H]`` and the last one ``[B, H]``, in fp32 where quantized."""
        if self._state == QuantState.FLOAT:
            return self._scan(x, h0, mask, reverse)
        # Codes are exact in fp32 only; autocast would round sums of products to half precision.
        with torch.autocast(x.device.type, enabled=False):
            return self._scan(x.float(), None if h0 is None else h0.float(), mask, reverse)

    def _scan(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.device.type != "meta" and self._is_static:
            if (plan := self._plan(x)) is not None:
                return plan(x, h0, mask, reverse)
        gi = self._input_product(x, mask)
        if h0 is None:
            h0 = gi.new_zeros(x.shape[1], self.hidden_size)
        inputs = ScanInputs(
            gi,
            h0,
            self.weight_hidden.operand(),
            self._bias(self.bias_hidden),
            self._scan_grids(),
            mask,
            reverse,
            quantized=self._state != QuantState.FLOAT,
        )
        states, last, self.last_path = run_scan(inputs, self.backend)
        self._observe(inputs, states)
        return states, last

    def _input_product(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` ``[T, B, I]`` → its product with bias, ``[T, B, 3, H]``."""
        rows = x.flatten(0, 1)
        real = None if mask is None else mask.flatten()
        grid = None if self.x is None else _grid_for(self.x, rows, real)
        mid = self.weight_input.mid
        mid_grid = None if mid is None else lambda value: _grid_for(mid, value, real)
        product = OperandProduct(self.weight_input.operand(), grid, mid_grid)(rows)
        if self.bias_input is not None:
            product = product + self._bias(self.bias_input)
        return product.unflatten(0, x.shape[:2])

    def _observe(self, inputs: ScanInputs, states: Tensor) -> None:
        """Show the saved sequence to the observers of the points inside the scan."""
        points = {"h": self.h, "state": self.state, "gates": self.gates, "mid_hidden": self.weight_hidden.mid}
        watching = {name: q for name, q in points.items() if isinstance(q, FakeQuantize) and q.is_observing}
        if not watching:
            return

        def tap(name: str, value: Tensor) -> None:
            if name in watching:
                watching[name].observe(value)

        observe_scan(inputs, states.detach(), tap)


def _fixed_grid(quantizer: FakeQuantize | FrozenGrid | None) -> Grid | None:
    return None if quantizer is None else quantizer.grid()


def _grid_for(quantizer: FakeQuantize | FrozenGrid, value: Tensor, real: Tensor | None) -> Grid:
    """The grid for a value that is at hand whole; it is observed first, padded rows left out."""
    observing = isinstance(quantizer, FakeQuantize) and quantizer.is_observing
    if not (observing or quantizer.is_dynamic):
        return quantizer.grid()
    seen = value if real is None else value[real]
    if isinstance(quantizer, FakeQuantize):
        quantizer.observe(seen)
    return quantizer.grid(seen)
