"""Kernels for large blocks: against the reference, on the CPU in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import Case, Run, check_against_reference, skip_unless_kernels_run

from gruqat_hf.scan import ScanInputs
from gruqat_hf.scan.triton import dense
from gruqat_hf.scan.triton.dense import layout
from gruqat_hf.scan.triton.device import DeviceFacts, device_facts

H200 = DeviceFacts(processors=132, shared_bytes=232448, capability=(9, 0))

SMALL = [
    Case(5, 3, 1, 20),
    Case(1, 1, 2, 7),
    Case(4, 9, 1, 33, masked=True, reverse=True),
    Case(3, 2, 1, 16, bias=False),
    Case(2, 3, 1, 1),
]
QUANTIZED = [
    Case(5, 3, 1, 20, quantized=True),
    Case(4, 2, 2, 12, quantized=True, groups=3, per_channel=True, masked=True, reverse=True, bias=False),
    Case(4, 9, 1, 24, quantized=True, groups=2, h_scale=0.7 / 127),
]
LARGE = [
    Case(64, 32, 1, 512),
    Case(33, 70, 1, 300, masked=True, reverse=True),
    Case(16, 128, 2, 256),
    Case(16, 17, 1, 1024),
    Case(7, 400, 1, 512),
    Case(3, 1, 1, 130),
    Case(3, 300, 1, 1024),
]


@pytest.mark.parametrize("precision, states, gradients", [("highest", 2e-6, 2e-6), ("high", 2e-4, 1e-3)])
@pytest.mark.parametrize("case", SMALL)
def test_float_agrees_with_the_reference(device, case, precision, states, gradients):
    skip_unless_kernels_run(device)
    check_against_reference("dense", case.inputs("dense", device), states, gradients, precision)


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_states_are_those_of_the_reference_bit_for_bit(device, case):
    skip_unless_kernels_run(device)
    check_against_reference("dense", case.inputs("dense", device), 0.0, 1e-3)


@pytest.mark.parametrize("dtype, within", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_inputs(device, dtype, within):
    skip_unless_kernels_run(device)
    check_against_reference("dense", Case(4, 3, 1, 20, dtype=dtype).inputs("dense", device), within, within)


def test_slices_of_a_block_make_up_the_whole(device, monkeypatch):
    """The interpreter runs programs one after another, so none may wait: single steps, run twice over one exchange buffer, which
    the first run fills for the second to read."""
    skip_unless_kernels_run(device)
    if device.type == "cuda":
        pytest.skip("stands in for programs side by side, which test_large_quantized has on a GPU")
    inputs = Case(4, 3, 2, 40, quantized=True, groups=2).inputs("dense", device)
    wanted = Run.of("dense", inputs).states
    forward = Run.of("dense", inputs).module("forward")
    monkeypatch.setattr(layout, "INTERPRETED", False)
    monkeypatch.setattr(forward, "device_facts", lambda _: H200)
    monkeypatch.setattr(forward, "new_counters", lambda groups, _: torch.full((groups * 32,), 1 << 30, dtype=torch.int32))
    h = inputs.h0
    for step in range(4):
        buffer = torch.empty(2, 3, 80, dtype=torch.float16)
        monkeypatch.setattr(forward, "new_exchange", lambda *_, buffer=buffer: buffer)
        one = ScanInputs(inputs.gi[step : step + 1], h, inputs.operand, inputs.bias, inputs.grids, quantized=True)
        run = Run.of("dense", one)
        h = run.forward()[0].clone()
        assert torch.equal(h, wanted[step])


def test_refusals_name_the_cause():
    inputs = Case(1, 1, 1, 256).inputs("dense", torch.device("cpu"))
    few = DeviceFacts(processors=15, shared_bytes=232448, capability=(9, 0))
    small = DeviceFacts(processors=132, shared_bytes=16384, capability=(9, 0))
    assert "one program" in (dense.refuses(Case(1, 1, 2, 128).inputs("dense", torch.device("cpu")), H200) or "")
    if not layout.INTERPRETED:
        assert dense.refuses(inputs, H200) is None
        assert "more programs at once" in (dense.refuses(inputs, few) or "")
    assert "more shared memory" in (dense.refuses(inputs, small) or "")
    many = Case(1, 1, 1, 256, quantized=True, groups=32).inputs("dense", torch.device("cpu"))
    assert "groups" in (dense.refuses(many, H200) or "")


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 33, 128, 129, 1000])
@pytest.mark.parametrize("size", [130, 512, 1024, 2000])
def test_no_more_programs_than_processors_wait_for_one_another(monkeypatch, rows, size):
    monkeypatch.setattr(layout, "INTERPRETED", False)
    plan = layout.layout_of(size, 1)
    launch = plan.launch(rows, 1, H200, 2, exact=False)
    assert launch is not None
    assert plan.slices * launch.side_by_side <= H200.processors
    assert launch.batch * launch.tiles >= rows > launch.batch * (launch.tiles - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, states, gradients", [("highest", 2e-5, 2e-5), ("high", 2e-4, 1e-3)])
@pytest.mark.parametrize("case", LARGE)
def test_large_float(case, precision, states, gradients):
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    inputs = case.inputs("dense", device)
    assert dense.refuses(inputs, device_facts(device)) is None
    torch.set_float32_matmul_precision(precision)
    check_against_reference("dense", inputs, states, gradients, precision)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1024, 3, 1, 512, quantized=True),
        Case(40, 128, 1, 512, quantized=True, masked=True, reverse=True),
        Case(16, 32, 1, 1024, quantized=True, groups=16, per_channel=True),
        Case(9, 5, 2, 200, quantized=True, h_scale=0.7 / 127),
        Case(5, 2, 1, 1100, quantized=True),  # integer sums beyond 2**24
    ],
)
def test_large_quantized(case):
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    check_against_reference("dense", case.inputs("dense", device), 0.0, 1e-3)


@pytest.mark.gpu
def test_repeats_give_the_same_bits():
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    run = Run.of("dense", Case(16, 40, 1, 512).inputs("dense", device))
    states, dstates = run.states.clone(), torch.randn_like(run.states)
    first = run.backward(dstates, dstates[0])
    for _ in range(200):
        assert torch.equal(run.forward(), states)
        again = run.backward(dstates, dstates[0])
        assert torch.equal(again.dgi, first.dgi) and torch.equal(again.dh0, first.dh0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_spreads_over_a_block_a_step_later(device, masked, reverse):
    """What a product of codes does by itself, done to the states of kernels whose codes have no NaN."""
    skip_unless_kernels_run(device)
    from gruqat_hf.scan.hopper.dense.strange import spread_nan

    steps, rows, blocks, size = 6, 4, 2, 3
    states, h0 = torch.randn(steps, rows, blocks, size, device=device), torch.randn(rows, blocks, size, device=device)
    mask = torch.rand(steps, rows, device=device) > 0.4 if masked else torch.ones(steps, rows, device=device, dtype=torch.bool)
    order = list(range(steps))[:: -1 if reverse else 1]
    h0[0, 1, 2] = torch.nan
    for begin, row, block, channel in ((0, 0, 1, 2), (2, 1, 0, 1), (5, 2, 1, 0)):
        states[order[begin:], row, block, channel] = torch.nan  # what is NaN stays so
    wanted, before, filled = states.clone(), h0.isnan().any(-1), torch.zeros(rows, blocks, dtype=torch.bool, device=device)
    for t in order:
        filled |= before & mask[t].unsqueeze(1)
        wanted[t] = wanted[t].masked_fill(filled.unsqueeze(-1), torch.nan)
        before |= wanted[t].isnan().any(-1)
    found = states.flatten(2).clone()
    spread_nan(h0.flatten(1), mask.view(torch.uint8) if masked else None, found, size, reverse)
    assert torch.equal(found.nan_to_num(99.0), wanted.flatten(2).nan_to_num(99.0))
