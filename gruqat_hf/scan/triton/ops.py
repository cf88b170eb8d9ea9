"""The scan as custom operators with autograd; torch.compile and torch.export see one node each way."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import replay
from ..inputs import ScanInputs, natural_order
from ..spec import ScanSpec, SpecTensors, flatten, restore
from .choice import family_rules, interleaved_programs, refuses_shape
from .family import ScanGradients, kernels, needs_operators

#: "1" computes gates again in the backward pass instead of keeping ``4 * T * B * H`` values between the passes.
RECOMPUTE_VARIABLE = "GRUQAT_RECOMPUTE_GATES"

_SPEC = (
    "Tensor first, Tensor? first_scale, Tensor? second, Tensor? second_scale, Tensor? bias, "
    "Tensor? h_grid, Tensor? mid_grid, Tensor? state_grid, Tensor? gates_grid, Tensor? mask, "
    "str family, int[] limits, bool quantized, bool exact, bool reverse, int interleaved"
)
#: Positions in the forward operator's arguments.
_BIAS_INPUT, _FIRST, _MASK = 2, 3, 12


class _Wanted(NamedTuple):
    """What a backward pass is asked for besides the gradients of gi and h0; see :class:`ScanGradients`."""

    adjoint: bool
    weights: bool
    bias_input: bool


class _Scan(NamedTuple):
    """A scan as kernels run it; ``gi`` and its gradient are in the exchange order of ``interleaved`` programs."""

    gi: Tensor
    h0: Tensor
    spec: ScanSpec
    mask: Tensor | None
    family: str
    reverse: bool
    interleaved: int

    @classmethod
    def of(cls, gi: Tensor, h0: Tensor, *args: Any) -> _Scan:
        """From the arguments that ``_SPEC`` describes."""
        *tensors, mask, family, limits, quantized, exact, reverse, interleaved = args
        spec = restore(SpecTensors(*tensors), limits, quantized, exact)
        return cls(gi, h0, spec, mask, family, reverse, interleaved)

    @property
    def natural_gi(self) -> Tensor:
        return natural_order(self.gi, self.interleaved)

    @property
    def _order(self) -> dict[str, bool]:
        """What a family that knows other orders must be told."""
        return {} if self.interleaved == 1 else {"interleaved": True}

    def empty_states_and_gates(self, save: bool) -> tuple[Tensor, Tensor]:
        """All states ``[T, B, H]``, and gates for the backward pass, ``[T, B, 4, H]`` or empty."""
        gi, spec = self.gi, self.spec
        steps, rows, _, hidden = gi.shape
        dtype = torch.float32 if spec.quantized else torch.promote_types(gi.dtype, self.h0.dtype)
        states = gi.new_empty((steps, rows, hidden), dtype=dtype)
        save = save and family_rules(self.family).SAVES_GATES
        return states, gi.new_empty((steps, rows, 4, hidden) if save else (0,), dtype=spec.gates_dtype)

    def forward(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """All states ``[T, B, H]``, the last one ``[B, H]``, and gates for the backward pass, ``[T, B, 4, H]`` or empty."""
        states, gates = self.empty_states_and_gates(save)
        forward = kernels(self.family, "forward")
        weights, kept = forward.prepare(self.spec), gates if gates.numel() else None
        forward.forward(weights, self.gi, self.h0, self.mask, self.reverse, states, kept, **self._order)
        return states, states[0 if self.reverse else -1].clone(), gates

    def backward(
        self, states: Tensor, gates: Tensor, dstates: Tensor | None, dlast: Tensor | None, wanted: _Wanted
    ) -> ScanGradients:
        """Gradients from what :meth:`forward` gave and those of states and last, None for zero."""
        gi, h0, spec, mask, family, reverse, _ = self
        if family_rules(family).SAVES_GATES and gates.numel() == 0:
            gates = self._gates_again(states)
        dstates = torch.zeros_like(states) if dstates is None else dstates.contiguous()
        dlast = torch.zeros_like(h0, dtype=states.dtype) if dlast is None else dlast.contiguous()
        backward = kernels(family, "backward")
        weights = backward.prepare(spec)
        result: ScanGradients = backward.backward(
            weights, gi, h0, states, gates, mask, reverse, dstates, dlast, wanted.adjoint, wanted.weights, **self._order
        )
        if wanted.bias_input and result.dbias_input is None:
            result = result._replace(dbias_input=_sum_of_rows(result, self.interleaved))
        return result

    def _gates_again(self, states: Tensor) -> Tensor:
        steps, rows, hidden = states.shape
        spec, family = self.spec, self.family
        gates = self.gi.new_empty((steps, rows, 4, hidden), dtype=spec.gates_dtype)
        packs = family_rules(family).PACKS_GATES and gates.dtype == torch.float16
        replay.recompute_gates(spec, self.natural_gi, self.h0, states, self.reverse, gates, packs)
        if packs and (programs := interleaved_programs(family, spec.operand)) > 1:
            from .transposition import transposed

            by_channel = gates.view(-1).view(torch.int64).view(states.shape)
            gates = transposed(by_channel, programs).view(gates.dtype).view_as(gates)
        return gates


def _sum_of_rows(result: ScanGradients, interleaved: int) -> Tensor:
    """The gradient of the input's bias, ``[3, H]``; of r and z it is that of the hidden bias, where that is there."""
    rows = result.dgi.flatten(0, 1)
    if result.dbias is None:
        return natural_order(replay.column_sums(rows.flatten(1)).view(rows.shape[1:]), interleaved)
    return torch.cat([result.dbias[:2], natural_order(replay.column_sums(rows[:, 2]), interleaved)[None]])


