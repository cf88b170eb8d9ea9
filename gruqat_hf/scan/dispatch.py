"""Which implementation runs a scan: one table, in order of preference."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import is_transformed
from ..operands import Operand
from ..quantization import Grid
from .inputs import LayerWeights, ScanInputs
from .product import OperandProduct
from .reference import scan_reference
from .replay import column_sums

logger = logging.getLogger("gruqat_hf")

#: Environment variable that forces a backend; "auto" or unset chooses the first that can run.
BACKEND_VARIABLE = "GRUQAT_BACKEND"


#: Inference of a whole layer with prepared weights: ``plan(x [T, B, I], h0 [B, H] or None, mask [T, B] or None, reverse)``
#: gives all states ``[T, B, H]`` and the last one ``[B, H]``.
Plan = Callable[[Tensor, "Tensor | None", "Tensor | None", bool], "tuple[Tensor, Tensor]"]


#: Runs the scan that it was selected for: all states ``[T, B, H]`` and the last one ``[B, H]``; differentiable.
Run = Callable[[], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the scan.

    Attributes:
        name: as ``GRUQAT_BACKEND`` spells it.
        select: what runs a scan, or the reason why this backend cannot.
        prepare: inference of a whole layer for inputs like the one given, or the reason why there is none; None if it never has.
        prepares_dynamic_x: whether it does so for an input grid that is taken from each input.
        product: the input product of rows ``[R, I]`` with bias, ``[R, gates, H]``, or None for the general one; differentiable.
        first_product: ``OperandProduct.first_product`` of an operand, the grid of its input and rows ``[R, in]``, or None for the
            general one; without gradients.
        sums_bias_input: whether its scan gives ``ScanInputs.bias_input`` its gradient.
        order: of how many programs ``gi`` should be in the exchange order, for inputs whose ``gi`` is not there yet; None if its
            scans take natural order alone.
    """

    name: str
    select: Callable[[ScanInputs], Run | str]
    prepare: Callable[[LayerWeights, Tensor], Plan | str] | None = None
    prepares_dynamic_x: bool = False
    product: Callable[[Operand, Grid | None, Tensor | None, Tensor], Tensor | None] | None = None
    first_product: Callable[[Operand, Grid | None, Tensor], Tensor | None] | None = None
    sums_bias_input: bool = False
    order: Callable[[ScanInputs], int] | None = None


#: In order of preference; the reference runs everything and comes last.
BACKENDS: list[Backend] = [Backend("reference", lambda inputs: partial(scan_reference, inputs))]

_logged: set[str] = set()


def check_backend(name: str | None) -> None:
    """Refuse a name that nothing can be forced by.

    Raises:
        ValueError: a name that no backend has.
    """
    if name not in (None, "auto", *(backend.name for backend in BACKENDS)):
        raise ValueError(f"backend {name!r} does not exist; choose one of auto, {', '.join(b.name for b in BACKENDS)}")


def _candidates(forced: str | None) -> tuple[list[Backend], bool]:
    """The backends to try, in order, and whether one was forced.

    Raises:
        ValueError: a forced name that does not exist.
    """
    wanted = forced if forced not in (None, "auto") else os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted == "auto":
        return BACKENDS, False
    check_backend(wanted)
    return [backend for backend in BACKENDS if backend.name == wanted], True


def _told(reasons: list[tuple[str, str]]) -> str:
    """Backends and why each does not run, those with the same reason together."""
    together: dict[str, list[str]] = {}
    for name, reason in reasons:
        together.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in together.items())


def _tell(backend: Backend, reasons: list[tuple[str, str]], forced: bool) -> str:
    """Which backend runs and why, on one line; logged the first time."""
    told = f"{backend.name} ({'forced' if forced else _told(reasons) or 'first choice'})"
    if told not in _logged and not torch.compiler.is_compiling():  # which takes no logging into a graph
        _logged.add(told)
        logger.info("scan backend: %s", told)
    return told


