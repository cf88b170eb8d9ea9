"""Layers from float to QAT to frozen and back: which calls are right, what they keep, what they count."""

from __future__ import annotations

import pytest
import torch
from model_helpers import KINDS

from gruqat_hf.layers import GRULayer, GRUStack, LifecycleError, QuantState
from gruqat_hf.quantization import PRESETS, QuantizerConfig, QuantRecipe


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


def test_print_tells_bits_and_scales():
    layer = GRULayer(4, 8, recipe=PRESETS["int8_state16"], structure_hidden="monarch")
    assert "qat, recipe=int8_state16" in repr(layer) and "nothing observed yet" in repr(layer)
    layer.calibrate([torch.randn(5, 2, 4)], progress=False).freeze()
    assert "first: 8-bit codes" in repr(layer) and "16 bits, per tensor, symmetric, fixed, scale 3.052e-05, frozen" in repr(layer)
