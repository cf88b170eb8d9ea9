"""Gradients where numbers get large, small or are of another type than usual."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import Case, distance, matmul_precision
from scan_helpers import build

from gruqat_hf.layers import GRULayer
from gruqat_hf.operands import DiagonalOperand, Factor
from gruqat_hf.scan import ScanInputs, run_scan
from gruqat_hf.scan.replay import column_sums, replay_product
from gruqat_hf.scan.spec import SpecTensors
from gruqat_hf.scan.triton.device import INTERPRETED
from gruqat_hf.scan.triton.precision import spec_of

KERNELS = "triton" if INTERPRETED else "cpu"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("read", [slice(0, 16), slice(-1, None)])
def test_slopes_whose_product_overflows(read, reverse):
    """A state that is exactly 0 for long under a large weight, then saturated: chunks of steps multiply slopes beyond fp32."""
    steps, hidden = 320, 8
    gi = torch.zeros(steps, 1, 3, hidden)
    gi[200:, :, 1], gi[200:, :, 2] = -60.0, 60.0
    gi = gi.flip(0) if reverse else gi
    found = []
    for backend in ("reference", KERNELS):
        values = torch.zeros(3, hidden)
        values[2] = 12.0
        leaves = [t.clone().requires_grad_() for t in (gi, torch.zeros(1, hidden), values, torch.zeros(3, hidden))]
        operand = DiagonalOperand(Factor(leaves[2]))
        states, *_ = run_scan(ScanInputs(leaves[0], leaves[1], operand, leaves[3], reverse=reverse), backend)
        last = states.flip(0) if reverse else states
        found.append(torch.autograd.grad((last[read] * torch.arange(1, hidden + 1)).sum(), leaves))
    for wanted, gradient in zip(*found):
        assert wanted.isfinite().all() and distance(gradient, wanted) <= 1e-5


#: A structure of each kernel family, on a Hopper GPU of each family of that tier, and how many channels it has there.
FAMILIES = {
    "diagonal": ("diagonal", 256),
    "block-diagonal": ({"kind": "blockdiag", "nblocks": 2}, 256),
    "dense": ("dense", 256),
    "dense beyond a cluster": ("dense", 1024),
    "monarch": ({"kind": "monarch", "nblocks": 8}, 256),
    "butterfly": ("butterfly", 256),
}


def _gradients_of_rows(layer: GRULayer, x: torch.Tensor, dstates: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    h0 = torch.zeros(x.shape[1], layer.hidden_size, device=x.device, requires_grad=True)
    with matmul_precision("high"):
        states, _ = layer(x, h0)
        return list(torch.autograd.grad(states, (x, h0), dstates))


backends = pytest.mark.parametrize(
    "kind, backend", [("cpu", KERNELS), *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("triton", "auto"))]
)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, 3e38])
@backends
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_keeps_its_gradients_whatever_those_of_another_are(name, kind, backend, strange):
    device = torch.device(kind)
    structure, hidden = FAMILIES[name]
    steps, rows, hidden = (12, 3, 64) if device.type == "cpu" else (96, 9, hidden)
    layer = build(structure, None, hidden, 16, device)
    layer.backend = backend
    x, dstates = torch.randn(steps, rows, 16, device=device), torch.randn(steps, rows, hidden, device=device)
    wanted = _gradients_of_rows(layer, x, dstates)
    dstates[steps // 2, 1, 5] = strange
    found = _gradients_of_rows(layer, x, dstates)
    others = torch.arange(rows, device=device) != 1
    assert torch.equal(found[0][:, others], wanted[0][:, others]) and torch.equal(found[1][others], wanted[1][others])
    if not math.isfinite(strange):  # while a finite one scales its row down, in half precision, until the rest underflows
        assert torch.equal(found[0][steps // 2 + 1 :], wanted[0][steps // 2 + 1 :])


@backends
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("recipe, reverse", [(None, False), ("int8_state16", True)])
def test_padding_hands_any_gradient_on(recipe, reverse, name, kind, backend):
    """An infinite one too, that of its channel alone, and leaves all other gradients finite."""
    device = torch.device(kind)
    structure, hidden = FAMILIES[name]
    steps, rows, hidden = (5, 3, 64) if device.type == "cpu" else (33, 9, hidden)
    layer = build(structure, recipe, hidden, 16, device, reverse=reverse)
    layer.backend = backend
    x = torch.randn(steps, rows, 16, device=device, requires_grad=True)
    h0 = (torch.rand(rows, hidden, device=device) - 0.5).requires_grad_()  # within its grid, beyond which it has no gradient
    mask = torch.ones(steps, rows, dtype=torch.bool, device=device)
    mask[:, 1] = False
    dlast = torch.randn_like(h0)
    dlast[1, 5] = torch.inf
    with matmul_precision("high"):
        dh0, *others = torch.autograd.grad(layer(x, h0, mask)[1], (h0, x, *layer.parameters()), dlast)
    assert torch.allclose(dh0[1], dlast[1], rtol=1e-6)  # a grid multiplies by its scale and the inverse
    assert dh0[0].isfinite().all() and all(gradient.isfinite().all() for gradient in others)


def test_codes_do_not_round_the_gradient_of_the_bias():
    """Of a frozen layer, whose biases still learn; in kernels of large blocks, which leave that to a product over all rows."""
    inputs = Case(4, 3, 1, 8, quantized=True).inputs("dense", torch.device("cpu"))
    wanted = SpecTensors(*(False,) * len(SpecTensors._fields))._replace(bias=True)
    dgi, dgh_n = torch.randn(4, 3, 3, 8) * 0.1, torch.randn(4, 3, 8) * 0.1
    found = replay_product(spec_of(inputs), wanted, inputs.h0, torch.rand(4, 3, 8), False, dgi, dgh_n).bias
    assert distance(found, torch.cat([dgi[:, :, :2], dgh_n[:, :, None]], dim=2).sum((0, 1))) <= 1e-6


def test_sums_of_gradients_stay_fp32_under_autocast(monkeypatch):
    """A backward pass may run under the caller's. CPU autocast takes no part in this; of a GPU the types alone are asked."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # or autocast switches itself off
    with FakeTensorMode(), torch.autocast("cuda", torch.float16):
        rows = torch.empty(4, 3, device="cuda")
        assert (rows @ rows.t()).dtype == torch.float16 and column_sums(rows).dtype == torch.float32
