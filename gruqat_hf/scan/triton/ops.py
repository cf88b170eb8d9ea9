"""The scan as custom operators with autograd; torch.compile and torch.export see one node each way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import replay
from ..spec import ScanSpec, SpecTensors, flatten, restore
from .choice import family_rules, interleaved_programs
from .family import ScanGradients, kernels, needs_operators

#: "1" computes gates again in the backward pass instead of keeping ``4 * T * B * H`` values between the passes.
RECOMPUTE_VARIABLE = "GRUQAT_RECOMPUTE_GATES"

_SPEC = (
    "Tensor first, Tensor? first_scale, Tensor? second, Tensor? second_scale, Tensor? bias, "
    "Tensor? h_grid, Tensor? mid_grid, Tensor? state_grid, Tensor? gates_grid, Tensor? mask, "
    "str family, int[] limits, bool quantized, bool exact, bool reverse"
)
#: Positions in the forward operator's arguments.
_FIRST, _MASK = 2, 11


def _split(args: tuple[Any, ...]) -> tuple[ScanSpec, Tensor | None, str, bool]:
    """Spec, mask, family and direction from the arguments that ``_SPEC`` describes."""
    *tensors, mask, family, limits, quantized, exact, reverse = args
    return restore(SpecTensors(*tensors), limits, quantized, exact), mask, family, reverse


def _state_dtype(gi: Tensor, h0: Tensor, quantized: bool) -> torch.dtype:
    return torch.float32 if quantized else torch.promote_types(gi.dtype, h0.dtype)


def _scan_forward(gi: Tensor, h0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All states ``[T, B, H]``, the last one ``[B, H]``, and gates for the backward pass, ``[T, B, 4, H]`` or empty."""
    spec, mask, family, reverse = _split(args[:-1])
    states, last, gates = _empty_outputs(gi, h0, *args)
    forward = kernels(family, "forward")
    forward.forward(forward.prepare(spec), gi, h0, mask, reverse, states, gates if gates.numel() else None)
    last.copy_(states[0 if reverse else -1])
    return states, last, gates


