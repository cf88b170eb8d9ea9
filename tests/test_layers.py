"""GRUCell, GRULayer and GRUStack: parity with torch.nn.GRU, masks, lifecycle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gruqat_hf.layers import GRUCell, GRULayer, GRUStack, LifecycleError, QuantState
from gruqat_hf.quantization import PRESETS, QuantizerConfig, QuantRecipe

KINDS = ["dense", "diagonal", "blockdiag", "monarch", "butterfly", "circulant", "ldr"]


def stack_from(gru: nn.GRU) -> GRUStack:
    stack = GRUStack(
        gru.input_size, gru.hidden_size, gru.num_layers, bidirectional=gru.bidirectional, bias=gru.bias, dropout=gru.dropout
    )
    for index, directions in enumerate(stack.layers):
        for direction in range(len(directions)):
            directions[direction] = GRULayer.from_torch(gru, index, reverse=direction == 1)
    return stack


def assert_same_gradients(stack: GRUStack, gru: nn.GRU) -> None:
    for index, directions in enumerate(stack.layers):
        for direction, layer in enumerate(directions):
            suffix = f"l{index}" + ("_reverse" if direction else "")
            for ours, theirs in (
                (layer.weight_input.structure.weight.grad.flatten(0, 2), f"weight_ih_{suffix}"),
                (layer.weight_hidden.structure.weight.grad.flatten(0, 2), f"weight_hh_{suffix}"),
                (layer.bias_input.grad if gru.bias else None, f"bias_ih_{suffix}"),
                (layer.bias_hidden.grad if gru.bias else None, f"bias_hh_{suffix}"),
            ):
                if ours is not None:
                    torch.testing.assert_close(ours, getattr(gru, theirs).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hidden", [1, 5, 16])
@pytest.mark.parametrize(
    ("layers", "bidirectional", "bias"), [(1, False, True), (2, True, True), (3, False, False), (1, True, False)]
)
def test_float_dense_is_nn_gru(steps, batch, hidden, layers, bidirectional, bias):
    gru = nn.GRU(4, hidden, layers, bias=bias, bidirectional=bidirectional)
    stack = stack_from(gru)
    x = torch.randn(steps, batch, 4)
    h0 = torch.randn(layers * (2 if bidirectional else 1), batch, hidden)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    hs = [h0.clone().requires_grad_() for _ in range(2)]
    out, last, hidden_states = stack(xs[0], hs[0])
    their_out, their_last = gru(xs[1], hs[1])
    torch.testing.assert_close(out, their_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, their_last, rtol=0, atol=1e-5)
    assert len(hidden_states) == layers + 1 and hidden_states[-1] is out
    weights = torch.randn_like(out), torch.randn_like(last)
    for o, h in ((out, last), (their_out, their_last)):
        ((o * weights[0]).sum() + (h * weights[1]).sum()).backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hs[0].grad, hs[1].grad, rtol=1e-4, atol=1e-4)
    assert_same_gradients(stack, gru)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_right_padding_is_nn_gru_with_packed_sequences(bidirectional):
    gru = nn.GRU(4, 6, 2, bidirectional=bidirectional)
    stack = stack_from(gru)
    lengths = torch.tensor([7, 1, 4])
    x = torch.randn(7, 3, 4)
    mask = torch.arange(7)[:, None] < lengths
    out, last, _ = stack(x, mask=mask)
    packed_out, their_last = gru(pack_padded_sequence(x, lengths, enforce_sorted=False))
    their_out, _ = pad_packed_sequence(packed_out, total_length=7)
    torch.testing.assert_close(out, their_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, their_last, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_left_padding_and_what_padding_holds_do_not_matter(recipe, bidirectional):
    stack = GRUStack(4, 8, 2, bidirectional=bidirectional)
    x = torch.randn(5, 1, 4)
    if recipe:
        stack.prepare_qat(recipe).calibrate([x], progress=False).freeze()
    padded = torch.cat([torch.full((3, 1, 4), 1e3), x])
    mask = torch.arange(8)[:, None] >= 3
    with torch.no_grad():
        out, last, _ = stack(x)
        padded_out, padded_last, _ = stack(padded, mask=mask)
    assert torch.equal(padded_out[:3], torch.zeros_like(padded_out[:3]))
    if recipe:
        assert torch.equal(padded_out[3:], out) and torch.equal(padded_last, last)
    else:
        torch.testing.assert_close(padded_out[3:], out)
        torch.testing.assert_close(padded_last, last)


def test_padding_is_not_observed():
    layer = GRULayer(4, 8, recipe="int8_state16").train()
    x = torch.randn(5, 2, 4)
    x[3:, 1] = 1e3
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[3:, 1] = False
    layer(x, mask=mask)
    assert layer.x.scale.item() * 127 == pytest.approx(x[mask].abs().max().item())
    with torch.no_grad():  # a batch of nothing but padding observes nothing and fails at nothing
        layer(x, mask=torch.zeros_like(mask))


def test_batch_first():
    layer = GRULayer(4, 6)
    other = GRULayer(4, 6, batch_first=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4)
    mask = torch.rand(5, 3) > 0.3
    out, last = layer(x, mask=mask)
    other_out, other_last = other(x.transpose(0, 1), mask=mask.transpose(0, 1))
    assert torch.equal(other_out.transpose(0, 1), out) and torch.equal(last, other_last)


@pytest.mark.parametrize("recipe", [None, "int8_per_channel", "int4_per_group_64"])
def test_the_cell_is_one_step_of_the_layer(recipe):
    layer = GRULayer(4, 8, structure_hidden="monarch")
    cell = GRUCell(4, 8, structure_hidden="monarch")
    cell.load_state_dict(layer.state_dict())
    x = torch.randn(6, 3, 4)
    if recipe:
        layer.prepare_qat(recipe).calibrate([x], progress=False)
        cell.prepare_qat(recipe).load_state_dict(layer.state_dict())
        layer.eval().freeze()
        cell.eval().freeze()
    with torch.no_grad():
        out, last = layer(x)
        h = None
        for t in range(6):
            h = cell(x[t], h)
            assert torch.equal(h, out[t]) if recipe else torch.allclose(h, out[t], rtol=0, atol=1e-6)
        assert torch.equal(h, last) or recipe is None
        assert cell(x[0, 0], out[0, 0]).shape == (8,)


def test_the_cell_is_nn_grucell():
    theirs = nn.GRUCell(4, 6)
    mine = GRUCell(4, 6)
    mine._load_dense(theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
    x, h = torch.randn(3, 4), torch.randn(3, 6)
    torch.testing.assert_close(mine(x, h), theirs(x, h), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_to_torch_writes_structures_out(kind):
    layer = GRULayer(8, 8, structure_hidden=kind, structure_input=kind)
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(layer.to_torch()(x)[0], layer(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_qat_gradients_reach_every_parameter(kind):
    layer = GRULayer(8, 8, recipe="int8_state16", structure_hidden=kind, structure_input=kind).train()
    out, _ = layer(torch.randn(5, 4, 8))
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_qat_gradient_tends_to_the_float_gradient():
    """With 8 bits the straight-through gradient is close to that of the float layer of the same weights."""
    layer = GRULayer(8, 16)
    quantized = copy.deepcopy(layer).prepare_qat("int8_state16").train()
    x = torch.randn(6, 4, 8)
    for module in (layer, quantized):
        module(x)[0].square().sum().backward()
    for (name, ours), theirs in zip(layer.named_parameters(), quantized.parameters()):
        error = (ours.grad - theirs.grad).norm() / ours.grad.norm()
        assert error < 0.05, name


def test_lsq_everywhere_trains_and_freezes():
    lsq = QuantizerConfig(scheme="lsq", observer="minmax")
    weight = QuantizerConfig(scheme="lsq", observer="dynamic", granularity="channel")
    recipe = QuantRecipe(
        x=lsq,
        h=lsq,
        state=QuantizerConfig(bits=16, scheme="lsq"),
        weight_input=weight,
        weight_hidden=weight,
        mid_hidden=lsq,
        gates=QuantizerConfig(scheme="lsq", granularity="gate"),
    )
    layer = GRULayer(4, 8, recipe=recipe, structure_hidden="monarch").train()
    x = torch.randn(6, 3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x)[0] - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scales = {name: p for name, p in layer.named_parameters() if name.endswith("scale")}
    assert len(scales) == 8  # x, h, state, gates, mid and the factors of the weights
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales.values())
    assert losses[-1] < losses[0]
    layer.eval()
    with torch.no_grad():
        out, _ = layer(x)
        assert torch.equal(layer.freeze()(x)[0], out)


def test_observers_see_what_the_grid_clipped():
    """An observed range can grow: values are shown before they are put on the grid."""
    recipe = QuantRecipe(gates=QuantizerConfig(observer="minmax"), h=QuantizerConfig(observer="minmax"))
    layer = GRULayer(4, 8, recipe=recipe).train()
    with torch.no_grad():
        layer.bias_input.fill_(30.0)
    layer(torch.randn(3, 2, 4))
    assert layer.gates.scale.item() * 127 > 29


@pytest.mark.parametrize(
    ("setup", "call", "message"),
    [
        (lambda m: m, lambda m: m.freeze(), "nothing to freeze; call prepare_qat"),
        (lambda m: m, lambda m: m.dequantize(), "in float already"),
        (lambda m: m, lambda m: m.calibrate([]), "no quantizers; call prepare_qat"),
        (lambda m: m.prepare_qat("int8_dynamic"), lambda m: m.prepare_qat("int8_dynamic"), "QAT already"),
        (lambda m: m.prepare_qat("int8_dynamic"), lambda m: m.dequantize(), r"call freeze\(\) first"),
        (lambda m: m.prepare_qat("int8_dynamic").freeze(), lambda m: m.prepare_qat("int8_dynamic"), r"call dequantize\(\) first"),
        (lambda m: m.prepare_qat("int8_dynamic").freeze(), lambda m: m.freeze(), "frozen already"),
        (lambda m: m.prepare_qat("int8_dynamic").freeze(), lambda m: m.calibrate([]), "scales are fixed"),
        (lambda m: m.prepare_qat("int8_state16"), lambda m: m.freeze(), r"needs a scale for .*x.*calibrate\(loader\)"),
    ],
)
@pytest.mark.parametrize("make", [lambda: GRULayer(4, 8), lambda: GRUStack(4, 8, 2)], ids=["layer", "stack"])
def test_illegal_transitions_name_the_call_that_would_be_right(make, setup, call, message):
    module = setup(make())
    before = module.quant_state
    with pytest.raises(LifecycleError, match=message):
        call(module)
    assert module.quant_state == before


def test_a_refused_recipe_leaves_every_layer_in_float():
    stack = GRUStack(8, 12, 2)  # 8 is divisible by 8, 12 is not
    recipe = QuantRecipe(weight_input=QuantizerConfig(granularity="group", group_size=8, observer="dynamic"))
    with pytest.raises(ValueError, match="group_size=8 does not divide the rows of weight_input.blocks, which hold 12"):
        stack.prepare_qat(recipe)
    assert all(layer.quant_state == QuantState.FLOAT and not list(layer.weight_input.quantizers) for layer in stack.flat_layers())
    with pytest.raises(ValueError, match="quantizes nothing"):
        stack.prepare_qat("fp32")


@pytest.mark.parametrize("recipe", [None, "int8_hidden", "int8_dynamic"])
def test_inference_between_training_steps_sees_the_new_weights(recipe):
    """Fused optimizers, transformers' default, change weights without moving their version counters."""
    layer = GRULayer(4, 8, recipe=recipe)
    x = torch.randn(5, 2, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            layer.eval()(x)
        layer.train()(x)[0].square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(layer.eval()(x)[0], copy.deepcopy(layer)(x)[0])
        for parameter in layer.parameters():  # as averaged weights are swapped in
            parameter.data.copy_(torch.randn_like(parameter) * 0.1)
        assert torch.equal(layer.eval()(x)[0], copy.deepcopy(layer)(x)[0])


def test_layers_that_differ_are_not_taken_for_one():
    stack = GRUStack(4, 8, 2).prepare_qat("int8_dynamic")
    stack.layers[0][0].freeze()
    for call in (lambda: stack.quant_state, stack.freeze, stack.dequantize, lambda: stack.prepare_qat("int8_dynamic")):
        with pytest.raises(LifecycleError, match=r"share one quant_state.*\(layers.0.0: frozen; layers.1.0: qat"):
            call()
    stack = GRUStack(4, 8, 2)
    stack.layers[0][0].prepare_qat("int8_dynamic")
    stack.layers[1][0].prepare_qat("int8_state16")
    with pytest.raises(LifecycleError, match="share one recipe.*layers.1.0: int8_state16"):
        _ = stack.recipe


def test_weights_that_diverged_are_not_frozen():
    stack = GRUStack(4, 8, 2).prepare_qat("int8_dynamic")
    with torch.no_grad():
        stack.layers[1][0].weight_hidden.structure.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight_hidden.blocks holds NaN"):
        stack.freeze()
    assert all(layer.quant_state == QuantState.QAT for layer in stack.flat_layers())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["int8_state16", "int4_per_group_64"])
