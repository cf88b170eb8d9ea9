"""The compiled CPU kernels against the reference: the same bits where quantized, and nn.GRU's values in float."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
from dataclasses import replace

import pytest
import torch
from cpu_helpers import RECIPES, SHAPES, STRUCTURES, build_layer, fitting, inputs_for, needs_kernels, run, same
from torch import Tensor, nn

from gruqat_hf.layers import GRUCell, GRULayer, GRUStack
from gruqat_hf.quantization import PRESETS, QuantizerConfig
from gruqat_hf.scan import BACKENDS
from gruqat_hf.scan.cpu import plan

pytestmark = needs_kernels

_AFFINE = QuantizerConfig(symmetric=False, observer="ema")


def test_is_in_the_table_before_the_reference():
    names = [backend.name for backend in BACKENDS]
    assert names.index("cpu") < names.index("reference")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_gives_the_bits_of_the_reference(structure, recipe):
    for steps, rows, size, reverse, masked, with_h0 in SHAPES:
        hidden = fitting(structure, size)
        layer = build_layer(structure, hidden, RECIPES[recipe], bias=size != 24, reverse=reverse)
        inputs = inputs_for(steps, rows, hidden, hidden, masked, with_h0)
        assert same(run(layer, "cpu", *inputs), run(layer, "reference", *inputs))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_qat_in_eval_mode_gives_the_bits_of_the_reference(structure):
    layer = GRULayer(20, 32, structure_hidden=STRUCTURES[structure], recipe="int8_state16")
    layer(torch.randn(5, 3, 20))
    layer.eval()
    inputs = inputs_for(6, 4, 20, 32, True, True)
    assert same(run(layer, "cpu", *inputs), run(layer, "reference", *inputs))


@pytest.mark.parametrize("hidden, inputs", [(1, 1), (3, 5), (17, 33), (40, 7)])
def test_odd_sizes(hidden, inputs):
    for recipe in (None, "int8_state16"):
        layer = GRULayer(inputs, hidden, recipe=recipe).eval()
        if recipe is not None:
            layer.calibrate([torch.randn(6, 3, inputs)], progress=False).freeze()
        arguments = inputs_for(5, 19, inputs, hidden, True, True)
        got, expected = run(layer, "cpu", *arguments), run(layer, "reference", *arguments)
        assert same(got, expected) if recipe else torch.allclose(got[0], expected[0], atol=1e-5, rtol=0)


def test_long_sums_of_affine_codes_are_exact():
    recipe = replace(PRESETS["int8_state16"], x=_AFFINE, name=None)
    layer = GRULayer(1500, 16, recipe=recipe).eval().calibrate([torch.rand(4, 3, 1500)], progress=False).freeze()
    x = torch.rand(4, 3, 1500) * 2
    assert same(run(layer, "cpu", x), run(layer, "reference", x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float_agrees_with_torch(structure):
    for steps, rows, hidden, with_h0 in ((5, 3, 32, True), (1, 1, 64, False), (40, 9, 32, True)):
        layer = build_layer(structure, hidden)
        x, h0, _ = inputs_for(steps, rows, hidden, hidden, False, with_h0)
        with torch.no_grad():
            expected, last = layer.to_torch()(x, None if h0 is None else h0.unsqueeze(0))
        out, h = run(layer, "cpu", x, h0)
        assert (out - expected).abs().max() < 1e-5 and (h - last[0]).abs().max() < 1e-5


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("reverse", [False, True])
def test_float_with_a_mask_agrees_with_the_reference(structure, reverse):
    layer = build_layer(structure, 32, reverse=reverse)
    inputs = inputs_for(9, 5, 32, 32, True, True)
    for got, expected in zip(run(layer, "cpu", *inputs), run(layer, "reference", *inputs)):
        assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("structure", ["dense", "blockdiag", "monarch", "diagonal"])
def test_splits_of_batch_and_sequence_change_nothing(structure):
    layer = build_layer(structure, 32, "int8_state16")
    x = torch.randn(150, 5, 32)
    out, last = run(layer, "cpu", x)
    rows = torch.cat([run(layer, "cpu", x[:, i : i + 1])[0] for i in range(5)], dim=1)
    h, steps = None, []
    for part in x.split(7):
        chunk, h = run(layer, "cpu", part, h)
        steps.append(chunk)
    assert torch.equal(rows, out) and torch.equal(torch.cat(steps), out) and torch.equal(h, last)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(threads):
    for structure, batch in (("dense", 1), ("dense", 2), ("dense", 17), ("monarch", 17)):
        layer = GRULayer(256, 128, structure_hidden=STRUCTURES[structure], recipe="int8_state16").eval()
        layer.calibrate([torch.randn(4, 2, 256)], progress=False).freeze()
        x = torch.randn(80, batch, 256)
        torch.set_num_threads(1)
        one = run(layer, "cpu", x)
        torch.set_num_threads(threads)
        assert same(run(layer, "cpu", x), one)


@pytest.mark.parametrize("recipe, hidden", [(None, 307), ("int8_state16", 600)])
def test_large_weights_are_shared_out_between_threads(recipe, hidden):
    layer = GRULayer(24, hidden, recipe=recipe).eval()
    if recipe is not None:
        layer.calibrate([torch.randn(4, 2, 24)], progress=False).freeze()
    for steps, rows, reverse, masked in ((1, 1, False, False), (9, 3, True, True), (3, 20, False, False)):
        layer.reverse = reverse
        inputs = inputs_for(steps, rows, 24, hidden, masked, True)
        torch.set_num_threads(1)
        one = run(layer, "cpu", *inputs)
        torch.set_num_threads(3)
        assert same(run(layer, "cpu", *inputs), one)
        for got, expected in zip(one, run(layer, "reference", *inputs)):
            assert torch.equal(got, expected) if recipe else torch.allclose(got, expected, atol=1e-5, rtol=0)


def test_inputs_need_not_be_contiguous():
    layer = build_layer("blockdiag", 32, "int8_state16", batch_first=True)
    wide = torch.randn(4, 9, 64)
    for x in (wide[:, :, :32], wide[:, ::2, :32], wide[:, :, ::2], wide[:, :, :32].half()):
        mask = torch.rand(x.shape[0], x.shape[1]) > 0.3
        assert same(run(layer, "cpu", x, None, mask), run(layer, "reference", x.contiguous(), None, mask.clone()))


def test_a_default_dtype_of_float64_changes_nothing():
    layer = build_layer("monarch", 32, "int8_state16")
    x = torch.randn(5, 3, 32)
    expected = run(layer, "cpu", x)
    torch.set_default_dtype(torch.float64)
    layer._cached_plan = None
    assert same(run(layer, "cpu", x), expected)


def test_large_dense_float_layers_run_on_torch():
    layer = GRULayer(8, 16).eval()
    x = torch.randn(4, 100, 8)
    h0 = torch.rand(100, 16)
    for reverse in (False, True):
        layer.reverse = reverse
        out, last = run(layer, "cpu", x, h0)
        expected, expected_last = run(layer, "reference", x, h0)
        assert (out - expected).abs().max() < 1e-5 and (last - expected_last).abs().max() < 1e-5


def test_cell_and_stack_run_on_it():
    cell = GRUCell(12, 16, recipe="int8_state16").eval().calibrate([torch.randn(4, 12)], progress=False).freeze()
    x, h = torch.randn(3, 12), torch.rand(3, 16)
    with torch.no_grad():
        got = cell(x, h)
        cell.backend = "reference"
        assert torch.equal(got, cell(x, h))
    stack = GRUStack(12, 16, 2, bidirectional=True, recipe="int8_per_channel").eval()
    stack.calibrate([torch.randn(5, 3, 12)], progress=False).freeze()
    x, mask = torch.randn(7, 3, 12), torch.rand(7, 3) > 0.3
    results = []
    for backend in ("cpu", "reference"):
        for layer in stack.flat_layers():
            layer.backend = backend
        with torch.no_grad():
            results.append(stack(x, None, mask))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("where", ["x", "h0", "infinity"])
def test_nan_goes_where_the_reference_lets_it_go(structure, where):
    layer = build_layer(structure, 32, "int8_state16")
    x, h0, mask = inputs_for(4, 9, 32, 32, True, True)
    mask[2, 4] = True
    if where == "x":
        x[2, 4, 13] = torch.nan
    elif where == "h0":
        h0[3, 21] = torch.nan
    else:
        x[1, 2, 5], x[2, 8, 30], h0[0, 1] = torch.inf, -torch.inf, torch.inf
    expected = run(layer, "reference", x, h0, mask)
    assert same(run(layer, "cpu", x, h0, mask), expected)
    assert expected[0].isnan().any() == (where != "infinity")


def test_nan_weights_and_scales_in_qat():
    for structure in ("blockdiag", "monarch", "diagonal"):
        layer = GRULayer(32, 32, structure_hidden=STRUCTURES[structure], recipe="int8_state16")
        layer(torch.randn(3, 2, 32))
        layer.eval()
        with torch.no_grad():
            next(layer.weight_hidden.parameters()).flatten()[5] = torch.nan
        x = torch.randn(4, 3, 32)
        assert same(run(layer, "cpu", x), run(layer, "reference", x))


CHANGES = {
    "in place": lambda layer: layer.bias_hidden.data_ptr() and layer.bias_hidden.add_(0.5),
    "replaced": lambda layer: setattr(layer, "bias_hidden", nn.Parameter(layer.bias_hidden + 0.5)),
    "data replaced": lambda layer: setattr(layer.bias_hidden, "data", layer.bias_hidden + 0.5),
    "codes": lambda layer: layer.weight_hidden.blocks_codes.neg_(),
    "weight scale": lambda layer: layer.weight_input.blocks_scale.mul_(2.0),
    "grid": lambda layer: layer.h.scale.mul_(0.5),
    "loaded": lambda layer: layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()}),
    "submodule": lambda layer: setattr(layer, "state", copy.deepcopy(layer.state)) or layer.state.scale.mul_(8.0),
    "dropped": lambda layer: setattr(layer, "state", None),
    "dequantized": lambda layer: layer.dequantize(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("made_in", ["ordinary", "inference"])
def test_a_change_to_the_layer_is_seen(change, made_in):
    with torch.inference_mode(made_in == "inference"):
        layer = build_layer("dense", 32, "int8_state16")
        x = torch.randn(5, 3, 32)
        before, again = run(layer, "cpu", x), run(layer, "cpu", x)
        assert same(before, again)
        with torch.no_grad():
            CHANGES[change](layer)
        after = run(layer, "cpu", x)
        expected = run(layer, "reference", x)
    assert not same(before, after)
    assert same(after, expected) if layer.recipe is not None else torch.allclose(after[0], expected[0], atol=1e-5, rtol=0)


def test_a_frozen_layer_holds_no_float_copy_of_its_weights():
    layer = GRULayer(256, 256, structure_hidden={"kind": "blockdiag", "nblocks": 2}, recipe="int8_state16").eval()
    layer.calibrate([torch.randn(2, 1, 256)], progress=False)
    with torch.no_grad():
        layer(torch.randn(2, 1, 256))
        layer.freeze()
        assert layer._cached_plan is None
        layer(torch.randn(2, 1, 256))
    prepared = layer._cached_plan.plan
    assert isinstance(prepared, plan.KernelPlan)
    kept = prepared._pack._kept
    floats, integers = (sum(t.numel() for t in kept if t.is_floating_point() == wanted) for wanted in (True, False))
    assert floats < 0.05 * integers


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_an_input_grid_taken_from_each_call_is_part_of_the_plan(structure):
    layer = build_layer(structure, 32, "int8_dynamic")
    for scale in (1.0, 30.0):
        x, h0, mask = inputs_for(5, 3, 32, 32, True, True)
        assert same(run(layer, "cpu", x * scale, h0, mask), run(layer, "reference", x * scale, h0, mask))
        run(layer, "cpu", x)
        assert isinstance(layer._cached_plan.plan, plan.DynamicPlan)


def test_mixed_recipes_go_to_the_reference_and_say_why():
    layer = GRULayer(8, 16, recipe="int8_hidden").eval()
    with torch.no_grad():
        layer(torch.randn(3, 2, 8))
    assert layer.last_path.startswith("reference") and "not the weights" in layer.last_path
    layer.backend = "cpu"
    with pytest.raises(RuntimeError, match="'cpu' was forced, but cannot"), torch.no_grad():
        layer(torch.randn(3, 2, 8))


def test_other_dtypes_go_to_the_reference_and_autocast_makes_no_plan():
    layer = GRULayer(8, 16, dtype=torch.float64).eval()
    with torch.no_grad():
        layer(torch.randn(3, 2, 8, dtype=torch.float64))
        assert layer.last_path.startswith("reference")
        layer = GRULayer(8, 16).eval()
        layer(torch.randn(3, 2, 8))
        assert layer.last_path.startswith("cpu") and layer._cached_plan.plan is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(torch.randn(3, 2, 8))
        assert layer._cached_plan.plan is None


def test_python_threads_share_a_layer():
    layer = build_layer("monarch", 32, "int8_state16")
    xs = [torch.randn(20, 1 + i, 32) for i in range(6)]
    expected = [run(layer, "reference", x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if not same(layer(xs[i]), expected[i]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _in_child(layer: GRULayer, x: Tensor, answer) -> None:
    with torch.inference_mode():
        answer.put(layer(x)[0].numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("prepared", [False, True])
def test_forked_children_run_it(recipe, prepared):
    torch.set_num_threads(2)
    layer = build_layer("dense", 128, recipe)
    x = torch.randn(80, 8, 128)
    torch.randn(300, 300) @ torch.randn(300, 300)  # the parent's threads run, and the child will not have them
    if prepared:
        run(layer, "cpu", x)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_in_child, args=(layer, x, answer))
    child.start()
    try:
        got = torch.from_numpy(answer.get(timeout=30))
    finally:
        child.kill()
        child.join()
    expected = run(layer, "reference", x)[0]
    assert torch.equal(got, expected) if recipe else torch.allclose(got, expected, atol=1e-5, rtol=0)
