"""Kernels that do a quantizer's work in one launch give the bits of PyTorch's many."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_helpers import skip_unless_kernels_run

from gruqat_hf.layers import GRULayer
from gruqat_hf.quantization import FakeQuantize, QuantizerConfig, ScaleLayout, fused, register_observer
from gruqat_hf.quantization.observers import EmaObserver
from gruqat_hf.scan.spec import pack_grid
from gruqat_hf.structures import StructureConfig, build_structure, butterfly

_INFINITE = float("inf")


@pytest.fixture
def plain(monkeypatch):
    """Call a function without kernels."""

    def run(function):
        with monkeypatch.context() as patched:
            patched.setattr(fused, "KERNELS", [])
            return function()

    return run


def buffers(module: FakeQuantize) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


@pytest.mark.parametrize("observer", ["ema", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_ranges_and_scales(device, plain, observer, symmetric, bits):
    skip_unless_kernels_run(device)
    config = QuantizerConfig(bits=bits, symmetric=symmetric, observer=observer)
    found = FakeQuantize(config, ScaleLayout.of_activation(config, (7,)), device=device).train()
    wanted = copy.deepcopy(found)
    for size, factor, strange in ((1, 0.0, None), (3, 2.0, None), (901, 3.0, torch.nan), (5, 1.0, _INFINITE), (1300, 0.7, None)):
        value = torch.randn(size, 7, device=device) * factor + 0.1 * factor
        if strange is not None:
            value[size // 2, 3] = strange
        versions = [tensor._version for tensor in (found.scale, found.observer.min_val)]
        found.observe(value)
        assert all(tensor._version > version for tensor, version in zip((found.scale, found.observer.min_val), versions))
        plain(lambda value=value: wanted.observe(value))
        for name, tensor in buffers(wanted).items():
            assert torch.equal(buffers(found)[name], tensor), name
        assert found.is_calibrated
        grid, plain_grid = found.grid(), plain(wanted.grid)
        assert grid.packed is not None and plain_grid.packed is None
        assert torch.equal(pack_grid(grid), pack_grid(plain_grid))
        assert torch.equal(grid.codes(value[:1]), plain_grid.codes(value[:1]))


def test_nothing_to_see_leaves_no_range(device):
    skip_unless_kernels_run(device)
    config = QuantizerConfig(observer="ema")
    module = FakeQuantize(config, ScaleLayout.of_activation(config, (4,)), device=device).train()
    before = module.scale.clone()
    for value in (torch.full((2, 4), torch.nan, device=device), torch.empty(0, 4, device=device)):
        module.observe(value)
        assert not module.is_calibrated and torch.equal(module.scale, before)


@pytest.mark.parametrize("granularity, group_size", [("channel", None), ("group", 3), ("gate", None), ("tensor", None)])
@pytest.mark.parametrize("shape, shared", [((3, 2, 5, 9), False), ((3, 12), True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_weights(device, plain, granularity, group_size, shape, shared, dtype, bits):
    skip_unless_kernels_run(device)
    config = QuantizerConfig(bits=bits, granularity=granularity, group_size=group_size, observer="dynamic")
    module = FakeQuantize(config, ScaleLayout.of_weight(config, shape, shared, "weight"), device=device).train()
    weight = torch.randn(shape, device=device).to(dtype)
    weight[0] = 0.0
    upstream = torch.randn(shape, device=device)
    by_rows = granularity in ("channel", "group") or (shared and granularity == "gate")
    assert (fused.round_weight(module, weight) is not None) == by_rows
    results = []
    for run in (lambda function: function(), plain):
        leaf = weight.clone().requires_grad_()
        codes, scale = run(lambda leaf=leaf: module.quantize_weight(leaf))
        (codes * upstream).sum().backward()
        results.append((codes.detach(), scale, leaf.grad))
    for found, wanted in zip(*results):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


class _Alias(FakeQuantize):
    """A scheme that changes nothing that kernels compute, as far as they can know."""


class _Learned(FakeQuantize):
    def _register_scale(self, scale):
        self.scale = torch.nn.Parameter(scale)


def test_schemes_of_others_are_left_to_pytorch(device, monkeypatch):
    """Whatever they override."""
    skip_unless_kernels_run(device)
    monkeypatch.setattr(fused, "KERNELS", [])
    monkeypatch.setattr(fused, "_kernels_for", lambda value: pytest.fail("asked for kernels"))
    for cls in (_Alias, _Learned):
        config = QuantizerConfig(observer="ema")
        module = cls(config, ScaleLayout.of_activation(config, (4,)), device=device).train()
        module.observe(torch.randn(3, 4, device=device))
        assert module.grid().scale.requires_grad == (cls is _Learned)
    config = QuantizerConfig(granularity="channel", observer="dynamic")
    module = _Alias(config, ScaleLayout.of_weight(config, (3, 5), False, "weight"), device=device)
    module.quantize_weight(torch.randn(3, 5, device=device))


def test_an_observer_registered_under_another_name(device, plain):
    skip_unless_kernels_run(device)
    register_observer("average_by_another_name", EmaObserver)
    config = QuantizerConfig(observer="average_by_another_name", ema_decay=0)
    found = FakeQuantize(config, ScaleLayout.of_activation(config, (4,)), device=device).train()
    wanted = copy.deepcopy(found)
    for _ in range(3):
        value = torch.randn(3, 4, device=device)
        found.observe(value)
        plain(lambda value=value: wanted.observe(value))
    assert torch.equal(found.scale, wanted.scale)


def test_gradients_of_gradients(device, plain):
    skip_unless_kernels_run(device)
    config = QuantizerConfig(granularity="channel", observer="dynamic")
    module = FakeQuantize(config, ScaleLayout.of_weight(config, (3, 5), False, "weight"), device=device)
    weight = torch.randn(3, 5, device=device)
    found = []
    for run in (lambda function: function(), plain):
        leaf = weight.clone().requires_grad_()
        codes, _ = run(lambda leaf=leaf: module.quantize_weight(leaf))
        (first,) = torch.autograd.grad(codes.pow(3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("preset", ["int8_state16", "int4_per_group_64", "int8_dynamic"])
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_a_training_step_is_that_of_pytorch(device, plain, structure, preset):
    """The scan itself by the reference, in both."""
    skip_unless_kernels_run(device)
    found = GRULayer(6, 8, structure_hidden=structure, recipe=preset).to(device).train()
    found.backend = "reference"
    wanted = copy.deepcopy(found)
    assert found.h.grid().packed is not None and plain(found.h.grid).packed is None
    for _ in range(2):
        x = torch.randn(3, 2, 6, device=device)
        out = found(x)[0]
        out.square().sum().backward()
        plain_out = plain(lambda x=x: wanted(x)[0])
        plain_out.square().sum().backward()
        assert torch.equal(out, plain_out)
    for (name, parameter), other in zip(found.named_parameters(), wanted.parameters()):
        assert torch.equal(parameter.grad, other.grad), name
    for (name, buffer), other in zip(found.named_buffers(), wanted.buffers()):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("size", [2, 4, 8, 32, 128])
def test_butterflies_multiplied_out_at_once(device, monkeypatch, size):
    """The same bits; gradients up to the order of their sums."""
    skip_unless_kernels_run(device)
    structure = build_structure(StructureConfig("butterfly"), size, size, device=device)
    results = []
    for ways in (list(butterfly.AT_ONCE), []):
        monkeypatch.setattr(butterfly, "AT_ONCE", ways)
        structure.zero_grad()
        operand = structure()
        first, second = operand.first.values, operand.second.values
        assert ("MultiplyOut" in type(first.grad_fn).__name__) == (bool(ways) and size > 2)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(values.shape, generator=generator).to(device) for values in (first, second)]
        (found,) = torch.autograd.grad((first * weights[0]).sum() + (second.square() * weights[1]).sum(), structure.twiddle)
        results.append((first.detach(), second.detach(), found))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-6)