def test_dequantize_keeps_the_values(kind, preset):
    layer = GRULayer(8, 16, structure_hidden=kind)
    x = torch.randn(5, 2, 8)
    layer.prepare_qat(preset).calibrate([x], progress=False).freeze()
    dense = layer.weight_hidden.operand().to_dense()
    layer.dequantize()
    assert layer.quant_state == QuantState.FLOAT
    assert layer.structure_hidden.kind == ("dense" if kind in ("butterfly", "ldr") else kind)
    torch.testing.assert_close(layer.weight_hidden.structure.lower().to_dense(), dense, rtol=0, atol=1e-6)
    layer(x)[0].sum().backward()
    layer.prepare_qat(preset)  # the way starts anew


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_keep_nothing_float(kind):
    layer = GRULayer(16, 16, structure_hidden=kind, structure_input=kind, recipe="int4_per_group_64")
    layer.calibrate([torch.randn(5, 2, 16)], progress=False).freeze()
    assert [name for name, _ in layer.named_parameters()] == ["bias_input", "bias_hidden"]
    state = layer.state_dict()
    for name, tensor in state.items():
        if name.endswith("_codes"):
            assert tensor.dtype == torch.uint8
        elif name.endswith("scale"):
            assert tensor.dtype == torch.float32
        else:
            assert name.startswith("bias")
    if kind == "circulant":
        assert state["weight_hidden.blocks_codes"].shape == (3, 8)  # its one vector, two codes a byte


