"""GRUCell, GRULayer and GRUStack: parity with torch.nn.GRU, masks, gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_helpers import KINDS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gruqat_hf.layers import GRUCell, GRULayer, GRUStack, LifecycleError
from gruqat_hf.quantization import QuantizerConfig, QuantRecipe


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


def test_observers_see_what_the_grid_clipped():
    """An observed range can grow: values are shown before they are put on the grid."""
    recipe = QuantRecipe(gates=QuantizerConfig(observer="minmax"), h=QuantizerConfig(observer="minmax"))
    layer = GRULayer(4, 8, recipe=recipe).train()
    with torch.no_grad():
        layer.bias_input.fill_(30.0)
    layer(torch.randn(3, 2, 4))
    assert layer.gates.scale.item() * 127 > 29


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


def test_a_compiled_layer_is_copied_and_pickled_without_what_was_compiled():
    layer, x = GRULayer(4, 8), torch.randn(3, 2, 4)
    layer.compile(backend="eager")
    wanted = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.allclose(other(x)[0], wanted, atol=1e-6)
