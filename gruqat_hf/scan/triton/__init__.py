"""Scans as Triton kernels: one launch for all steps forward, one backward. Importing this needs neither triton nor a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from ...operands import BlockDiagonalOperand, Factor, MonarchOperand
from ...quantization.fused import KERNELS
from ...structures.butterfly import AT_ONCE
from ..dispatch import Backend, Plan, Run
from ..inputs import LayerWeights, ScanInputs
from .choice import choose
from .monarch import first_product
from .ops import RECOMPUTE_VARIABLE, scan
from .plan import prepare_plan
from .precision import spec_of
from .quantizers import TritonQuantizers, serve
from .training_product import dense_product

__all__ = ["BACKEND", "RECOMPUTE_VARIABLE", "run_family"]


def _choose(inputs: ScanInputs) -> tuple[ScanInputs, str | None, str]:
    """The scan as a family takes it, that family, and why there is none.

    Two float factors that their own kernels cannot take are multiplied out; quantized ones define their bits as they are.
    """
    family, reason = choose(inputs)
    if family is None and not inputs.quantized and isinstance(inputs.operand, MonarchOperand):
        dense = BlockDiagonalOperand(Factor(inputs.operand.to_dense().unsqueeze(1)))
        composed = replace(inputs, operand=dense)
        family, _ = choose(composed)
        if family is not None:
            return composed, family, ""
    return inputs, family, reason


def _select(inputs: ScanInputs) -> Run | str:
    inputs, family, reason = _choose(inputs)
    return reason if family is None else partial(run_family, inputs, family)


def run_family(inputs: ScanInputs, family: str) -> tuple[Tensor, Tensor]:
    """All states ``[T, B, H]`` and the last one ``[B, H]``, by the kernels of a family that does not refuse; differentiable."""
    if (state := inputs.grids.state) is not None:
        inputs = replace(inputs, h0=state.round_trip(inputs.h0))
    return scan(inputs, spec_of(inputs), family)


def _prepare(weights: LayerWeights, x: Tensor) -> Plan | str:
    return prepare_plan(weights, x)


def _multiply_butterfly(twiddle: Tensor) -> tuple[Tensor, Tensor] | None:
    if not serve(twiddle):
        return None
    from .butterfly import multiplied_out

    return multiplied_out(twiddle)


KERNELS.append(TritonQuantizers())
AT_ONCE.append(_multiply_butterfly)

BACKEND = Backend("triton", _select, prepare=_prepare, product=dense_product, first_product=first_product, sums_bias_input=True)
