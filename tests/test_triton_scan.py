"""The Triton kernels as a layer meets them, in Triton's interpreter on small shapes; `test_gpu_scan.py` has the real sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from kernel_helpers import Case, Run, check_against_reference, distance, matmul_precision, skip_unless_kernels_run
from scan_helpers import GATE_RECIPES, RECIPES, STRUCTURES, build, check, clip, gradients

from gruqat_hf.layers import GRULayer
from gruqat_hf.operands import DiagonalOperand, Factor
from gruqat_hf.quantization import PRESETS, Grid, QuantizerConfig, QuantRecipe
from gruqat_hf.scan import hopper
from gruqat_hf.scan.triton import RECOMPUTE_VARIABLE, block_diagonal, device
from gruqat_hf.scan.triton.choice import choose
from gruqat_hf.scan.triton.device import INTERPRETED, DeviceFacts

CPU = torch.device("cpu")
KERNEL_TESTS = (
    "test_triton_scan.py",
    "test_triton_dense.py",
    "test_triton_monarch.py",
    "test_two_factor_gradients.py",
    "test_fused_quantizers.py",
    "test_exchange_order.py",
    *("test_input_bias.py", "test_gradient_extremes.py", "test_gates.py"),
)

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in Triton's interpreter, in a process that test_in_the_interpreter starts"
)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter's process itself")
@pytest.mark.parametrize("name", KERNEL_TESTS)
def test_in_the_interpreter(name):
    """Triton reads TRITON_INTERPRET when kernels are defined, so that these tests need a process of their own."""
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", str(tests / name)]
    done = subprocess.run(
        command, cwd=tests.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize("precision, states_within", [("highest", 2e-5), ("high", 2e-4)])
@pytest.mark.parametrize("name", ["diagonal", "blockdiag"])
def test_float(name, precision, states_within):
    layer = build(STRUCTURES[name], None, 24, 5, CPU)
    check(layer, 5, 3, masked=True, precision=precision, states_within=states_within)


@interpreted
@pytest.mark.parametrize("preset", ["int8_state16", "int4_per_group_64"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_presets(name, preset):
    check(build(STRUCTURES[name], preset, 16, 5, CPU), 3, 2)


@interpreted
@pytest.mark.parametrize("name", ["diagonal", "blockdiag"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_with_states_beyond_their_grids(name, recipe):
    check(clip(build(STRUCTURES[name], RECIPES[recipe], 16, 4, CPU, reverse=True)), 4, 3, masked=True)


@interpreted
@pytest.mark.parametrize("name", ["diagonal", "blockdiag", "monarch"])
@pytest.mark.parametrize("recipe", GATE_RECIPES)
def test_grids_of_pre_activations(monkeypatch, name, recipe):
    _stream_in_tiles_of(monkeypatch, 16)
    check(clip(build(STRUCTURES[name], GATE_RECIPES[recipe], 16, 4, CPU, reverse=True)), 3, 2, masked=True)


@interpreted
@pytest.mark.parametrize("name", ["diagonal", "dense"])
def test_grids_of_pre_activations_once_frozen(monkeypatch, name):
    _stream_in_tiles_of(monkeypatch, 16)
    check(clip(build(STRUCTURES[name], GATE_RECIPES["affine"], 11, 4, CPU)).freeze(), 3, 2, precision="high")


@interpreted
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", ["blockdiag", "monarch"])
def test_gates_whose_pre_activations_have_a_grid_computed_again(monkeypatch, name, precision):
    monkeypatch.setenv(RECOMPUTE_VARIABLE, "1")
    _stream_in_tiles_of(monkeypatch, 16)
    check(clip(build(STRUCTURES[name], GATE_RECIPES["channel"], 16, 4, CPU)), 4, 3, masked=True, precision=precision)


@interpreted
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_marks_of_clipped_pre_activations(monkeypatch, precision):
    """Gates at the ends of their ranges, where a mark could be taken for another or for a value."""
    from gruqat_hf.scan.spec import MOST_MARKED

    _stream_in_tiles_of(monkeypatch, 16)
    inputs = Case(4, 3, 1, 16, quantized=True, gates=True).inputs("dense", CPU)
    scale = torch.tensor([[0.02], [0.1], [0.03]])  # sigmoid(12.7) is beyond MOST_MARKED
    assert torch.sigmoid(scale[1] * 127) > MOST_MARKED
    inputs = replace(inputs, gi=inputs.gi * 30, grids=replace(inputs.grids, gates=Grid.build(scale, None, -127, 127)))
    for family, operand in (("block_diagonal", inputs.operand), ("diagonal", None)):
        if operand is None:
            codes = torch.randint(-127, 128, (3, 16)).to(torch.int8)
            inputs = replace(inputs, operand=DiagonalOperand(Factor(codes, torch.full((3, 1), 1 / 127), 127)))
        check_against_reference(family, inputs, 0.0, 1e-3, precision)


@interpreted
@pytest.mark.parametrize(
    "structure, hidden", [({"kind": "diagonal"}, 70), ({"kind": "blockdiag", "nblocks": 3}, 21), ("dense", 1)]
)
def test_odd_sizes_masks_and_the_reversed_direction(structure, hidden):
    check(build(structure, "int8_per_channel", hidden, 3, CPU, reverse=True), 5, 5, masked=True)
    check(build(structure, None, hidden, 3, CPU), 1, 1)


@interpreted
def test_a_diagonal_scan_takes_every_mix_of_quantizers():
    """One product to a value: there is no sum whose order could differ, so that float weights are the reference's bit for bit."""
    check(build(STRUCTURES["diagonal"], "int8_hidden", 8, 4, CPU), 4, 2)
    weight = QuantRecipe(weight_hidden=QuantizerConfig(granularity="channel", observer="dynamic"))
    check(build(STRUCTURES["diagonal"], weight, 8, 4, CPU), 4, 2)


