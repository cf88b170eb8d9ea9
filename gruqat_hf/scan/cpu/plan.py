"""Inference of a whole layer with weights prepared once."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...operands import BlockDiagonalOperand, Operand
from ...quantization import Grid
from ..dispatch import Plan
from ..inputs import LayerWeights
from .library import CallStruct, LayerStruct, Library, is_forked, library, on_usable_threads, pointer, threads
from .packing import CannotPackError, LayerPack, grid_struct


class KernelPlan:
    """A layer run by the compiled kernels. Holds nothing that a call changes, so threads may share it."""

    def __init__(self, pack: LayerPack) -> None:
        self._pack = pack
        self._hidden = pack.struct.hidden
        self._struct = pack.struct
        self._infer = pack.library.infer

    def __call__(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float32:
            x = x.float()
        if x.stride(2) != 1:
            x = x.contiguous()
        return self.run(x, None, h0, mask, reverse)

    def run(
        self,
        x: Tensor | None,
        gi: Tensor | None,
        h0: Tensor | None,
        mask: Tensor | None,
        reverse: bool,
        gates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Either of ``x`` ``[T, B, I]``, of which only the last dimension must be dense, and ``gi`` ``[T, B, 3, H]``, contiguous.

        Args:
            gates: ``[T, B, 4, padded H]``, is given r, z, n and the hidden product of n for the backward pass.
        """
        given = gi if x is None else x
        steps, batch = given.shape[0], given.shape[1]  # type: ignore[union-attr]
        out = given.new_empty((steps, batch, self._hidden))  # type: ignore[union-attr]
        last = given.new_empty((batch, self._hidden))  # type: ignore[union-attr]
        call = CallStruct(steps=steps, batch=batch, reverse=reverse, threads=threads(), out=out.data_ptr(), last=last.data_ptr())
        if x is not None:
            call.x, call.x_step, call.x_row = x.data_ptr(), x.stride(0), x.stride(1)
        else:
            call.gi = pointer(gi)
        if h0 is not None:
            h0 = h0.float().contiguous()
            call.h0 = h0.data_ptr()
        if mask is not None:
            call.mask, call.mask_step, call.mask_row = mask.data_ptr(), mask.stride(0), mask.stride(1)
        call.gates = pointer(gates)
        self._infer(self._layer_for(given, mask), ctypes.byref(call))
        return out, last

    def _layer_for(self, given: Tensor, mask: Tensor | None) -> Any:
        """The struct of this call's layer."""
        return self._struct


class DynamicPlan(KernelPlan):
    """A layer whose input grid is taken from each call's input."""

    def __init__(self, pack: LayerPack, grid_of: Callable[[Tensor], Grid]) -> None:
        super().__init__(pack)
        self._grid_of, self._scales = grid_of, pack.input_scales

    def _layer_for(self, given: Tensor, mask: Tensor | None) -> Any:
        with on_usable_threads():
            rows = given.flatten(0, 1)
            grid = self._grid_of(rows if mask is None else rows[mask.flatten()])
            scales = self._scales * grid.scale
        layer = LayerStruct.from_buffer_copy(self._pack.struct)
        layer.kept = scales  # alive for as long as the struct that points to it
        layer.input.first.scales = scales.data_ptr()
        layer.input.first.grid[0] = grid_struct(grid, 0)
        return layer


#: Rows up to which the kernels are faster than torch's GRU.
_FEW_ROWS = 32


class DensePlan:
    """A dense float layer: the kernels, or torch's own GRU where its larger matrix products win."""

    def __init__(self, built: Library, weights: LayerWeights) -> None:
        self._built, self._weights = built, weights
        self._flat = [_matrix(weights.input), _matrix(weights.hidden)]
        self._has_bias = weights.bias_input is not None and weights.bias_hidden is not None
        if self._has_bias:
            self._flat += [bias.detach().flatten() for bias in (weights.bias_input, weights.bias_hidden)]  # type: ignore[union-attr]
        self._hidden = weights.hidden.out_features
        self._kernels: KernelPlan | None = None
        self._lock = threading.Lock()

    def kernels(self) -> KernelPlan:
        """The layer packed for the kernels, at the first call that needs it."""
        if self._kernels is None:
            with self._lock:
                if self._kernels is None:
                    self._kernels = KernelPlan(LayerPack(self._built, self._weights))
        return self._kernels

    def __call__(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        # torch's GRU knows no masks, and in a forked child it would wait for the parent's threads.
        if x.shape[1] <= _FEW_ROWS or mask is not None or is_forked():
            return self.kernels()(x, h0, mask, reverse)
        h = x.new_zeros(1, x.shape[1], self._hidden) if h0 is None else h0.unsqueeze(0)
        x = x.flip(0) if reverse else x
        out, last = torch.gru(x, h, self._flat, self._has_bias, 1, 0.0, False, False, False)
        return (out.flip(0) if reverse else out), last[0]


def _matrix(operand: Operand) -> Tensor:
    """The three gates' dense matrices as torch.nn.GRU lays them out."""
    assert isinstance(operand, BlockDiagonalOperand)
    return operand.blocks.values.detach().flatten(0, 2)


def _is_dense(operand: Operand) -> bool:
    return isinstance(operand, BlockDiagonalOperand) and operand.blocks.values.shape[1] == 1 and not operand.is_quantized


def prepare(weights: LayerWeights, x: Tensor) -> Plan | str:
    """A plan for inputs like ``x`` ``[T, B, I]``, or why there is none."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if not weights.quantized:
        if x.dtype != torch.float32:
            return f"x is {x.dtype}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
    built = library()
    if isinstance(built, str):
        return built
    try:
        biases = (weights.bias_input is None) == (weights.bias_hidden is None)
        if not weights.quantized and biases and _is_dense(weights.input) and _is_dense(weights.hidden):
            if weights.input.factors["blocks"].values.dtype != torch.float32:
                return f"its weights are {weights.input.factors['blocks'].values.dtype}"
            return DensePlan(built, weights)
        pack = LayerPack(built, weights)
        return KernelPlan(pack) if weights.dynamic_x is None else DynamicPlan(pack, weights.dynamic_x)
    except CannotPackError as error:
        return str(error)
