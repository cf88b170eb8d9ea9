"""What a scan is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..operands import Operand
from ..quantization import Grid


@dataclass(frozen=True)
class ScanGrids:
    """Grids of the quantization points inside a scan; None leaves a point in float.

    Attributes:
        h: hidden state on the matmul side, scale of one element.
        mid: value between the factors of a monarch operand, scale ``[1 or gates, 1, 1]``.
        gates: pre-activations, scale ``[1 or 3, 1 or H]``.
        state: hidden state as carried, scale ``[1 or H]``.
    """

    h: Grid | None = None
    mid: Grid | None = None
    gates: Grid | None = None
    state: Grid | None = None

    @property
    def any(self) -> bool:
        return any(grid is not None for grid in (self.h, self.mid, self.gates, self.state))


@dataclass(frozen=True)
class LayerWeights:
    """All that a layer's inference reads besides its input: what a backend prepares once and uses for many calls.

    Attributes:
        input, hidden: operands of the two sides.
        bias_input, bias_hidden: ``[3, H]`` or None.
        x, mid_input: grids of the input product's points, or None.
        grids: of the points inside the scan.
        quantized: whether gates are the portable ones.
        dynamic_x: gives the grid of x for the rows of a call, ``[R, I]`` without padded ones, where it is taken from each input;
            ``x`` is None then.
    """

    input: Operand
    hidden: Operand
    bias_input: Tensor | None
    bias_hidden: Tensor | None
    x: Grid | None
    mid_input: Grid | None
    grids: ScanGrids
    quantized: bool
    dynamic_x: Callable[[Tensor], Grid] | None = None


def exchange_order(values: Tensor, dim: int, programs: int) -> Tensor:
    """Channels along a dimension in the exchange order of so many programs: ``u * programs + p`` at ``p * H / programs + u``."""
    if programs == 1:
        return values
    return values.unflatten(dim, (-1, programs)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def natural_order(values: Tensor, programs: int) -> Tensor:
    """The last dimension of channels back from the exchange order of so many programs."""
    return values if programs == 1 else values.unflatten(-1, (programs, -1)).transpose(-1, -2).flatten(-2)


@dataclass(frozen=True)
class ScanInputs:
    """One scan over a sequence, in one direction.

    Attributes:
        gi: input product with its bias, ``[T, B, 3, H]``, gates in the order r, z, n.
        h0: state before the first step, ``[B, H]``.
        operand: hidden weights of the three gates.
        bias: hidden bias ``[3, H]`` or None.
        grids: of the quantization points.
        mask: ``[T, B]`` bool, False where a step is padding: the state is held; None for no padding.
        reverse: whether to walk from the last step to the first.
        quantized: whether gates are the portable ones, as in every qat or frozen state (design: arithmetic contract).
        bias_input: ``[3, H]``, in ``gi`` already, which is detached from it: its gradient, that of ``gi`` summed over steps and
            rows, is the scan's to give; None where there is none to give.
        interleaved: in the exchange order of how many programs ``gi`` has its channels; 1 for natural order, that of all else.
    """

    gi: Tensor
    h0: Tensor
    operand: Operand
    bias: Tensor | None = None
    grids: ScanGrids = field(default_factory=ScanGrids)
    mask: Tensor | None = None
    reverse: bool = False
    quantized: bool = False
    bias_input: Tensor | None = None
    interleaved: int = 1

    def natural(self) -> ScanInputs:
        """The same scan with ``gi`` in natural order; differentiable."""
        if self.interleaved == 1:
            return self
        return replace(self, gi=natural_order(self.gi, self.interleaved), interleaved=1)

    @property
    def needs_grad(self) -> bool:
        tensors = [self.gi, self.h0, self.bias, self.bias_input, *(factor.values for factor in self.operand.factors.values())]
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
