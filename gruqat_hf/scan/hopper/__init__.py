"""Scans as Gluon kernels for Hopper GPUs: the tier above the portable ones. Importing this needs neither triton nor a GPU.

Its families follow the protocol of the portable ones and run by the same operators and plans; what they refuse, the portable ones
serve.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...operands import BlockDiagonalOperand, MonarchOperand
from ..dispatch import Backend, Plan, Run
from ..inputs import LayerWeights, ScanInputs
from ..triton import run_family
from ..triton.choice import choose, input_order, register
from ..triton.device import DeviceFacts
from ..triton.monarch import first_product
from ..triton.plan import prepare_plan
from ..triton.training_product import dense_product
from . import block_diagonal, dense, monarch

__all__ = ["BACKEND"]

register("hopper_block_diagonal", block_diagonal)
register("hopper_dense", dense)
register("hopper_monarch", monarch)


def _candidates(inputs: ScanInputs, facts: DeviceFacts) -> tuple[str, ...]:
    """The families that take an operand, best first."""
    if isinstance(inputs.operand, BlockDiagonalOperand):
        small = inputs.operand.blocks.values.shape[-1] <= block_diagonal.LARGEST
        return ("hopper_block_diagonal",) if small else ("hopper_dense",)
    return ("hopper_monarch",) if isinstance(inputs.operand, MonarchOperand) else ()


def _select(inputs: ScanInputs) -> Run | str:
    family, reason = choose(inputs, _candidates)
    if family is None:
        return reason
    if inputs.interleaved != input_order(family, inputs):
        inputs = inputs.natural()
    return partial(run_family, inputs, family)


def _order(inputs: ScanInputs) -> int:
    if not isinstance(inputs.operand, MonarchOperand):
        return 1
    family, _ = choose(inputs, _candidates)
    return 1 if family is None else input_order(family, inputs)


def _prepare(weights: LayerWeights, x: Tensor) -> Plan | str:
    return prepare_plan(weights, x, _candidates)


BACKEND = Backend(
    "hopper",
    _select,
    prepare=_prepare,
    product=dense_product,
    first_product=first_product,
    sums_bias_input=True,
    order=_order,
)