class _WithBias(torch.autograd.Function):
    """``gi``, which has a bias in it: that one's gradient is the sum of gi's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gi: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return gi.view_as(gi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.bias_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        sums = column_sums(gradient.flatten(0, 1).flatten(1)).view(gradient.shape[2:])
        return gradient, sums.to(ctx.bias_dtype)


def run_scan(inputs: ScanInputs, forced: str | None = None) -> tuple[Tensor, Tensor, str]:
    """Run a scan by the first backend that can.

    Args:
        forced: a backend's name; None or "auto" leaves the choice to the environment variable, then to the table.

    Returns:
        All states ``[T, B, H]``, the last one ``[B, H]``, and which backend ran and why.

    Raises:
        ValueError: a forced name that does not exist.
        RuntimeError: a forced backend that cannot run this scan.
    """
    candidates, is_forced = _candidates(forced)
    reasons: list[tuple[str, str]] = []
    for backend in candidates:
        if backend is not BACKENDS[-1] and is_transformed():
            reasons.append((backend.name, "a torch.func transform is active"))
            continue
        if backend.order is None:
            inputs = inputs.natural()
        if inputs.bias_input is not None and not backend.sums_bias_input:
            inputs = replace(inputs, gi=_WithBias.apply(inputs.gi, inputs.bias_input), bias_input=None)
        run = backend.select(inputs)
        if not isinstance(run, str):
            states, last = run()
            return states, last, _tell(backend, reasons, is_forced)
        reasons.append((backend.name, run))
    raise RuntimeError(f"backend {candidates[0].name!r} was forced, but cannot run this scan: {_told(reasons)}")


def input_order(inputs: ScanInputs, forced: str | None = None) -> int:
    """In the exchange order of how many programs the backend that may run a scan wants ``gi``; all others take it too."""
    return next((backend.order(inputs) for backend in _candidates(forced)[0] if backend.order is not None), 1)


def prepare_plan(weights: LayerWeights, x: Tensor, forced: str | None = None) -> tuple[Plan | None, str]:
    """Prepared inference of the first backend that offers it for inputs like ``x`` ``[T, B, I]``, and which one and why.

    None means that no backend prepares this layer: its input product and its scan then run by themselves.

    Raises:
        ValueError: a forced name that does not exist.
    """
    candidates, is_forced = _candidates(forced)
    reasons: list[tuple[str, str]] = []
    for backend in candidates:
        if backend.prepare is None or (weights.dynamic_x is not None and not backend.prepares_dynamic_x):
            continue
        plan = backend.prepare(weights, x)
        if not isinstance(plan, str):
            return plan, _tell(backend, reasons, is_forced)
        reasons.append((backend.name, plan))
    return None, _told(reasons)


def run_product(
    operand: Operand,
    grid: Grid | None,
    mid_grid: Grid | Callable[[Tensor], Grid | None] | None,
    bias: Tensor | None,
    rows: Tensor,
    forced: str | None = None,
) -> Tensor:
    """The input product of rows ``[R, I]`` with bias ``[gates, H]``, ``[R, gates, H]``, by the first backend that has its own.

    Args:
        grid, mid_grid: as :class:`OperandProduct` takes them.
    """
    for backend in () if is_transformed() else _candidates(forced)[0]:
        if backend.product is not None and (found := backend.product(operand, grid, bias, rows)) is not None:
            return found
    product = OperandProduct(operand, grid, mid_grid)(rows)
    return product if bias is None else product + bias


def run_first_product(operand: Operand, grid: Grid | None, rows: Tensor, forced: str | None = None) -> Tensor:
    """``OperandProduct(operand, grid).first_product(rows)`` of rows ``[R, in]``, ``[R, 1 or gates, blocks, rank]``, by the first
    backend that has its own, bit for bit; without gradients."""
    for backend in _candidates(forced)[0]:
        if backend.first_product is not None and (found := backend.first_product(operand, grid, rows)) is not None:
            return found
    return OperandProduct(operand, grid).first_product(rows)