def _let_weights_stream(monkeypatch: pytest.MonkeyPatch, tile: int = 64) -> None:
    for module in ("weights", "backward"):
        module = import_module(f"gruqat_hf.scan.triton.block_diagonal.{module}")
        monkeypatch.setattr(module, "is_resident", lambda *_: False)
    _stream_in_tiles_of(monkeypatch, tile)


def _stream_in_tiles_of(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    for name in ("TILE", "DEPTH"):
        monkeypatch.setattr(import_module("gruqat_hf.scan.triton.streamed.tiles"), name, tile)


@interpreted
@pytest.mark.parametrize("recipe", [None, "int8_state16", RECIPES["groups"], RECIPES["affine"]])
def test_weights_that_stream(monkeypatch, recipe):
    """A block too large for one program's memory, here by decree."""
    _let_weights_stream(monkeypatch, tile=16)
    layer = build({"kind": "blockdiag", "nblocks": 2}, recipe, 40, 4, CPU)
    check(clip(layer), 3, 3, masked=True)
    check(layer, 3, 3, precision="high", states_within=2e-4)


@interpreted
@pytest.mark.parametrize("groups", [2, 3, 12])
def test_groups_of_weights(groups):
    """Two are unrolled, more are looped over."""
    case = Case(5, 3, 2, 24, quantized=True, groups=groups, per_channel=True, masked=True, reverse=True)
    check_against_reference("block_diagonal", case.inputs("dense", CPU), 0.0, 1e-3)


@interpreted
def test_tiny_gradients_stream(monkeypatch):
    """A mean over many values has gradients that half precision does not hold."""
    _let_weights_stream(monkeypatch)
    run = Run.of("block_diagonal", Case(6, 3, 1, 40).inputs("dense", CPU))
    grads = torch.randn_like(run.states), torch.zeros(3, 40)
    whole, tiny = run.backward(*grads), run.backward(grads[0] * 2.0**-40, grads[1])
    assert torch.equal(tiny.dgi * 2.0**40, whole.dgi)


#: A product over values has one side in float: the state, or what lies between two factors.
ONE_SIDED = {
    "hidden": "int8_hidden",
    "weights": replace(PRESETS["int8_state16"], h=None),
    "second": replace(PRESETS["int8_state16"], mid_hidden=None),
}


def check_one_sided(name: str, recipe: QuantRecipe | str, hidden: int, steps: int, rows: int, device: torch.device) -> None:
    """Such sums round by their order, which may turn a code now and then: all else is the reference's."""
    layer = build(STRUCTURES[name], recipe, hidden, 5, device)
    x, h0 = torch.randn(steps, rows, 5, device=device), torch.rand(rows, hidden, device=device) * 2 - 1
    out, last, wanted = gradients(layer, "reference", x, h0, None)
    found_out, found_last, found = gradients(layer, "triton", x, h0, None)
    assert layer.last_path == "triton (forced)"
    with torch.no_grad():
        assert torch.equal(layer(x, h0)[0], found_out)
    assert distance(found_out, out) <= 2e-3 and distance(found_last, last) <= 2e-3
    assert all(distance(found[key], value) <= 1e-2 for key, value in wanted.items() if not key.endswith("scale"))


@interpreted
@pytest.mark.parametrize("recipe", ONE_SIDED)
@pytest.mark.parametrize("name", ["blockdiag", "monarch", "butterfly", "dense"])
def test_products_with_one_side_in_float(name, recipe):
    check_one_sided(name, ONE_SIDED[recipe], 16, 4, 3, CPU)


@interpreted
@pytest.mark.parametrize("name", ["blockdiag", "monarch"])
def test_float_products_whose_pre_activations_have_a_grid(monkeypatch, name):
    _stream_in_tiles_of(monkeypatch, 16)
    check_one_sided(name, QuantRecipe(gates=QuantizerConfig(observer="fixed")), 16, 4, 3, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ONE_SIDED)
@pytest.mark.parametrize("name", ["blockdiag", "monarch", "dense"])
def test_large_products_with_one_side_in_float(name, recipe):
    skip_unless_kernels_run(torch.device("cuda"))
    check_one_sided(name, ONE_SIDED[recipe], 512, 32, 17, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(9, 33, 8, 64, quantized=True, groups=16, masked=True),
        Case(9, 33, 4, 128, quantized=True, groups=2),
        Case(9, 5, 1, 4096, quantized=True),
        Case(9, 33, 1, 2048, quantized=True, groups=32, masked=True, reverse=True),
        Case(9, 3, 1, 2500, quantized=True, groups=10, per_channel=True),
        Case(3, 2100, 1, 520, quantized=True, groups=65),
    ],
)
def test_many_groups_and_blocks_that_stream(case):
    skip_unless_kernels_run(torch.device("cuda"))
    check_against_reference("block_diagonal", case.inputs("dense", torch.device("cuda")), 0.0, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, states, gradients", [("highest", 2e-5, 2e-5), ("high", 2e-4, 1e-3)])
@pytest.mark.parametrize("case", [Case(9, 33, 1, 2500), Case(6, 300, 2, 1300, masked=True, reverse=True)])
def test_float_blocks_that_stream(case, precision, states, gradients):
    skip_unless_kernels_run(torch.device("cuda"))
    inputs = case.inputs("dense", torch.device("cuda"))
    check_against_reference("block_diagonal", inputs, states, gradients, precision)


@pytest.mark.gpu
@pytest.mark.parametrize("structure", [{"kind": "monarch", "nblocks": 4}, {"kind": "monarch", "nblocks": 2, "per_gate": True}])
@pytest.mark.parametrize("recipe", [None, "int8_state16", "int4_per_group_64"])
def test_wide_monarch_layers(structure, recipe):
    skip_unless_kernels_run(torch.device("cuda"))
    layer = build(structure, recipe, 1024, 64, torch.device("cuda"))
    check(layer, 20, 9, masked=True, precision="highest", states_within=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["diagonal", "blockdiag", "monarch", "dense"])
@pytest.mark.parametrize("recipe", GATE_RECIPES)
def test_grids_of_pre_activations_in_wide_layers(name, recipe):
    skip_unless_kernels_run(torch.device("cuda"))
    check(clip(build(STRUCTURES[name], GATE_RECIPES[recipe], 256, 64, torch.device("cuda"))), 20, 9, masked=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, case",
    [
        ("dense", Case(17, 33, 1, 512, quantized=True, gates=True, per_channel=True)),
        ("dense", Case(9, 5, 7, 43, quantized=True, gates=True, masked=True, reverse=True)),
        ("dense", Case(9, 33, 1, 1100, quantized=True, gates=True, groups=2)),
        ("monarch", Case(17, 9, 8, 64, quantized=True, gates=True, per_gate=True, per_channel=True)),
        ("monarch", Case(9, 33, 4, 256, quantized=True, gates=True, masked=True, reverse=True)),
    ],
)
def test_large_grids_of_pre_activations(kind, case):
    skip_unless_kernels_run(torch.device("cuda"))
    family = "block_diagonal" if kind == "dense" else "monarch"
    check_against_reference(family, case.inputs(kind, torch.device("cuda")), 0.0, 1e-3)


@pytest.mark.gpu
def test_repeats_that_stream_give_the_same_bits():
    skip_unless_kernels_run(torch.device("cuda"))
    run = Run.of("block_diagonal", Case(16, 40, 1, 2304, quantized=True).inputs("dense", torch.device("cuda")))
    states, dstates = run.states.clone(), torch.randn_like(run.states)
    first = run.backward(dstates, dstates[0])
    for _ in range(50):
        assert torch.equal(run.forward(), states)
        again = run.backward(dstates, dstates[0])
        assert torch.equal(again.dgi, first.dgi) and torch.equal(again.dh0, first.dh0)


@interpreted
def test_groups_of_the_input_product():
    recipe = PRESETS["int4_per_group_64"]
    check(build(STRUCTURES["diagonal"], recipe, 8, 192, CPU), 2, 3)


@interpreted
@pytest.mark.parametrize("name", ["blockdiag", "monarch"])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_gates_computed_again(monkeypatch, name, recipe):
    monkeypatch.setenv(RECOMPUTE_VARIABLE, "1")
    check(clip(build(STRUCTURES[name], recipe, 16, 4, CPU)), 4, 3, masked=True)


@interpreted
@pytest.mark.parametrize("dtype, within", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ["diagonal", "blockdiag"])
def test_half_precision(name, dtype, within):
    layer = build(STRUCTURES[name], None, 16, 4, CPU)
    x, h0 = torch.randn(5, 3, 4), torch.rand(3, 16)
    out, last, wanted = gradients(layer, "reference", x, h0, None)
    layer.to(dtype)
    found_out, found_last, found = gradients(layer, "triton", x.to(dtype), h0.to(dtype), None)
    assert found_out.dtype == found_last.dtype == dtype
    assert distance(found_out, out) <= within and distance(found_last, last) <= within
    for name, gradient in wanted.items():
        assert found[name].dtype == dtype and distance(found[name], gradient) <= 2 * within, name


@interpreted
@pytest.mark.parametrize(
    "name, recipe",
    [("blockdiag", None), ("blockdiag", "int8_state16"), ("diagonal", None), ("diagonal", GATE_RECIPES["gate"])],
)
def test_compile_and_export(name, recipe):
    layer = build(STRUCTURES[name], recipe, 16, 4, CPU)
    layer.backend = "triton"
    x, h0 = torch.randn(3, 2, 4), torch.rand(2, 16)
    out, last, wanted = gradients(layer, "triton", x, h0, None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.zero_grad()
    found_out, found_last = compiled(x, h0)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator) for value in (found_out, found_last)]
    ((found_out * weights[0]).sum() + (found_last * weights[1]).sum()).backward()
    assert torch.equal(found_out, out) and torch.equal(found_last, last)
    for name, parameter in layer.named_parameters():
        assert distance(parameter.grad, wanted[name]) <= 1e-6, name
    program = torch.export.export(layer, (x, h0))
    assert any("gruqat_hf" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x, h0)[0], out)


