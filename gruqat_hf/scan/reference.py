"""The definition of the scan: a loop over steps in PyTorch that reads like the equations. Speed lives elsewhere.

    r = sigmoid(gi_r + (W_r h + b_r))
    z = sigmoid(gi_z + (W_z h + b_z))
    n = tanh(gi_n + r * (W_n h + b_n))
    h' = (1 - z) * n + z * h

as in torch.nn.GRU; quantized, each value goes through its grid and each operation is rounded on its own, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..arithmetic.gates import portable_sigmoid, portable_tanh
from ..operands import Operand
from ..quantization import Grid
from .inputs import ScanGrids, ScanInputs
from .product import OperandProduct, Tap


def gru_step(
    gi: Tensor,
    h: Tensor,
    product: OperandProduct,
    bias: Tensor | None,
    grids: ScanGrids,
    quantized: bool,
    tap: Tap | None = None,
) -> Tensor:
    """One step of every row: ``gi`` ``[rows, 3, H]``, ``h`` ``[rows, H]`` → the next state ``[rows, H]``.

    Args:
        product: of the hidden weights.
        bias: ``[3, H]`` or None.
        quantized: use the portable gates.
        tap: is shown the value of each quantization point before it is rounded.
    """
    sigmoid, tanh = (portable_sigmoid, portable_tanh) if quantized else (torch.sigmoid, torch.tanh)
    if tap is not None:
        tap("h", h)
    gh = product(h, tap)
    if bias is not None:
        gh = gh + bias

    gi_rz, gi_n = gi.split([2, 1], dim=1)
    gh_rz, gh_n = gh.split([2, 1], dim=1)
    rz_in = gi_rz + gh_rz
    r, z = sigmoid(rz_in if grids.gates is None else grids.gates.gates(0, 2).round_trip(rz_in)).unbind(1)
    n_in = gi_n + r.unsqueeze(1) * gh_n
    n = tanh(n_in if grids.gates is None else grids.gates.gates(2, 3).round_trip(n_in)).squeeze(1)
    new = (1.0 - z) * n + z * h

    if tap is not None:
        tap("gates", torch.cat([rz_in, n_in], dim=1))
        tap("state", new)
    return new if grids.state is None else grids.state.round_trip(new)


def scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """All states ``[T, B, H]``, held where the mask is False, and the last state ``[B, H]``."""
    inputs = inputs.natural()
    grids = inputs.grids
    product = OperandProduct(inputs.operand, grids.h, grids.mid)
    h = inputs.h0 if grids.state is None else grids.state.round_trip(inputs.h0)
    states: list[Tensor] = []
    # unbind: its backward is one stack for all steps, where indexing step by step would add up a full tensor for each.
    steps = list(inputs.gi.unbind(0))
    masks = None if inputs.mask is None else inputs.mask.unsqueeze(-1).unbind(0)
    order = range(len(steps) - 1, -1, -1) if inputs.reverse else range(len(steps))
    for t in order:
        new = gru_step(steps[t], h, product, inputs.bias, grids, inputs.quantized)
        h = new if masks is None else torch.where(masks[t], new, h)
        states.append(h)
    if inputs.reverse:
        states.reverse()
    return torch.stack(states), h


#: As :meth:`OperandProduct.first_product`, of an operand, the grid of its input and rows.
FirstProduct = Callable[[Operand, "Grid | None", Tensor], Tensor]


@torch.no_grad()
def observe_scan(
    inputs: ScanInputs, states: Tensor, points: Collection[str], tap: Tap, first_product: FirstProduct | None = None
) -> None:
    """Show ``tap`` what the quantization points ``points`` of a finished scan saw, from its saved states ``[T, B, H]``.

    All steps are computed again as rows of one batch, as far as the points need it: values that a grid clipped during the scan
    are seen before clipping, and no observer is called step by step. Padded steps are left out. Other points may be shown too.

    Args:
        first_product: gives the values of "mid_hidden", the same bits; None computes them here.
    """
    h0 = inputs.h0 if inputs.grids.state is None else inputs.grids.state.round_trip(inputs.h0)
    if inputs.reverse:
        before = torch.cat([states[1:], h0.unsqueeze(0)])
    else:
        before = torch.cat([h0.unsqueeze(0), states[:-1]])
    rows = None if inputs.mask is None else inputs.mask.flatten()
    before = before.flatten(0, 1) if rows is None else before.flatten(0, 1)[rows]
    if set(points) == {"h"}:
        tap("h", before)
        return
    product = OperandProduct(inputs.operand, inputs.grids.h, inputs.grids.mid)
    if set(points) <= {"h", "mid_hidden"}:
        tap("h", before)
        mid = product.first_product(before) if first_product is None else first_product(inputs.operand, inputs.grids.h, before)
        tap("mid_hidden", mid)
        return
    gi = inputs.natural().gi.flatten(0, 1)
    gi = gi if rows is None else gi[rows]
    gru_step(gi, before, product, inputs.bias, inputs.grids, inputs.quantized, tap)
