"""What layers take: inputs, first states and sizes, and how others are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gruqat_hf.layers import GRUCell, GRULayer, GRUStack
from gruqat_hf.quantization import PRESETS


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
