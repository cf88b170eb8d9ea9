"""Kernels for two-factor operands: against the reference, on the CPU in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from kernel_helpers import Case, Run, check_against_reference, distance, matmul_precision, skip_unless_kernels_run

from gruqat_hf.operands import Factor, MonarchOperand
from gruqat_hf.scan import ScanInputs, run_scan, scan_reference
from gruqat_hf.scan.triton import monarch
from gruqat_hf.scan.triton.device import DeviceFacts, device_facts
from gruqat_hf.scan.triton.monarch import layout
from gruqat_hf.scan.triton.precision import spec_of

H200 = DeviceFacts(processors=132, shared_bytes=232448, capability=(9, 0))

SMALL = [
    Case(4, 3, 2, 6),
    Case(1, 1, 1, 3),
    Case(3, 1, 3, 4, per_gate=True, masked=True, reverse=True),
    Case(3, 2, 4, 8, per_gate=True, second=(8, 4)),
    Case(3, 9, 3, 5, masked=True, bias=False),
]
QUANTIZED = [
    Case(5, 3, 4, 8, quantized=True),
    Case(4, 2, 4, 8, quantized=True, second=(8, 4), per_gate=True, groups=2, per_channel=True, masked=True, reverse=True),
    Case(3, 2, 8, 4, quantized=True, groups=2, h_scale=0.7 / 127),
    Case(3, 9, 6, 2, quantized=True, second=(4, 3)),
]
LARGE = [
    Case(64, 32, 8, 64),
    Case(32, 5, 16, 32, per_gate=True, second=(32, 16), masked=True, reverse=True),
    Case(9, 200, 8, 64),
    Case(16, 17, 8, 128),
    Case(8, 3, 3, 30, masked=True),
    Case(8, 3, 32, 32, per_gate=True),
    Case(3, 1000, 8, 128),
]


@pytest.mark.parametrize("precision, states, gradients", [("highest", 2e-6, 2e-6), ("high", 2e-4, 1e-3)])
@pytest.mark.parametrize("case", SMALL)
def test_float_agrees_with_the_reference(device, case, precision, states, gradients):
    skip_unless_kernels_run(device)
    check_against_reference("monarch", case.inputs("monarch", device), states, gradients, precision)


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_states_are_those_of_the_reference_bit_for_bit(device, case):
    skip_unless_kernels_run(device)
    check_against_reference("monarch", case.inputs("monarch", device), 0.0, 1e-3)


@pytest.mark.parametrize("dtype, within", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_half_precision_inputs(device, dtype, within):
    skip_unless_kernels_run(device)
    check_against_reference("monarch", Case(4, 3, 3, 5, dtype=dtype).inputs("monarch", device), within, within)


def _as_many_programs(monkeypatch, *modules):
    """Several programs a scan, in the interpreter, which runs them one after another: none may wait."""
    monkeypatch.setattr(layout, "INTERPRETED", False)
    monkeypatch.setattr(layout, "_CHANNELS", 16)
    for module in modules:
        monkeypatch.setattr(module, "device_facts", lambda _: H200)
        monkeypatch.setattr(module, "new_counters", lambda groups, _: torch.full((groups * 32,), 1 << 30, dtype=torch.int32))


@pytest.mark.parametrize(
    "case", [Case(3, 3, 4, 8, quantized=True), Case(3, 2, 4, 8, quantized=True, second=(8, 4), per_gate=True)]
)
def test_slices_make_up_the_whole(device, monkeypatch, case):
    """Single steps, run twice over one exchange buffer, which the first run fills for the second to read."""
    skip_unless_kernels_run(device)
    if device.type == "cuda":
        pytest.skip("stands in for programs side by side, which test_large_quantized has on a GPU")
    inputs = case.inputs("monarch", device)
    h0, gates = inputs.h0, inputs.operand.factors["first"].values.shape[0]
    whole, grads = [], []
    for step in range(case.steps):
        one = ScanInputs(inputs.gi[step : step + 1], h0, inputs.operand, inputs.bias, inputs.grids, quantized=True)
        run = Run.of("monarch", one)
        dlast = torch.randn_like(h0)
        whole.append((one, run.states, dlast))
        grads.append(run.backward(torch.zeros_like(run.states), dlast))
        h0 = run.states[0]

    forward, backward = run.module("forward"), run.module("backward")
    _as_many_programs(monkeypatch, forward, backward)
    for (one, states, dlast), grad in zip(whole, grads):
        buffers = {
            forward: torch.empty(2, case.rows, 32, dtype=torch.float16),
            backward: torch.empty(2, case.rows, gates, 32),
        }
        for module, buffer in buffers.items():
            monkeypatch.setattr(module, "new_exchange", lambda *_, buffer=buffer: buffer)
        run = Run.of("monarch", one)
        assert run.module("forward").prepare(run.spec).layout.slices > 1
        assert torch.equal(run.forward(), states)
        run.backward(torch.zeros_like(states), dlast)
        found = run.backward(torch.zeros_like(states), dlast)
        assert distance(found.dgi, grad.dgi) <= 1e-6
        assert distance(found.dh0, grad.dh0) <= 1e-6


def test_refusals_name_the_cause():
    cpu = torch.device("cpu")
    few = DeviceFacts(processors=1, shared_bytes=232448, capability=(9, 0))
    small = DeviceFacts(processors=132, shared_bytes=8192, capability=(9, 0))
    inputs = Case(1, 1, 4, 32).inputs("monarch", cpu)
    assert "beyond 128 channels" in (monarch.refuses(Case(1, 1, 2, 200).inputs("monarch", cpu), H200) or "")
    for facts in (H200, few, small):
        assert monarch.refuses(Case(1, 1, 2, 200, quantized=True).inputs("monarch", cpu), facts) is None
    assert "more shared memory" in (monarch.refuses(inputs, small) or "")
    if not layout.INTERPRETED:
        assert monarch.refuses(inputs, H200) is None
        assert "more programs at once" in (monarch.refuses(inputs, few) or "")


def test_float_factors_too_large_for_these_kernels_are_multiplied_out(device, monkeypatch):
    skip_unless_kernels_run(device)
    monkeypatch.setattr(monarch, "_MOST_POSITIONS", 4)
    inputs = Case(3, 2, 3, 4, per_gate=True).inputs("monarch", device)
    leaves = [factor.values.clone().requires_grad_() for factor in inputs.operand.factors.values()]
    inputs = replace(inputs, operand=MonarchOperand(*(Factor(leaf) for leaf in leaves)))
    with matmul_precision("highest"):
        found, _, told = run_scan(inputs, "triton")
        wanted, _ = scan_reference(inputs)
        assert told == "triton (forced)"
        assert distance(found, wanted) <= 2e-6
        dstates = torch.randn_like(wanted)
        for one, other in zip(torch.autograd.grad(found, leaves, dstates), torch.autograd.grad(wanted, leaves, dstates)):
            assert distance(one, other) <= 2e-6


def _rectangular(case: Case, device: torch.device, mid: int, blocks: tuple[int, int] = (2, 3)) -> ScanInputs:
    """``mid`` values between factors of as many blocks; ``case.groups`` goes for both."""
    inputs, (first, second) = case.inputs("monarch", device), blocks
    hidden = inputs.h0.shape[1]

    def factor(*shape: int) -> Factor:
        codes = torch.randint(-127, 128, shape, device=device).to(torch.int8)
        scale = (torch.rand(*shape[:-1], case.groups, device=device) + 0.5) * shape[-1] ** -0.5 / 127
        return Factor(codes, scale, 127)

    one = factor(3 if case.per_gate else 1, first, mid // first, hidden // first)
    return replace(inputs, operand=MonarchOperand(one, factor(3, second, hidden // second, mid // second)))


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 3, 3, 6, quantized=True),
        Case(3, 17, 2, 20, quantized=True, second=(2, 20), masked=True, reverse=True, bias=False),
        Case(3, 2, 4, 8, quantized=True, second=(8, 4), per_gate=True, groups=4, per_channel=True, masked=True),
        Case(3, 2, 2, 36, quantized=True, groups=2, h_scale=0.7 / 127),
        Case(1, 1, 1, 5, quantized=True),
    ],
)
def test_weights_that_stream(device, monkeypatch, case):
    """Tiles too large for one program, here by decree; small ones make many of a factor."""
    skip_unless_kernels_run(device)
    monkeypatch.setattr(monarch, "_MOST_POSITIONS", 0)
    inputs = case.inputs("monarch", device)
    streamed = import_module("gruqat_hf.scan.triton.streamed.tiles")
    assert isinstance(Run.of("monarch", inputs).module("forward").prepare(spec_of(inputs)), streamed.StreamedWeights)
    for name in ("TILE", "DEPTH"):
        monkeypatch.setattr(streamed, name, 16)
    check_against_reference("monarch", inputs, 0.0, 1e-3)


@pytest.mark.parametrize("case, mid", [(Case(3, 2, 2, 18, quantized=True), 24), (Case(3, 3, 4, 9, True, 2, per_gate=True), 12)])
def test_factors_that_are_not_square(device, case, mid):
    skip_unless_kernels_run(device)
    check_against_reference("monarch", _rectangular(case, device, mid), 0.0, 1e-3)


def test_streamed_slices_make_up_the_whole(device, monkeypatch):
    """As in :func:`test_slices_make_up_the_whole`; three rounds, for mid values and states to pass from program to program."""
    skip_unless_kernels_run(device)
    if device.type == "cuda":
        pytest.skip("stands in for programs side by side, which test_large_quantized has on a GPU")
    monkeypatch.setattr(monarch, "_MOST_POSITIONS", 0)
    for name in ("TILE", "DEPTH"):
        monkeypatch.setattr(import_module("gruqat_hf.scan.triton.streamed.tiles"), name, 16)
    inputs = Case(1, 3, 2, 40, quantized=True).inputs("monarch", device)
    whole = Run.of("monarch", inputs)
    dlast = torch.randn_like(inputs.h0)
    grad = whole.backward(torch.zeros_like(whole.states), dlast)

    directions = [import_module(f"gruqat_hf.scan.triton.streamed.{name}") for name in ("forward", "backward")]
    for module in directions:
        monkeypatch.setattr(module, "device_facts", lambda _: DeviceFacts(4, 1 << 16, (9, 0)))
        monkeypatch.setattr(module, "new_counters", lambda groups, _: torch.full((groups * 32,), 1 << 30, dtype=torch.int32))
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    call = directions[0].KernelCall

    def keep(**arguments):
        """Scratch tensors that a launch leaves for the next."""
        assert arguments["grid"].slices > 1
        static = arguments["static"]
        scratch = [
            kept.setdefault((i, value.numel()), value) if i < 2 and torch.is_tensor(value) else value
            for i, value in enumerate(static)
        ]
        return call(**{**arguments, "static": tuple(scratch)})

    for module in directions:
        monkeypatch.setattr(module, "KernelCall", keep)
    for _ in range(3):
        states = whole.forward()
    assert torch.equal(states, Run.of("monarch", inputs).states)
    with torch.no_grad():
        assert torch.equal(states, scan_reference(inputs)[0])
    for _ in range(3):
        found = whole.backward(torch.zeros_like(states), dlast)
    assert distance(found.dgi, grad.dgi) <= 1e-6


@pytest.mark.parametrize("rows", [1, 16, 17, 400, 2048, 5000])
@pytest.mark.parametrize("processors", [1, 30, 132])
@pytest.mark.parametrize("tasks, blocks", [(1, 1), (16, 1), (64, 4), (300, 1)])
def test_streaming_programs_that_wait_fit_the_device(rows, processors, tasks, blocks):
    pytest.importorskip("triton")
    programs = import_module("gruqat_hf.scan.triton.streamed.tiles").plan_programs(
        tasks, blocks, rows, DeviceFacts(processors, 1 << 16, (7, 5))
    )
    assert programs.slices == 1 or programs.slices * programs.blocks * programs.tiles <= processors
    assert 1 <= programs.slices <= tasks and programs.tiles * 16 >= rows


@pytest.mark.gpu
@pytest.mark.parametrize("precision, states, gradients", [("highest", 2e-5, 2e-5), ("high", 2e-4, 1e-3)])
@pytest.mark.parametrize("case", LARGE)
def test_large_float(case, precision, states, gradients):
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    inputs = case.inputs("monarch", device)
    assert monarch.refuses(inputs, device_facts(device)) is None
    check_against_reference("monarch", inputs, states, gradients, precision)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1024, 3, 8, 64, quantized=True),
        Case(40, 150, 8, 64, quantized=True, masked=True, reverse=True, per_channel=True),
        Case(64, 32, 16, 32, quantized=True, per_gate=True, second=(32, 16)),
        Case(16, 9, 8, 128, quantized=True, groups=2),
        Case(16, 9, 8, 64, quantized=True, groups=16),
        Case(16, 33, 4, 256, quantized=True),
        Case(9, 5, 2, 512, quantized=True, masked=True, reverse=True),
        Case(5, 3, 3, 1000, quantized=True, groups=8, per_gate=True),
        Case(5, 2100, 4, 256, quantized=True),
        Case(9, 5, 5, 24, quantized=True, groups=3, h_scale=0.7 / 127),
    ],
)
def test_large_quantized(case):
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    check_against_reference("monarch", case.inputs("monarch", device), 0.0, 1e-3)


@pytest.mark.gpu
def test_repeats_give_the_same_bits():
    device = torch.device("cuda")
    skip_unless_kernels_run(device)
    run = Run.of("monarch", Case(16, 40, 16, 32, per_gate=True, second=(32, 16)).inputs("monarch", device))
    states, dstates = run.states.clone(), torch.randn_like(run.states)
    first = run.backward(dstates, dstates[0])
    for _ in range(200):
        assert torch.equal(run.forward(), states)
        again = run.backward(dstates, dstates[0])
        assert torch.equal(again.dgi, first.dgi) and torch.equal(again.dh0, first.dh0)
