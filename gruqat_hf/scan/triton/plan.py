"""Inference of a whole layer with weights prepared once, and a thin way to launch it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..capture import Readiness, is_capturing
from ..dispatch import Plan
from ..inputs import LayerWeights, ScanInputs
from ..reference import scan_reference
from .choice import Candidates, candidates, choose, interleaved_programs
from .exchange_plan import power_of_two
from .family import aligned, kernels
from .precision import spec_of

#: Fills the states of one scan: gi, h0, mask, states.
_Launch = Callable[[Tensor, Tensor, "Tensor | None", Tensor], None]


class LayerPlan:
    """A ``Plan``: called with ``x`` ``[T, B, I]``, ``h0`` ``[B, H]`` or None, ``mask`` ``[T, B]`` or None, and the direction."""

    def __init__(self, weights: LayerWeights, candidates: Candidates, programs: int) -> None:
        """
        Args:
            programs: in whose exchange order the input product is to be, as the family to run wants it; 1 for natural order.
        """
        from .input_product import input_product

        self._weights = weights
        self._candidates = candidates
        self._hidden = weights.hidden.out_features
        self._programs = programs
        self._product = input_product(weights, programs)
        self._prepared: dict[str, Any] = {}
        self._launches: dict[tuple[Any, ...], _Launch] = {}
        self._zeros: dict[torch.dtype, list[Tensor]] = {}
        self._initial_states: dict[tuple[Any, ...], Tensor] = {}
        self._lock = Lock()
        self._readiness = Readiness()
        self._readiness.record(next(iter(weights.hidden.factors.values())).values.device)

    def __call__(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        steps, rows = x.shape[:2]
        self._readiness.wait(x.device)
        gi = self._product(x.reshape(steps * rows, -1)).view(steps, rows, 3, self._hidden)
        h0 = self._initial(gi, h0)
        if mask is not None:
            mask = aligned(mask.contiguous().view(torch.uint8))
        states = torch.empty((steps, rows, self._hidden), dtype=h0.dtype, device=gi.device)
        key = (steps, rows, reverse, mask is None, gi.dtype, h0.dtype)
        launch = self._launches.get(key)
        if launch is None:
            launch = self._prepare(key, gi, h0, mask, reverse, states)
        self._readiness.wait(x.device)  # for what another thread may have prepared meanwhile
        launch(gi, h0, mask, states)
        return states, states[0 if reverse else -1]

    def _initial(self, gi: Tensor, h0: Tensor | None) -> Tensor:
        """The first state on the carried state's grid, aligned as kernels were compiled for."""
        if h0 is None:
            zeros = self._initial_states.get((gi.shape[1], gi.dtype))
            return self._zeros_like(gi) if zeros is None else zeros
        state = self._weights.grids.state
        h0 = h0 if state is None else state.round_trip(h0)
        return aligned(h0.to(torch.promote_types(gi.dtype, h0.dtype)).contiguous())

    def _zeros_like(self, gi: Tensor) -> Tensor:
        """Zeros ``[B, H]`` for ``gi`` ``[T, B, 3, H]``, the first rows of a tensor with room for the largest batch so far.

        Smaller ones that it replaces are kept: a CUDA graph may read them. Together they are no larger than the last.
        """
        rows = gi.shape[1]
        with self._lock:
            kept = self._zeros.setdefault(gi.dtype, [])
            if not kept or kept[-1].shape[0] < rows:
                if is_capturing(gi.device):
                    return gi.new_zeros((rows, self._hidden))
                zeros = gi.new_zeros((power_of_two(rows), self._hidden))
                self._readiness.record(gi.device)
                kept.append(zeros)
            first = self._initial_states[rows, gi.dtype] = kept[-1][:rows]
        return first

    def _prepare(
        self, key: tuple[Any, ...], gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor
    ) -> _Launch:
        """How to fill the states of scans of these shapes; kept, but for what a capture prepares. Another thread that wants the
        same waits, and finds it only when the streams that are to wait for it will."""
        if is_capturing(gi.device):
            return self._launch(gi, h0, mask, reverse, states, keep=False)
        with self._lock:
            if (found := self._launches.get(key)) is None:
                found = self._launch(gi, h0, mask, reverse, states, keep=True)
                self._readiness.record(gi.device)
                self._launches[key] = found
        return found

    def _launch(self, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, keep: bool) -> _Launch:
        """How to fill the states of scans of these shapes.

        Args:
            keep: whether it serves later calls too; see :meth:`KernelCall.launcher`.
        """
        weights = self._weights
        inputs = ScanInputs(gi, h0, weights.hidden, weights.bias_hidden, weights.grids, mask, reverse, weights.quantized)
        family, _ = choose(inputs, self._candidates)
        if family is None:  # of another tier, that takes fewer shapes
            family, _ = choose(inputs)
        programs = 1 if family is None else interleaved_programs(family, weights.hidden)
        gi = self._in_order(gi, programs)
        launch = self._kernel(family, inputs, gi, states, keep)
        if programs > 1:
            launch = self._interleaved(launch, states, programs, keep)
        return lambda gi, h0, mask, states: launch(self._in_order(gi, programs), h0, mask, states)

    def _in_order(self, gi: Tensor, programs: int) -> Tensor:
        """The input product in the exchange order of so many programs."""
        if programs == self._programs:
            return gi
        from .transposition import transposed

        gi = gi if self._programs == 1 else transposed(gi, self._hidden // self._programs)
        return gi if programs == 1 else transposed(gi, programs)

    def _interleaved(self, scan: _Launch, states: Tensor, programs: int, keep: bool) -> _Launch:
        """The launch of a scan whose states are in exchange order, and one that brings them into natural order."""
        from .transposition import transposition

        reorder = transposition(torch.empty_like(states), states, self._hidden // programs).launcher(keep)

        def launch(gi: Tensor, h0: Tensor, mask: Tensor | None, states: Tensor) -> None:
            scanned = torch.empty_like(states)
            scan(gi, h0, mask, scanned)
            reorder(scanned, states, None)

        return launch

    def _kernel(self, family: str | None, inputs: ScanInputs, gi: Tensor, states: Tensor, keep: bool) -> _Launch:
        """The launch of a family's kernel, or of the reference."""
        h0, reverse = inputs.h0, inputs.reverse
        if family is None:
            return lambda gi, h0, mask, states: self._reference(gi, h0, mask, reverse, states)
        forward = kernels(family, "forward")
        prepared = self._prepared.get(family)
        if prepared is None:
            prepared = forward.prepare(spec_of(inputs))
            if keep:
                self._prepared[family] = prepared
        call = forward.call(prepared, gi, h0, inputs.mask, reverse, states, None) if hasattr(forward, "call") else None
        if call is None:
            return lambda gi, h0, mask, states: forward.forward(prepared, gi, h0, mask, reverse, states, None)
        run = call.launcher(keep)
        return lambda gi, h0, mask, states: run(gi, h0, mask, states, None)

    def _reference(self, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor) -> None:
        weights = self._weights
        mask = None if mask is None else mask.bool()
        inputs = ScanInputs(gi, h0, weights.hidden, weights.bias_hidden, weights.grids, mask, reverse, weights.quantized)
        states.copy_(scan_reference(inputs)[0])


def prepare_plan(weights: LayerWeights, x: Tensor, candidates: Candidates = candidates) -> Plan | str:
    """A plan for inputs on the device of ``x`` ``[T, B, I]``, or the reason why there is none.

    Args:
        candidates: of a tier, as in :func:`choose`.
    """
    steps, rows, _ = x.shape
    hidden = weights.hidden.out_features
    dtype = torch.float32 if weights.quantized else x.dtype
    gi, h0 = (torch.empty(shape, dtype=dtype, device=x.device) for shape in ((steps, rows, 3, hidden), (rows, hidden)))
    inputs = ScanInputs(gi, h0, weights.hidden, weights.bias_hidden, weights.grids, None, False, weights.quantized)
    family, reason = choose(inputs, candidates)
    return reason if family is None else LayerPlan(weights, candidates, interleaved_programs(family, weights.hidden))