def test_a_skeleton_on_meta_has_the_frozen_layout():
    for kind in KINDS:
        real = GRULayer(8, 8, structure_hidden=kind, structure_input=kind, recipe="int4_per_group_64")
        real.calibrate([torch.randn(5, 2, 8)], progress=False).freeze()
        meta = (
            GRULayer(8, 8, structure_hidden=kind, structure_input=kind, device="meta").prepare_qat("int4_per_group_64").freeze()
        )
        assert {k: (v.shape, v.dtype) for k, v in meta.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in real.state_dict().items()
        }


def test_calibrate_restores_modes_and_counts_batches():
    layer = GRULayer(4, 8, recipe="int8_state16").train()
    batches = iter([torch.randn(3, 2, 4)] * 5)
    layer.calibrate(batches, n_batches=2, progress=False)
    assert layer.training and not layer.x.calibrating
    assert layer.x.observer.count == 2 and len(list(batches)) == 3
    layer.calibrate([(torch.randn(3, 2, 4), torch.zeros(2, 8))], progress=False)
    with pytest.raises(ValueError, match="gave no batch"):
        layer.calibrate([], progress=False)
    with pytest.raises(ValueError, match="at least 1 batch"):
        layer.calibrate([], n_batches=0)


def test_dynamic_input_needs_no_calibration():
    layer = GRULayer(4, 8, recipe="int8_dynamic", structure_input="monarch", structure_hidden="monarch").eval()
    x = torch.randn(5, 2, 4) * 3
    with torch.no_grad():
        out, _ = layer(x)
        layer.freeze()
        assert torch.equal(layer(x)[0], out)
        assert not [name for name, _ in layer.named_buffers() if name.startswith("x.")]


