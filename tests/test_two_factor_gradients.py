"""What the backward pass of two-factor operands computes over all rows: mid values, bit for bit, and gradients of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import Case, distance, skip_unless_kernels_run
from torch import Tensor

from gruqat_hf.operands import BlockDiagonalOperand
from gruqat_hf.quantization import Grid
from gruqat_hf.scan import OperandProduct, ScanInputs, dispatch
from gruqat_hf.scan.replay import before_steps
from gruqat_hf.scan.spec import ScanSpec
from gruqat_hf.scan.triton.precision import spec_of

weights = pytest.importorskip("gruqat_hf.scan.triton.monarch.weights", reason="kernels need triton")

SMALL = [
    Case(3, 4, 4, 8),
    Case(5, 2, 4, 8, per_gate=True, second=(8, 4), reverse=True),
    Case(3, 5, 3, 5, per_gate=True, second=(5, 3)),
    Case(1, 1, 1, 5),
    Case(9, 8, 2, 18),
    Case(3, 2, 4, 4, dtype=torch.float16),
    Case(3, 2, 4, 4, dtype=torch.bfloat16, reverse=True),
]
QUANTIZED = [
    Case(4, 3, 4, 8, quantized=True),
    Case(5, 3, 4, 8, quantized=True, second=(8, 4), per_gate=True, groups=2, reverse=True),
    Case(3, 2, 5, 6, quantized=True, groups=3, h_scale=0.7 / 127),
    Case(1, 3, 1, 20, quantized=True, per_gate=True),
]
LARGE = [
    Case(64, 32, 8, 64),
    Case(33, 5, 16, 32, per_gate=True, second=(32, 16), reverse=True),
    Case(17, 9, 4, 128),
    Case(20, 7, 8, 64, per_gate=True, dtype=torch.float16),
    Case(9, 3, 3, 30),
    Case(64, 32, 8, 64, quantized=True),
    Case(40, 50, 16, 32, quantized=True, per_gate=True, second=(32, 16), reverse=True),
    Case(16, 9, 8, 128, quantized=True, groups=2),
    Case(12, 6, 8, 64, quantized=True, groups=16),
]
#: Scans whose channels are in the exchange order of so many programs.
EXCHANGED = [
    (Case(3, 2, 8, 8, reverse=True), 8),
    (Case(3, 2, 4, 16, quantized=True, per_gate=True, second=(8, 8)), 4),
    (Case(2, 3, 16, 4, quantized=True), 8),
]
EXCHANGED_LARGE = [
    (Case(30, 8, 8, 64), 8),
    (Case(30, 8, 16, 32, quantized=True, per_gate=True, second=(32, 16), reverse=True), 8),
    (Case(30, 8, 16, 64, quantized=True, second=(32, 32)), 16),
]


def _exchanged(values: Tensor, programs: int) -> Tensor:
    """The last dimension, channels ``u * programs + p``, as ``p, u``."""
    return values.unflatten(-1, (-1, programs)).transpose(-1, -2).flatten(-2).contiguous()


def _states(inputs: ScanInputs) -> Tensor:
    """Any, some of them beyond the grid of h."""
    steps, rows, _, hidden = inputs.gi.shape
    return (torch.rand(steps, rows, hidden, device=inputs.gi.device) * 2 - 1).to(inputs.gi.dtype)


def _first_product(spec: ScanSpec, before: Tensor) -> Tensor:
    """Of the reference, ``[R, g, H]``."""
    first = spec.operand.factors["first"]
    return OperandProduct(BlockDiagonalOperand(replace(first, values=first.values.float())), spec.grids.h)(before)


def _rounded(grid: Grid | None, mid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes, and which pass: bits ``[R, H]``."""
    if grid is None:
        return mid, None
    apart = mid.unsqueeze(-2)  # the grid's scales are [g, 1, 1]
    passes = ~grid.clips(apart).squeeze(-2)
    bits = sum(passes[:, gate].to(torch.uint8) << gate for gate in range(mid.shape[1]))
    return grid.codes(apart).squeeze(-2), bits