@interpreted
def test_a_frozen_layer_gives_the_bits_of_qat():
    layer = build(STRUCTURES["blockdiag"], "int8_state16", 16, 4, CPU)
    layer.backend = "triton"
    x = torch.randn(4, 3, 4)
    with torch.no_grad():
        before = layer(x)[0]
        assert torch.equal(layer.freeze()(x)[0], before)


@interpreted
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_double_precision_is_left_to_the_reference_with_the_reason(structure):
    layer, x = GRULayer(4, 8, structure_hidden=structure, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    layer(x)
    assert not layer.last_path.startswith("triton") and "torch.float64" in layer.last_path
    layer.backend = "triton"
    with pytest.raises(RuntimeError, match=r"torch\.float64"):
        layer(x)


@pytest.mark.parametrize(
    "kind, blocks, family", [("dense", 1, "block_diagonal"), ("dense", 8, "block_diagonal"), ("monarch", 8, "monarch")]
)
def test_grids_of_pre_activations_go_to_kernels_that_take_them(monkeypatch, kind, blocks, family):
    pytest.importorskip("triton")
    monkeypatch.setattr(device, "_refuses_device", lambda *_: None)
    monkeypatch.setattr(device, "_device_facts", lambda *_: DeviceFacts(132, 232448, (9, 0)))
    inputs = Case(2, 2, blocks, 512 // blocks, quantized=True, gates=True).inputs(kind, CPU)
    assert choose(inputs) == (family, "")
    assert "gate pre-activations are quantized" in choose(inputs, hopper._candidates)[1]


@interpreted
def test_exact_products_of_long_rows(monkeypatch):
    """Beyond 2**24, tiles of a sum are added as integers."""
    _let_weights_stream(monkeypatch)
    from gruqat_hf.operands import BlockDiagonalOperand, Factor
    from gruqat_hf.quantization import Grid
    from gruqat_hf.scan import ScanGrids, ScanInputs, scan_reference
    from gruqat_hf.scan.triton.ops import scan
    from gruqat_hf.scan.triton.precision import spec_of

    hidden = 1100
    codes = torch.randint(120, 128, (3, 1, hidden, hidden)).to(torch.int8)
    grid = Grid.build(torch.full((1,), 1 / 127), None, -127, 127)
    operand = BlockDiagonalOperand(Factor(codes, torch.full((3, 1, hidden, 1), 1e-5), 127))
    inputs = ScanInputs(
        torch.randn(1, 1, 3, hidden), torch.rand(1, hidden) * 0.2 + 0.8, operand, None, ScanGrids(h=grid), quantized=True
    )
    with torch.no_grad(), matmul_precision("highest"):
        states, _ = scan(inputs, spec_of(inputs), "block_diagonal")
        assert torch.equal(states, scan_reference(inputs)[0])


def test_no_import_needs_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from gruqat_hf.layers import GRULayer
layer = GRULayer(3, 4)
layer(torch.randn(2, 1, 3))
assert "triton is not installed" in layer.last_path, layer.last_path
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_blocks_are_kept_where_they_fit():
    hopper, turing = DeviceFacts(132, 232448, (9, 0)), DeviceFacts(40, 65536, (7, 5))
    assert block_diagonal.is_resident(128, False, hopper) and not block_diagonal.is_resident(129, False, hopper)
    assert block_diagonal.is_resident(64, True, hopper) and not block_diagonal.is_resident(128, True, hopper)
    assert block_diagonal.is_resident(64, False, turing) and not block_diagonal.is_resident(128, False, turing)
    assert block_diagonal.tiling(128, False, True, hopper) == (1, 4)
    assert not block_diagonal.is_resident(64, False, DeviceFacts(16, 49152, (7, 5)))  # its dots are of fp32 weights


@interpreted
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("masked, reverse", [(False, False), (True, True)])
@pytest.mark.parametrize("steps", [12, 13, 16])
def test_diagonal_gradients_by_chunks_of_steps(monkeypatch, steps, masked, reverse, recipe):
    """As where there are few rows for a GPU."""
    module, cut = import_module("gruqat_hf.scan.triton.diagonal.backward"), []
    monkeypatch.setattr(module, "_CHUNK", 4)
    run = module.KernelCall.run
    monkeypatch.setattr(module.KernelCall, "run", lambda call: (cut.append(call.constants.get("ONLY_MAPS")), run(call)))
    check(build({"kind": "diagonal"}, recipe, 12, 5, CPU, reverse=reverse), steps, 1, masked=masked)
    assert True in cut


@interpreted
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_nan_of_an_input_reaches_all_states_of_its_row(structure):
    """Codes are integers, of which none means NaN."""
    layer = build({"kind": structure}, "int8_state16", 8, 5, CPU)
    x = torch.randn(4, 3, 5)
    x[1, 2, 3] = torch.nan
    found = {}
    for backend in ("reference", "triton"):
        layer.backend = backend
        with torch.no_grad():
            inferred = layer(x)[0]
        found[backend] = torch.stack([inferred, layer(x)[0].detach()])
    assert torch.equal(found["reference"].isnan(), found["triton"].isnan()) and found["triton"][:, 1:, 2].isnan().all()
    assert torch.equal(found["reference"].nan_to_num(9.0), found["triton"].nan_to_num(9.0))