def test_half_precision_models_keep_their_scales_and_their_bits():
    layer = GRULayer(4, 8, recipe="int8_state16", bias=False)
    x = torch.randn(5, 2, 4).bfloat16()
    layer.calibrate([x.float()], progress=False).freeze().eval()
    with torch.no_grad():
        out, last = layer(x.float())
        half_out, half_last = layer.to(torch.bfloat16)(x)
        assert torch.equal(half_last, last) and torch.equal(half_out, out.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x.float())[0], out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GRULayer(0, 4), "input_size must be an integer of at least 1, got 0"),
        (lambda: GRUStack(4, 4, 0), "num_layers"),
        (lambda: GRUStack(4, 4, dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (lambda: GRULayer(4, 4)(torch.randn(2, 4)), r"shape \[T, B, 4\], got \[2, 4\]"),
        (lambda: GRULayer(4, 4)(torch.randn(3, 2, 4).half()), r"x of torch.float16; pass x.to\(torch.float32\)"),
        (lambda: GRULayer(4, 4, dtype=torch.float64)(torch.randn(3, 2, 4)), r"x of torch.float32; pass x.to\(torch.float64\)"),
        (lambda: GRULayer(4, 4)(torch.randn(0, 2, 4)), "at least one step"),
        (lambda: GRULayer(4, 4)(torch.randn(3, 2, 4), torch.randn(3, 4)), r"h0 of shape \[2, 4\]"),
        (lambda: GRULayer(4, 4)(torch.randn(3, 2, 4), mask=torch.ones(2, 3)), r"mask of shape \[3, 2\]"),
        (lambda: GRUStack(4, 4, 2)(torch.randn(3, 2, 4), torch.randn(1, 2, 4)), r"h0 of shape \[2, 2, 4\]"),
        (lambda: GRULayer.from_torch(nn.GRU(4, 4), 1), "layers 0 to 0"),
        (lambda: GRULayer.from_torch(nn.GRU(4, 4), reverse=True), "not bidirectional"),
        (lambda: GRULayer(4, 8, recipe="int8_state16").to_torch(), r"freeze\(\) and dequantize\(\)"),
        (lambda: GRULayer(4, 8, reverse=True).to_torch(), "no reversed layer alone"),
        (lambda: GRULayer(4, 8, structure_input="diagonal"), "in_features == out_features"),
    ],
)
def test_bad_input_is_refused_with_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_print_tells_bits_and_scales():
    layer = GRULayer(4, 8, recipe=PRESETS["int8_state16"], structure_hidden="monarch")
    assert "qat, recipe=int8_state16" in repr(layer) and "nothing observed yet" in repr(layer)
    layer.calibrate([torch.randn(5, 2, 4)], progress=False).freeze()
    assert "first: 8-bit codes" in repr(layer) and "16 bits, per tensor, symmetric, fixed, scale 3.052e-05, frozen" in repr(layer)