def _scan_forward(gi: Tensor, h0: Tensor, bias_input: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    scan = _Scan.of(gi, h0, *args[:-1])
    if (reason := refuses_shape(gi, scan.spec.operand)) is not None:
        raise ValueError(f"a compiled or exported scan runs by kernels, but {reason}; split the batch, or call the layer itself")
    return scan.forward(args[-1])


def _empty_outputs(gi: Tensor, h0: Tensor, bias_input: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    states, gates = _Scan.of(gi, h0, *args[:-1]).empty_states_and_gates(args[-1])
    return states, torch.empty_like(states[0]), gates


def _scan_backward(gi: Tensor, h0: Tensor, *args: Any) -> list[Tensor]:
    """The gradients as an operator may give them: an empty tensor for None, and none in one piece of memory with another."""
    *spec_args, states, gates, dstates, dlast, adjoint, weights, bias_input = args
    wanted = _Wanted(adjoint, weights, bias_input)
    result = _Scan.of(gi, h0, *spec_args).backward(states, gates, dstates, dlast, wanted)
    if not bias_input:
        result = result._replace(dbias_input=None)
    return _apart([gi.new_empty(0) if field is None else field for field in result])


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of those that share memory with one before them."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        memory = tensor.untyped_storage().data_ptr()
        result.append(tensor.clone() if memory in seen and tensor.numel() else tensor)
        seen.add(memory)
    return result


def _empty_gradients(gi: Tensor, h0: Tensor, *args: Any) -> list[Tensor]:
    *spec_args, states, _, _, _, want_adjoint, want_weights, want_bias_input = args
    scan = _Scan.of(gi, h0, *spec_args)
    first, *rest = (factor.values for factor in scan.spec.operand.factors.values())
    second = rest[0] if rest else None
    rules = family_rules(scan.family)
    sums = rules.SUMS_WEIGHTS
    bias = gi.new_empty((3, gi.shape[-1]), dtype=torch.float32)
    result = ScanGradients(
        dgi=torch.empty_like(gi),
        dh0=torch.empty_like(h0),
        dgh_n=None if sums else torch.empty_like(gi[:, :, 0], memory_format=torch.contiguous_format),
        adjoint=torch.empty_like(states, dtype=torch.float32) if want_adjoint else None,
        dfirst=torch.empty_like(first, dtype=torch.float32) if sums and want_weights else None,
        dbias=bias if (sums or rules.SUMS_BIAS) and want_weights else None,
        dsecond=torch.empty_like(second, dtype=torch.float32) if sums and want_weights and second is not None else None,
        dbias_input=torch.empty_like(bias) if want_bias_input else None,
    )
    return [gi.new_empty(0) if field is None else field for field in result]


triton_scan = torch.library.custom_op(
    "gruqat_hf::triton_scan",
    _scan_forward,
    mutates_args=(),
    schema=f"(Tensor gi, Tensor h0, Tensor? bias_input, {_SPEC}, bool save) -> (Tensor, Tensor, Tensor)",
)
triton_scan.register_fake(_empty_outputs)
triton_scan_backward = torch.library.custom_op(
    "gruqat_hf::triton_scan_backward",
    _scan_backward,
    mutates_args=(),
    schema=(
        f"(Tensor gi, Tensor h0, {_SPEC}, Tensor states, Tensor gates, Tensor? dstates, Tensor? dlast, "
        "bool want_adjoint, bool want_weights, bool want_bias_input) -> Tensor[]"
    ),
)
triton_scan_backward.register_fake(_empty_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    states, _, gates = output
    bias_input = inputs[_BIAS_INPUT]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates)
    ctx.bias_input_dtype = None if bias_input is None else bias_input.dtype
    ctx.options = inputs[_MASK + 1 : -1]
    ctx.save_for_backward(*inputs[:_BIAS_INPUT], *inputs[_FIRST : _MASK + 1], states, gates)


def _gradients(ctx: Any, dstates: Tensor | None, dlast: Tensor | None, by_operator: bool) -> tuple[Any, ...]:
    """Gradients of the forward operator's arguments."""
    gi, h0, *tensors, mask, states, gates = ctx.saved_tensors
    needs = SpecTensors(*ctx.needs_input_grad[_FIRST:_MASK])
    needs_scales = any((needs.first_scale, needs.second_scale, needs.h_grid, needs.mid_grid, needs.state_grid, needs.gates_grid))
    needs_weights = any((needs.first, needs.second, needs.bias))
    wanted = _Wanted(needs_scales, needs_weights and not needs_scales, ctx.needs_input_grad[_BIAS_INPUT])
    scan = _Scan.of(gi, h0, *tensors, mask, *ctx.options)
    if by_operator:
        fields = triton_scan_backward(gi, h0, *tensors, mask, *ctx.options, states, gates, dstates, dlast, *wanted)
        result = ScanGradients(*(field if field.numel() else None for field in fields))
    else:
        result = scan.backward(states, gates, dstates, dlast, wanted)
    found = SpecTensors(*(None,) * len(tensors))  # type: ignore[arg-type]
    if needs_scales:
        found = replay.replay_step(scan.spec, needs, scan.natural_gi, h0, states, scan.reverse, result.adjoint)
    elif needs_weights and result.dfirst is not None:
        found = found._replace(first=result.dfirst, second=result.dsecond, bias=result.dbias)
    elif needs_weights:
        known = result.dgi, result.dgh_n, result.dbias, result.dbias_input
        found = replay.replay_product(scan.spec, needs, h0, states, scan.reverse, *known)
    weights = [
        gradient.to(tensor.dtype) if needed and gradient is not None else None
        for gradient, tensor, needed in zip(found, tensors, needs)
    ]
    bias_input = result.dbias_input.to(ctx.bias_input_dtype) if wanted.bias_input else None
    return (result.dgi, result.dh0, bias_input, *weights, None, *(None,) * len(ctx.options), None)


torch.library.register_autograd(
    "gruqat_hf::triton_scan",
    lambda ctx, dstates, dlast, _: _gradients(ctx, dstates, dlast, True),
    setup_context=_setup_context,
)


class _Function(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than a short scan."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        output = _scan_forward(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, dstates, dlast, False)


def scan(inputs: ScanInputs, spec: ScanSpec, family: str) -> tuple[Tensor, Tensor]:
    """All states ``[T, B, H]`` and the last one ``[B, H]``.

    Args:
        inputs: ``h0`` lies on the carried state's grid already, and ``gi`` is in an order that the family takes.
        spec: of the inputs.
    """
    tensors, limits = flatten(spec)
    gi, h0, mask = inputs.gi.contiguous(), inputs.h0.contiguous(), inputs.mask
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    save = inputs.needs_grad and os.environ.get(RECOMPUTE_VARIABLE, "0") != "1"
    run = triton_scan if needs_operators(gi) else _Function.apply
    options = family, limits, spec.quantized, spec.exact, inputs.reverse, inputs.interleaved, save
    states, last, _ = run(gi, h0, inputs.bias_input, *tensors, mask, *options)
    return states, last