def _empty_outputs(gi: Tensor, h0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    spec, _, family, _ = _split(args[:-1])
    steps, rows, _, hidden = gi.shape
    dtype = _state_dtype(gi, h0, spec.quantized)
    states = gi.new_empty((steps, rows, hidden), dtype=dtype)
    last = gi.new_empty((rows, hidden), dtype=dtype)
    save = args[-1] and family_rules(family).SAVES_GATES
    gates = gi.new_empty((steps, rows, 4, hidden) if save else (0,), dtype=spec.gates_dtype)
    return states, last, gates


def _scan_backward(gi: Tensor, h0: Tensor, *args: Any) -> ScanGradients:
    *spec_args, states, gates, dstates, dlast, want_adjoint, want_weights = args
    spec, mask, family, reverse = _split(tuple(spec_args))
    if family_rules(family).SAVES_GATES and gates.numel() == 0:
        steps, rows, hidden = states.shape
        gates = gi.new_empty((steps, rows, 4, hidden), dtype=spec.gates_dtype)
        packs = family_rules(family).PACKS_GATES and gates.dtype == torch.float16
        replay.recompute_gates(spec, gi, h0, states, reverse, gates, packs)
        if packs and (programs := interleaved_programs(family, spec.operand)) > 1:
            from .transposition import transposed

            by_channel = gates.view(-1).view(torch.int64).view(states.shape)
            gates = transposed(by_channel, programs).view(gates.dtype).view_as(gates)
    dstates = torch.zeros_like(states) if dstates is None else dstates.contiguous()
    dlast = torch.zeros_like(h0, dtype=states.dtype) if dlast is None else dlast.contiguous()
    backward = kernels(family, "backward")
    return backward.backward(
        backward.prepare(spec), gi, h0, states, gates, mask, reverse, dstates, dlast, want_adjoint, want_weights
    )


def _backward_fields(gi: Tensor, h0: Tensor, *args: Any) -> list[Tensor]:
    """The gradients as an operator may give them: an empty tensor for None, and dbias not in one piece of memory with dfirst."""
    result = _scan_backward(gi, h0, *args)
    if result.dbias is not None:
        result = result._replace(dbias=result.dbias.clone())
    return [gi.new_empty(0) if field is None else field for field in result]


def _empty_gradients(gi: Tensor, h0: Tensor, *args: Any) -> list[Tensor]:
    *spec_args, states, _, _, _, want_adjoint, want_weights = args
    spec, _, family, _ = _split(tuple(spec_args))
    first, *rest = (factor.values for factor in spec.operand.factors.values())
    second = rest[0] if rest else None
    sums = family_rules(family).SUMS_WEIGHTS
    result = ScanGradients(
        dgi=torch.empty_like(gi),
        dh0=torch.empty_like(h0),
        dgh_n=None if sums else torch.empty_like(gi[:, :, 0], memory_format=torch.contiguous_format),
        adjoint=torch.empty_like(states, dtype=torch.float32) if want_adjoint else None,
        dfirst=torch.empty_like(first, dtype=torch.float32) if sums and want_weights else None,
        dbias=gi.new_empty((3, gi.shape[-1]), dtype=torch.float32) if sums and want_weights else None,
        dsecond=torch.empty_like(second, dtype=torch.float32) if sums and want_weights and second is not None else None,
    )
    return [gi.new_empty(0) if field is None else field for field in result]


triton_scan = torch.library.custom_op(
    "gruqat_hf::triton_scan",
    _scan_forward,
    mutates_args=(),
    schema=f"(Tensor gi, Tensor h0, {_SPEC}, bool save) -> (Tensor, Tensor, Tensor)",
)
triton_scan.register_fake(_empty_outputs)
triton_scan_backward = torch.library.custom_op(
    "gruqat_hf::triton_scan_backward",
    _backward_fields,
    mutates_args=(),
    schema=(
        f"(Tensor gi, Tensor h0, {_SPEC}, Tensor states, Tensor gates, Tensor? dstates, Tensor? dlast, "
        "bool want_adjoint, bool want_weights) -> Tensor[]"
    ),
)
triton_scan_backward.register_fake(_empty_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    states, _, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates)
    ctx.options = inputs[_MASK + 1 : -1]
    ctx.save_for_backward(*inputs[: _MASK + 1], states, gates)


def _gradients(
    ctx: Any, dstates: Tensor | None, dlast: Tensor | None, run_backward: Callable[..., ScanGradients]
) -> tuple[Any, ...]:
    """Gradients of the forward operator's arguments."""
    gi, h0, *tensors, mask, states, gates = ctx.saved_tensors
    needs = SpecTensors(*ctx.needs_input_grad[_FIRST:_MASK])
    needs_scales = any((needs.first_scale, needs.second_scale, needs.h_grid, needs.mid_grid, needs.state_grid, needs.gates_grid))
    needs_weights = any((needs.first, needs.second, needs.bias))
    result = run_backward(
        gi, h0, *tensors, mask, *ctx.options, states, gates, dstates, dlast, needs_scales, needs_weights and not needs_scales
    )
    spec, mask, _, reverse = _split((*tensors, mask, *ctx.options))
    found = SpecTensors(*(None,) * len(tensors))  # type: ignore[arg-type]
    if needs_scales:
        found = replay.replay_step(spec, needs, gi, h0, states, reverse, result.adjoint)
    elif needs_weights and result.dfirst is not None:
        found = found._replace(first=result.dfirst, second=result.dsecond, bias=result.dbias)
    elif needs_weights:
        found = replay.replay_product(spec, needs, h0, states, reverse, result.dgi, result.dgh_n)
    weights = [
        gradient.to(tensor.dtype) if wanted and gradient is not None else None
        for gradient, tensor, wanted in zip(found, tensors, needs)
    ]
    return (result.dgi, result.dh0, *weights, None, *(None,) * len(ctx.options), None)


def _by_operator(*args: Any) -> ScanGradients:
    return ScanGradients(*(field if field.numel() else None for field in triton_scan_backward(*args)))


torch.library.register_autograd(
    "gruqat_hf::triton_scan",
    lambda ctx, dstates, dlast, _: _gradients(ctx, dstates, dlast, _by_operator),
    setup_context=_setup_context,
)


class _Scan(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than a short scan."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        output = _scan_forward(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, dstates, dlast, _scan_backward)


def scan(
    gi: Tensor, h0: Tensor, spec: ScanSpec, mask: Tensor | None, reverse: bool, family: str, save: bool
) -> tuple[Tensor, Tensor]:
    """All states ``[T, B, H]`` and the last one ``[B, H]``; ``h0`` lies on the carried state's grid already."""
    tensors, limits = flatten(spec)
    save = save and os.environ.get(RECOMPUTE_VARIABLE, "0") != "1"
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    run = triton_scan if needs_operators(gi) else _Scan.apply
    states, last, _ = run(
        gi.contiguous(), h0.contiguous(), *tensors, mask, family, limits, spec.quantized, spec.exact, reverse, save
    )
    return states, last
