"""How a layer runs: which weights, grids and backend a forward pass reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..arithmetic import is_transformed
from ..operands import BlockDiagonalOperand, DiagonalOperand, Factor, MonarchOperand, Operand
from ..quantization import FakeQuantize, FrozenGrid, Grid
from ..scan import (
    BACKEND_VARIABLE,
    LayerWeights,
    Plan,
    ScanGrids,
    ScanInputs,
    exchange_order,
    input_order,
    is_capturing,
    observe_scan,
    prepare_plan,
    run_first_product,
    run_product,
    run_scan,
)
from .lifecycle import QuantState
from .plan_cache import CachedPlan
from .weight import StructuredWeight


class GRUExecution(nn.Module):
    """The forward pass of one direction of one layer.

    Attributes:
        weight_input, weight_hidden: the weights of the two sides.
        bias_input, bias_hidden: ``[3 * hidden_size]``, gates in the order r, z, n, or None.
        x, h, state, gates: quantizers of the points of :class:`QuantRecipe`, or None.
        backend: name of the scan backend to force, or None.
        last_path: which backend ran the last forward pass, and why.
        gradient_checkpointing: whether training computes the scan a second time in the backward pass, instead of keeping what
            every step computed. Set, with the function that does it, by ``gradient_checkpointing_enable()`` of a model.
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
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint
        self._cached_plan: CachedPlan | None = None
        self._captured_plans: list[Plan] = []
        self._state = QuantState.FLOAT

    def train(self, mode: bool = True) -> GRUExecution:
        """As torch.nn.Module's; also forgets what was prepared from the weights: they may have been swapped through ``.data``."""
        self._cached_plan = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        # A plan belongs to this object's tensors; a copy or a pickle makes its own.
        return {**super().__getstate__(), "_cached_plan": None, "_captured_plans": []}

    def _layer_weights(self) -> LayerWeights:
        """Weights and grids as they stand; only where :attr:`_is_static`."""
        is_dynamic = self.x is not None and self.x.is_dynamic
        return LayerWeights(
            input=self._operand(self.weight_input),
            hidden=self._operand(self.weight_hidden),
            bias_input=self._bias(self.bias_input),
            bias_hidden=self._bias(self.bias_hidden),
            x=None if is_dynamic else _fixed_grid(self.x),
            mid_input=_fixed_grid(self.weight_input.mid),
            grids=self._scan_grids(),
            quantized=self._state != QuantState.FLOAT,
            dynamic_x=self.x.grid if is_dynamic else None,
        )

    def _operand(self, weight: StructuredWeight) -> Operand:
        """The weight as this state computes with it: in a quantized state also what stays float is fp32."""
        operand = weight.operand()
        if self._state == QuantState.FLOAT or all(f.values.dtype == torch.float32 for f in operand.factors.values()):
            return operand
        return operand.replace({n: f if f.is_quantized else Factor(f.values.float()) for n, f in operand.factors.items()})

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
        """Whether the coming forward pass reads grids that are fixed beforehand, but for that of x, and changes nothing."""
        weights = (q for w in (self.weight_input, self.weight_hidden) for q in w.quantizers.values())
        if any(quantizer.is_dynamic for quantizer in self._quantizers() if quantizer is not self.x):
            return False
        fake = (q for q in (*self._quantizers(), *weights) if isinstance(q, FakeQuantize))
        return all(quantizer.is_active and not quantizer.is_watching for quantizer in fake)

    def _plan(self, x: Tensor) -> Plan | None:
        """The prepared inference of the chosen backend, or None where it has none; kept until a weight changes."""
        if torch.compiler.is_compiling() or not _is_plain(x):
            return None
        if torch.is_grad_enabled():
            # A training step may follow, and fused optimizers change weights without counting a version.
            if self._cached_plan is not None:  # setting a module's attribute takes a while
                self._cached_plan = None
            return None
        key = (
            x.device,
            x.dtype,
            self.backend,
            os.environ.get(BACKEND_VARIABLE),
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type),
        )
        # Outside QAT nothing but a replaced module makes a layer dynamic, and a cached plan notices that.
        if self._state == QuantState.QAT and not self._is_static:
            return None
        cached = self._cached_plan
        if cached is None or not cached.is_current(key):
            # FSDP gathers weights anew for each forward pass, at addresses and version numbers that may repeat. And in a CUDA
            # graph weights would be prepared in its replays alone: it takes them as they then are, as in training.
            if not self._is_static or getattr(self, "_is_fsdp_managed_module", False) or is_capturing(x.device):
                return None
            with torch.no_grad():
                cached = CachedPlan(self, key, lambda: prepare_plan(self._layer_weights(), x, self.backend))
            self._cached_plan = cached
        elif cached.plan is not None and is_capturing(x.device) and cached.plan not in self._captured_plans:
            self._captured_plans.append(cached.plan)  # whose memory the graph reads for as long as it lives
        self._tell(cached.told)
        return cached.plan

    def _tell(self, path: str) -> None:
        """Say which backend ran."""
        # Setting a module's attribute takes longer than looking, but a compiler would guard what it looked at.
        if torch.compiler.is_compiling() or self.last_path != path:
            self.last_path = path

    def _run(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """All states ``[T, B, H]`` and the last one ``[B, H]``, in fp32 where quantized.

        Raises:
            ValueError: x or h0 is of a type that is no float; or in float, x of another one than the weights, or h0 of one that
                x cannot hold, where only a GPU's kernels take both.
        """
        if not x.is_floating_point():  # outputs come in the type of x, where a state would be cut to 0
            raise ValueError(f"{type(self).__name__} takes floating-point x, got {x.dtype}; pass x.float()")
        if h0 is not None and not h0.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes floating-point h0, got {h0.dtype}; pass h0.float()")
        if self._state == QuantState.FLOAT:
            return self._scan(x, None if h0 is None else self._like_input(h0, x), mask, reverse)
        x, h0 = x.float(), None if h0 is None else h0.float()
        if not torch.is_autocast_enabled(x.device.type):
            return self._scan(x, h0, mask, reverse)
        # Codes are exact in fp32 only; autocast would round sums of products to half precision.
        with torch.autocast(x.device.type, enabled=False):
            return self._scan(x, h0, mask, reverse)

    def _like_input(self, h0: Tensor, x: Tensor) -> Tensor:
        """The first state in the type of x, where nothing is lost by it."""
        if h0.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return h0
        if torch.promote_types(h0.dtype, x.dtype) == x.dtype:
            return h0.to(x.dtype)
        if not x.is_cuda:
            raise ValueError(f"{type(self).__name__} got h0 of {h0.dtype} for x of {x.dtype}; pass h0.to({x.dtype})")
        return h0

    def _scan(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        if (plan := self._plan(x)) is not None:
            return plan(x, h0, mask, reverse)
        self._refuse_recomputation()
        hidden, grids = self._operand(self.weight_hidden), self._scan_grids()
        bias_apart, order = self._scan_sums_bias_input(x), self._input_order(x, hidden, grids)
        gi = self._input_product(x, mask, bias_apart, order)
        if self._state == QuantState.QAT:
            gi = with_idle_scales(self, gi)
        if h0 is None:
            h0 = gi.new_zeros(x.shape[1], self.hidden_size)
        inputs = ScanInputs(
            gi,
            h0,
            hidden,
            self._bias(self.bias_hidden),
            grids,
            mask,
            reverse,
            quantized=self._state != QuantState.FLOAT,
            bias_input=self._bias(self.bias_input) if bias_apart else None,
            interleaved=order,
        )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Only the scan, whose inputs are all at hand: weights, grids and observers outside are computed once, so that what is
            # computed again is the same. The reentrant kind would lose the gradients of tensors inside ScanInputs.
            run = self._gradient_checkpointing_func
            states, last, path = run(run_scan, inputs, self.backend, use_reentrant=False)
        else:
            states, last, path = run_scan(inputs, self.backend)
        self._tell(path)
        self._observe(inputs, states)
        return states, last

    def _scan_sums_bias_input(self, x: Tensor) -> bool:
        """Whether the scan gives the input's bias its gradient: GPU kernels have what is to be summed at hand."""
        return self.bias_input is not None and x.is_cuda and torch.is_grad_enabled()

    def _input_order(self, x: Tensor, hidden: Operand, grids: ScanGrids) -> int:
        """In the exchange order of how many programs the input product is to be: its weights can be brought into it, where one
        block has all of them, and gradients come back, while re-ordering the product takes two passes over it."""
        if self.weight_input.config.kind != "dense" or not isinstance(hidden, MonarchOperand):
            return 1
        if torch.is_autocast_enabled(x.device.type):  # and decides on the product's dtype
            return 1
        like = x.new_empty(1)
        gi, h0 = like.expand(*x.shape[:2], 3, self.hidden_size), like.expand(x.shape[1], self.hidden_size)
        return input_order(ScanInputs(gi, h0, hidden, grids=grids, quantized=self._state != QuantState.FLOAT), self.backend)

    def _refuse_recomputation(self) -> None:
        """Refuse to observe inside a backward pass: what is computed again there would see ranges that have moved meanwhile."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        if any(module.is_observing for module in self.modules() if isinstance(module, FakeQuantize)):
            raise RuntimeError(
                "a layer whose observers are on is computed a second time, in the backward pass, and would observe twice; use "
                "gradient_checkpointing_enable() of the model (in a GRULayer: gradient_checkpointing = True) instead of a "
                "checkpoint around the layer, or switch the observers off"
            )

    def _input_product(self, x: Tensor, mask: Tensor | None, bias_apart: bool = False, order: int = 1) -> Tensor:
        """``x`` ``[T, B, I]`` → its product with bias, ``[T, B, 3, H]``.

        Args:
            bias_apart: without gradients to the bias.
            order: in the exchange order of so many programs; 1 for natural order.
        """
        rows = x.flatten(0, 1)
        real = None if mask is None else mask.flatten()
        grid = None if self.x is None else grid_for(self.x, rows, real)
        bias = self._bias(self.bias_input)
        if bias_apart and bias is not None:
            bias = bias.detach()
        mid = self.weight_input.mid
        mid_grid = None if mid is None else lambda value: grid_for(mid, value, real)
        operand = self._operand(self.weight_input)
        self._check_type(x, operand)
        if order > 1:
            operand, bias = _in_order(operand, order), None if bias is None else exchange_order(bias, 1, order)
        product = run_product(operand, grid, mid_grid, bias, rows, self.backend)
        return product.unflatten(0, x.shape[:2])

    def _check_type(self, x: Tensor, operand: Operand) -> None:
        """Refuse an input that PyTorch would refuse to multiply with the weights, without saying which it was."""
        if self._state != QuantState.FLOAT or isinstance(operand, DiagonalOperand) or torch.is_autocast_enabled(x.device.type):
            return
        wanted = next(iter(operand.factors.values())).values.dtype
        if x.dtype != wanted:
            raise ValueError(
                f"{type(self).__name__} has weights of {wanted}, but got x of {x.dtype}; pass x.to({wanted}), or "
                "bring the weights to another type with .to(dtype)"
            )

    def _observe(self, inputs: ScanInputs, states: Tensor) -> None:
        """Show the saved sequence to the observers of the points inside the scan."""
        if self._state != QuantState.QAT:
            return
        points = {"h": self.h, "state": self.state, "gates": self.gates, "mid_hidden": self.weight_hidden.mid}
        watching = {name: q for name, q in points.items() if isinstance(q, FakeQuantize) and q.is_watching}
        if not watching:
            return

        def tap(name: str, value: Tensor) -> None:
            if name in watching:
                watching[name].measure(value)  # by the grid that this scan ran with
                watching[name].observe(value)

        observe_scan(inputs, states.detach(), watching, tap, partial(run_first_product, forced=self.backend))


def with_idle_scales(module: nn.Module, value: Tensor) -> Tensor:
    """``value``, with a gradient of zero for learned scales of ``module`` that are not in use yet: DDP waits for one of every
    parameter."""
    if torch.is_grad_enabled():
        for quantizer in module.modules():
            if isinstance(quantizer, FakeQuantize) and not quantizer.is_active:
                for scale in quantizer.parameters(recurse=False):
                    value = value + 0.0 * scale.sum()
    return value


def _is_plain(x: Tensor) -> bool:
    """Whether kernels may be given the address of ``x``: its values lie there, and no tracer or transform watches it."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type != "meta"
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
    )


def _in_order(operand: Operand, programs: int) -> Operand:
    """A dense operand with its outputs in the exchange order of so many programs."""
    assert isinstance(operand, BlockDiagonalOperand)
    values, scale = operand.blocks.values, operand.blocks.scale
    if scale is not None and scale.shape[2] > 1:
        scale = exchange_order(scale, 2, programs)
    return BlockDiagonalOperand(Factor(exchange_order(values, 2, programs), scale, operand.blocks.qmax))


def _fixed_grid(quantizer: FakeQuantize | FrozenGrid | None) -> Grid | None:
    return quantizer.grid() if _rounds(quantizer) else None


def _rounds(quantizer: FakeQuantize | FrozenGrid | None) -> bool:
    return quantizer.is_active if isinstance(quantizer, FakeQuantize) else quantizer is not None


def grid_for(quantizer: FakeQuantize | FrozenGrid, value: Tensor, real: Tensor | None = None) -> Grid | None:
    """The grid for a value ``[rows, ...]`` that is at hand whole, if it is to be rounded.

    It is observed first, rows left out that are padding: where ``real`` ``[rows]`` is False.
    """
    watching = isinstance(quantizer, FakeQuantize) and quantizer.is_watching
    seen = value if real is None or not (watching or quantizer.is_dynamic) else value[real]
    if watching:
        quantizer.observe(seen)
        quantizer.measure(seen)
    return quantizer.grid(seen) if _rounds(quantizer) else None
