"""Which kernel family runs a scan: the one table."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ...operands import BlockDiagonalOperand, DiagonalOperand, MonarchOperand, Operand
from ..inputs import ScanInputs
from . import block_diagonal, dense, diagonal, monarch
from .device import DeviceFacts, device_facts, refuses_device
from .precision import is_exact

_FAMILIES: dict[str, ModuleType] = {
    "diagonal": diagonal,
    "block_diagonal": block_diagonal,
    "dense": dense,
    "monarch": monarch,
}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Rows of a batch at most, where channels of a row are not scanned by themselves: programs of 4 rows, along an axis of a grid.
_MOST_ROWS = 4 * 65535


def register(name: str, rules: ModuleType) -> None:
    """Add a family of another tier to those that operators can run."""
    _FAMILIES[name] = rules


def family_rules(name: str) -> ModuleType:
    """The package of a family: its ``refuses``, ``SAVES_GATES``, ``SUMS_WEIGHTS``, and ``SUMS_BIAS`` where it sums no weights."""
    return _FAMILIES[name]


def interleaved_programs(name: str, operand: Operand) -> int:
    """In the exchange order of how many programs a family's launches take and give ``gi``, states and 16-bit gates of an operand;
    1 where channels are in natural order."""
    rule = getattr(_FAMILIES[name], "interleaved_programs", None)
    return 1 if rule is None else rule(operand)


def input_order(name: str, inputs: ScanInputs) -> int:
    """In the exchange order of how many programs a family takes ``gi`` in training and gives its gradient. Gradients as exact as
    fp32 are those of portable kernels, which know natural order only."""
    return 1 if is_exact(inputs) else interleaved_programs(name, inputs.operand)


def refuses_product(inputs: ScanInputs) -> str | None:
    """Why no kernel computes the scan's values as the reference does, or None."""
    if inputs.gi.dtype not in _DTYPES or inputs.h0.dtype not in _DTYPES:
        return f"dtype {inputs.gi.dtype} is not one of fp32, fp16, bf16"
    if not inputs.quantized and (inputs.grids.any or inputs.operand.is_quantized):
        return "a grid is active in the float state"
    return None


def refuses_shape(gi: Tensor, operand: Operand) -> str | None:
    """Why a batch is too large for kernels, or None."""
    rows, gates, hidden = gi.shape[1:]
    if not isinstance(operand, DiagonalOperand) and rows > _MOST_ROWS:
        return f"a batch may have {_MOST_ROWS} rows at most, and has {rows}"
    if rows * (gates + 1) * hidden >= 1 << 31:  # which is how far kernels count inside a step, where they save one value more
        return f"a step of {rows} rows, {gates} gates and {hidden} channels has 2**31 values or more, with what is saved of it"
    return None


def candidates(inputs: ScanInputs, facts: DeviceFacts) -> tuple[str, ...]:
    """The families that take an operand, best first.

    A block that stays with one program is best left there; a larger one is spread over many programs ("dense"), and where the GPU
    has no room for all of them at once it streams through one. So it does where pre-activations have a grid.
    """
    operand = inputs.operand
    if isinstance(operand, DiagonalOperand):
        return ("diagonal",)
    if isinstance(operand, MonarchOperand):
        return ("monarch",)
    if isinstance(operand, BlockDiagonalOperand):
        exact = not inputs.quantized and is_exact(inputs)
        small = block_diagonal.is_resident(operand.blocks.values.shape[-1], exact, facts)
        return ("block_diagonal",) if small or inputs.grids.gates is not None else ("dense", "block_diagonal")
    return ()


#: The families that take an operand on a device, best first.
Candidates = Callable[[ScanInputs, DeviceFacts], "tuple[str, ...]"]


def choose(inputs: ScanInputs, candidates: Candidates = candidates) -> tuple[str | None, str]:
    """The family that runs a scan and "", or None and the reason why there is none.

    Args:
        candidates: of a tier; the portable one's unless given.
    """
    if (reason := refuses_device(inputs.gi.device) or refuses_product(inputs)) is not None:
        return None, reason
    if inputs.gi.numel() == 0:
        return None, "there are no rows"
    # A compiler would make a limit of it, of a batch that may have any size; the operator looks again.
    if not torch.compiler.is_compiling() and (reason := refuses_shape(inputs.gi, inputs.operand)) is not None:
        return None, reason
    facts = device_facts(inputs.gi.device)
    reasons = []
    for name in candidates(inputs, facts):
        if (reason := _FAMILIES[name].refuses(inputs, facts)) is None:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons) or f"no kernel takes a {type(inputs.operand).__name__}"