def _check(inputs: ScanInputs, within: float, programs: int = 1) -> None:
    spec, states, h0, reverse = spec_of(inputs), _states(inputs), inputs.h0, inputs.reverse
    first, second = spec.operand.factors["first"], spec.operand.factors["second"]
    gates, blocks, outs, ins = first.values.shape
    _, count, width, rank = second.values.shape
    steps, batch, _, hidden = inputs.gi.shape
    orders = weights.Orders(states=1, mid=programs, gates=programs)

    before = before_steps(states, h0, reverse).flatten(0, 1).float()
    wanted, passes = _rounded(spec.grids.mid, _first_product(spec, before))
    mid = weights.mid_values(spec, states, h0, reverse, orders=orders)
    if spec.quantized:
        assert torch.equal(mid.values.float(), _exchanged(wanted, programs))
        assert torch.equal(mid.passes, _exchanged(passes, programs))
        assert torch.equal(weights.mid_values(spec, states, h0, reverse, False, orders).passes, mid.passes)
    else:
        assert mid.passes is None and distance(mid.values, _exchanged(wanted, programs)) <= within

    dmid = torch.randn(steps, batch, gates, hidden, device=states.device)
    dgi, dgh_n = torch.randn_like(inputs.gi), torch.randn_like(inputs.gi[:, :, 0])
    gradients = (_exchanged(x, programs) for x in (dmid, dgi, dgh_n))
    found = weights.weight_gradients(spec, states, h0, reverse, mid, *gradients, orders=orders)

    h = before if spec.grids.h is None else spec.grids.h.round_trip(before)
    if (grid := spec.grids.mid) is not None:
        wanted = (wanted.unsqueeze(-2) * grid.scale).squeeze(-2)
    dgh = torch.cat([dgi[:, :, :2], dgh_n.unsqueeze(2)], dim=2).flatten(0, 1).double()
    dfirst = torch.einsum(
        "rgko,rki->gkoi", dmid.flatten(0, 1).double().unflatten(-1, (blocks, outs)), h.double().unflatten(-1, (blocks, ins))
    )
    values = wanted.double().unflatten(-1, (rank, count)).expand(-1, 3, -1, -1)
    dsecond = torch.einsum("rgol,rgil->gloi", dgh.unflatten(-1, (width, count)), values)
    for factor, gradient, got in zip((first, second), (dfirst, dsecond), found):
        if factor.scale is not None:
            gradient = (gradient.unflatten(-1, (factor.groups, -1)) * factor.scale.unsqueeze(-1)).flatten(-2)
        assert got.dtype == torch.float32 and got.shape == factor.values.shape
        assert distance(got, gradient) <= within
    assert distance(found[2], dgh.sum(0)) <= 1e-5


@pytest.mark.parametrize("case", [*SMALL, *QUANTIZED])
def test_mid_values_and_gradients(device, case):
    skip_unless_kernels_run(device)
    _check(case.inputs("monarch", device), 1e-3)


@pytest.mark.parametrize("case, programs", EXCHANGED)
def test_channels_in_exchange_order(device, case, programs):
    skip_unless_kernels_run(device)
    _check(case.inputs("monarch", device), 1e-3, programs)


@pytest.mark.gpu
@pytest.mark.parametrize("case, programs", [*((case, 1) for case in LARGE), *EXCHANGED_LARGE])
def test_large(case, programs):
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    _check(case.inputs("monarch", device), 1e-3, programs)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE[:2])
def test_float_gradients_as_exact_as_fp32(case):
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        _check(case.inputs("monarch", device), 2e-6)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", [QUANTIZED[1], Case(3, 2, 4, 4)])
def test_observers_are_shown_the_bits_of_the_reference(device, case):
    skip_unless_kernels_run(device)
    inputs = case.inputs("monarch", device)
    rows = _states(inputs).flatten(0, 1)
    wanted = OperandProduct(inputs.operand, inputs.grids.h).first_product(rows)
    own = [backend for backend in dispatch.BACKENDS if backend.name == "triton"]
    assert (own[0].first_product(inputs.operand, inputs.grids.h, rows) is not None) == case.quantized
    for forced in (None, "triton", "reference"):
        assert torch.equal(dispatch.run_first_product(inputs.operand, inputs.grids.h, rows, forced), wanted)
