"""The scan alone as custom operators with autograd; torch.compile and torch.export see one node each way."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..inputs import LayerWeights, ScanInputs
from ..replay import replay_step
from ..spec import ScanSpec, SpecTensors, flatten, restore
from .gradients import product_gradients
from .library import BackwardStruct, Library, library, pointer, threads
from .packing import AdjointPack, CannotPackError, LayerPack, check_operand, padded
from .plan import KernelPlan

_SPEC = (
    "Tensor first, Tensor? first_scale, Tensor? second, Tensor? second_scale, Tensor? bias, "
    "Tensor? h_grid, Tensor? mid_grid, Tensor? state_grid, Tensor? gates_grid, Tensor? mask, "
    "int[] limits, bool quantized, bool exact, bool reverse"
)
#: Positions in the forward operator's arguments.
_FIRST, _MASK = 2, 11


def _split(args: tuple[Any, ...]) -> tuple[ScanSpec, Tensor | None, bool]:
    """Spec, mask and direction from the arguments that ``_SPEC`` describes."""
    *tensors, mask, limits, quantized, exact, reverse = args
    return restore(SpecTensors(*tensors), limits, quantized, exact), mask, reverse


def _packed(spec: ScanSpec) -> LayerPack:
    built = library()
    assert isinstance(built, Library)
    weights = LayerWeights(spec.operand, spec.operand, None, spec.bias, None, None, spec.grids, spec.quantized)
    return LayerPack(built, weights, scan_only=True)


@torch.library.custom_op(
    "gruqat_hf::cpu_scan", mutates_args=(), schema=f"(Tensor gi, Tensor h0, {_SPEC}, bool save) -> (Tensor, Tensor, Tensor)"
)
def cpu_scan(gi: Tensor, h0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All states ``[T, B, H]``, the last one ``[B, H]``, and gates for the backward pass ``[T, B, 4, padded H]`` (or empty)."""
    spec, mask, reverse = _split(args[:-1])
    gates = _empty_gates(gi, args[-1])
    states, last = KernelPlan(_packed(spec)).run(None, gi, h0, mask, reverse, gates if args[-1] else None)
    return states, last, gates


def _empty_gates(gi: Tensor, save: bool) -> Tensor:
    steps, rows, _, hidden = gi.shape
    return gi.new_empty((steps, rows, 4, padded(hidden)) if save else (0,))


@cpu_scan.register_fake
def _empty_outputs(gi: Tensor, h0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    steps, rows, _, hidden = gi.shape
    return gi.new_empty(steps, rows, hidden), gi.new_empty(rows, hidden), _empty_gates(gi, args[-1])


@torch.library.custom_op(
    "gruqat_hf::cpu_scan_backward",
    mutates_args=(),
    schema=(
        f"(Tensor h0, {_SPEC}, Tensor states, Tensor gates, Tensor? dstates, Tensor? dlast, bool want_adjoint) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def cpu_scan_backward(h0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gi ``[T, B, 3, H]``, h0, the hidden product of n ``[T, B, H]``, and each step's output (or empty)."""
    *spec_args, states, gates, dstates, dlast, want_adjoint = args
    spec, mask, reverse = _split(tuple(spec_args))
    pack = _packed(spec)
    adjoint = AdjointPack(pack, spec.operand, spec.grids.h, spec.grids.mid)
    dgi, dh0, dgh_n, outputs = results = _empty_gradients(h0, *args)
    dstates = None if dstates is None else dstates.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    call = BackwardStruct(
        h0=pointer(h0),
        states=pointer(states),
        gates=pointer(gates),
        dstates=pointer(dstates),
        dlast=pointer(dlast),
        dgi=pointer(dgi),
        dgh_n=pointer(dgh_n),
        dh0=pointer(dh0),
        adjoint=pointer(outputs) if want_adjoint else None,
        steps=states.shape[0],
        batch=states.shape[1],
        reverse=reverse,
        threads=threads(),
    )
    if mask is not None:
        call.mask, call.mask_step, call.mask_row = mask.data_ptr(), mask.stride(0), mask.stride(1)
    pack.library.backward(ctypes.byref(pack.struct), ctypes.byref(adjoint.struct), ctypes.byref(call))
    return results


@cpu_scan_backward.register_fake
def _empty_gradients(h0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, want_adjoint = args[-5], args[-1]
    steps, rows, hidden = states.shape
    outputs = states.new_empty(states.shape if want_adjoint else (0,))
    return states.new_empty(steps, rows, 3, hidden), torch.empty_like(h0), torch.empty_like(states), outputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    states, _, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates)
    ctx.options = inputs[_MASK + 1 : -1]
    ctx.save_for_backward(*inputs[: _MASK + 1], states, gates)


def _backward(ctx: Any, dstates: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    gi, h0, *tensors, mask, states, gates = ctx.saved_tensors
    needs = SpecTensors(*ctx.needs_input_grad[_FIRST:_MASK])
    needs_scales = any((needs.first_scale, needs.second_scale, needs.h_grid, needs.mid_grid, needs.state_grid))
    dgi, dh0, dgh_n, adjoint = cpu_scan_backward(h0, *tensors, mask, *ctx.options, states, gates, dstates, dlast, needs_scales)
    spec, _, reverse = _split((*tensors, mask, *ctx.options))
    found = SpecTensors(*(None,) * len(tensors))  # type: ignore[arg-type]
    if needs_scales:
        found = replay_step(spec, needs, gi, h0, states, reverse, adjoint)
    elif any((needs.first, needs.second, needs.bias)):
        found = product_gradients(spec, needs, h0, states, reverse, dgi, dgh_n)
    return (dgi, dh0, *found, None, *(None,) * len(ctx.options), None)


torch.library.register_autograd("gruqat_hf::cpu_scan", _backward, setup_context=_setup_context)


@torch.compiler.assume_constant_result
def _unavailable() -> str | None:
    built = library()
    return built if isinstance(built, str) else None


def refuses(inputs: ScanInputs) -> str | None:
    """Why the kernels cannot run a scan, or None if they can."""
    if inputs.gi.device.type != "cpu":
        return f"the scan is on {inputs.gi.device.type}"
    if inputs.gi.dtype != torch.float32 or inputs.h0.dtype != torch.float32:
        return f"the scan is of {inputs.gi.dtype} and {inputs.h0.dtype}"
    if inputs.bias is not None and inputs.bias.dtype != torch.float32:
        return f"the bias is {inputs.bias.dtype}"
    if inputs.grids.gates is not None:
        return "the pre-activations are quantized"
    try:
        check_operand(inputs.operand, inputs.grids.h, inputs.grids.mid, "hidden")
    except CannotPackError as error:
        return str(error)
    return _unavailable()


def run(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """All states ``[T, B, H]`` and the last one ``[B, H]``; differentiable."""
    state = inputs.grids.state
    h0 = inputs.h0 if state is None else state.round_trip(inputs.h0)
    # "exact" chooses among the precisions of GPU products; here there is one.
    spec = ScanSpec(inputs.operand, inputs.bias, inputs.grids, inputs.quantized, exact=True)
    tensors, limits = flatten(spec)
    states, last, _ = cpu_scan(
        inputs.gi.contiguous(),
        h0.contiguous(),
        *tensors,
        inputs.mask,
        limits,
        spec.quantized,
        spec.exact,
        inputs.reverse,
        inputs.needs_grad,
    )
    return states, last