@pytest.mark.parametrize("structure_input", ["dense", "diagonal"])
@pytest.mark.parametrize("state", ["float", "qat", "frozen"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_inputs_that_are_no_floats_are_refused(dtype, state, structure_input):
    """Outputs come in the type of x: they would all be 0."""
    layer = GRULayer(4, 4, structure_input=structure_input)
    cell = GRUCell(4, 4, structure_input=structure_input)
    for module, x in ((layer, torch.randn(3, 2, 4)), (cell, torch.randn(2, 4))):
        if state != "float":
            module.prepare_qat(PRESETS["int8_state16"]).calibrate([x], progress=False)
        if state == "frozen":
            module.freeze()
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(ValueError, match=rf"takes floating-point x, got {dtype}; pass x.float\(\)"):
                module(torch.ones_like(x, dtype=dtype))
            with mode(), pytest.raises(ValueError, match=rf"takes floating-point h0, got {dtype}; pass h0.float\(\)"):
                module(x, torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_first_state_of_another_type_is_taken_where_nothing_is_lost(with_gradients):
    layer, x = GRULayer(4, 8).eval(), torch.randn(3, 2, 4)
    with torch.set_grad_enabled(with_gradients):
        for dtype in (torch.float16, torch.bfloat16):
            h0 = torch.randn(2, 8).to(dtype).requires_grad_(with_gradients)
            out, last = layer(x, h0)
            wanted, _ = layer(x, h0.detach().float())
            assert torch.equal(out, wanted) and last.dtype == torch.float32
            if with_gradients:
                last.sum().backward()
                assert h0.grad is not None and h0.grad.dtype == dtype
        with pytest.raises(ValueError, match=r"h0 of torch.float64 for x of torch.float32; pass h0.to\(torch.float32\)"):
            layer(x, torch.randn(2, 8, dtype=torch.float64))
        layer.double()
        assert layer(x.double(), torch.randn(2, 8))[1].dtype == torch.float64


def test_a_compiled_layer_is_copied_and_pickled_without_what_was_compiled():
    layer, x = GRULayer(4, 8), torch.randn(3, 2, 4)
    layer.compile(backend="eager")
    wanted = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.allclose(other(x)[0], wanted, atol=1e-6)
