"""Grids, observers, schemes and packing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gruqat_hf.quantization import (
    POINTS,
    PRESETS,
    FakeQuantize,
    Grid,
    LearnedStepSize,
    QuantizerConfig,
    QuantRecipe,
    ScaleLayout,
    pack_nibbles,
    register_observer,
    register_scheme,
    unpack_nibbles,
)
from gruqat_hf.quantization.observers import MinMaxObserver


def quantizer(config: QuantizerConfig, shape=(16,), cls=FakeQuantize, **kwargs) -> FakeQuantize:
    return cls(config, ScaleLayout.of_activation(config, shape), name="point", **kwargs)


@given(scale=st.floats(2**-13, 10.0, width=32), bits=st.integers(2, 8), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_symmetric_grid_is_torchs_fake_quantize(scale, bits, seed):
    """Values and straight-through gradient; torch rounds in the same arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    value = (torch.randn(257, generator=generator) * scale * 2**bits / 3).requires_grad_()
    grid = Grid.build(torch.tensor(scale), None, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    mine = grid.round_trip(value)
    (gradient,) = torch.autograd.grad(mine.sum(), value)
    theirs = torch.fake_quantize_per_tensor_affine(value, scale, 0, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), value)
    assert torch.equal(mine, theirs)
    # The gradient goes through scale * inv_scale, which is 1 to rounding.
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=0)


@given(low=st.floats(-50, 0, width=32), high=st.floats(0, 50, width=32), bits=st.integers(2, 8), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_affine_grid_is_torchs_fake_quantize(low, high, bits, seed):
    config = QuantizerConfig(bits=bits, symmetric=False, observer="minmax")
    module = quantizer(config).train()
    generator = torch.Generator().manual_seed(seed)
    value = torch.rand(64, 16, generator=generator) * (high - low) + low
    module.observe(value)
    grid = module.grid()
    theirs = torch.fake_quantize_per_tensor_affine(
        value, module.scale.item(), int(module.zero_point.item()), config.qmin, config.qmax
    )
    assert torch.equal(grid.round_trip(value), theirs)
    assert grid.codes(value).abs().max() <= grid.magnitude
    assert grid.round_trip(torch.zeros(16)).abs().max() == 0  # zero is always on the grid


@given(seed=st.integers(0, 2**20), bits=st.sampled_from([8, 16]), symmetric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_round_trip_is_idempotent(seed, bits, symmetric):
    """A carried state that is put on its grid again does not move: chunks of a sequence can be joined."""
    config = QuantizerConfig(bits=bits, symmetric=symmetric, observer="fixed")
    grid = quantizer(config, known_range=1.0).grid()
    value = torch.rand(1000, 16, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2
    once = grid.round_trip(value)
    assert torch.equal(grid.round_trip(once), once)


def test_rounding_is_half_to_even_and_nan_stays():
    grid = Grid.build(torch.tensor(1.0), None, -7, 7)
    value = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 100.0, float("inf"), float("nan")])
    expected = torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 7.0, 7.0, float("nan")])
    assert torch.equal(grid.codes(value).nan_to_num(99), expected.nan_to_num(99))


@given(codes=st.lists(st.integers(-8, 7), min_size=1, max_size=41), rows=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_packing_round_trips(codes, rows):
    tensor = torch.tensor([codes] * rows, dtype=torch.int8)
    packed = pack_nibbles(tensor)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, math.ceil(len(codes) / 2))
    assert torch.equal(unpack_nibbles(packed, len(codes)), tensor)


def test_packing_refuses_codes_beyond_four_bits():
    with pytest.raises(ValueError, match=r"\[-8, 7\].*\[0, 8\]"):
        pack_nibbles(torch.tensor([0, 8], dtype=torch.int8))


@pytest.mark.parametrize(
    ("granularity", "group_size", "expected"),
    [("tensor", None, (1, 1, 1, 1)), ("gate", None, (3, 1, 1, 1)), ("channel", None, (3, 2, 5, 1)), ("group", 4, (3, 2, 5, 2))],
)
def test_weight_granularities(granularity, group_size, expected):
    config = QuantizerConfig(granularity=granularity, group_size=group_size, observer="dynamic")
    weight = torch.randn(3, 2, 5, 8)
    layout = ScaleLayout.of_weight(config, tuple(weight.shape), False, "w")
    module = FakeQuantize(config, layout, name="w")
    codes, scale = module.quantize_weight(weight)
    assert tuple(scale.shape) == expected
    assert codes.abs().amax() == 127  # each scale is reached by its largest weight
    torch.testing.assert_close(codes * layout.expand(scale), weight, rtol=0, atol=float(scale.max()) * 0.501)
    # The largest magnitude that shares a scale defines it.
    assert torch.equal(layout.group(weight.abs()).amax(-1) / 127, scale)


def test_group_size_must_divide_the_row_or_exceed_it():
    config = QuantizerConfig(granularity="group", group_size=3)
    with pytest.raises(ValueError, match=r"group_size=3 does not divide the rows of w.*1, 2, 4, 8"):
        ScaleLayout.of_weight(config, (3, 2, 5, 8), False, "w")
    beyond = QuantizerConfig(granularity="group", group_size=64)
    assert ScaleLayout.of_weight(beyond, (3, 2, 5, 8), False, "w").scale_shape == (3, 2, 5, 1)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_where_rows_share_values_channel_and_group_mean_gate(granularity):
    config = QuantizerConfig(granularity=granularity, group_size=4 if granularity == "group" else None)
    assert ScaleLayout.of_weight(config, (3, 8), True, "w").scale_shape == (3, 1)


def test_observers():
    batches = [torch.full((4, 16), 1.0), torch.full((4, 16), -3.0), torch.full((4, 16), 2.0)]

    def scale_after(**kwargs) -> float:
        module = quantizer(QuantizerConfig(**kwargs)).train()
        for batch in batches:
            module.observe(batch)
        return module.scale.item() * 127

    assert scale_after(observer="minmax") == pytest.approx(3.0)
    # ema: low 1, 0.5*1 + 0.5*-3 = -1, 0.5*-1 + 0.5*2 = 0.5; high the same
    assert scale_after(observer="ema", ema_decay=0.5) == pytest.approx(0.5)
    assert scale_after(observer="fixed", scale=0.25) == pytest.approx(0.25 * 127)
    dynamic = quantizer(QuantizerConfig(observer="dynamic"))
    assert dynamic.grid(batches[1]).scale.item() == pytest.approx(3 / 127)


def test_percentile_leaves_outliers_out():
    value = torch.linspace(-1, 1, 16 * 1001).reshape(-1, 16).clone()
    value[0, 0], value[-1, -1] = -1000.0, 1000.0
    module = quantizer(QuantizerConfig(observer="percentile", percentile=99.0)).train()
    module.observe(value)
    assert module.scale.item() * 127 == pytest.approx(0.99, abs=0.01)


def test_eval_mode_does_not_observe_and_calibrating_does():
    module = quantizer(QuantizerConfig(observer="minmax")).eval()
    module.observe(torch.ones(2, 16))
    assert not module.is_calibrated
    with pytest.raises(RuntimeError, match="'point' has observed nothing.*calibrate"):
        module.grid()
    module.calibrating = True
    module.observe(torch.ones(2, 16))
    assert module.is_calibrated and module.scale.item() == pytest.approx(1 / 127)


def test_calibration_state_follows_a_loaded_state_dict():
    seen, fresh = (quantizer(QuantizerConfig(observer="minmax")) for _ in range(2))
    assert not fresh.is_calibrated
    seen.train().observe(torch.ones(2, 16))
    fresh.load_state_dict(seen.state_dict())
    assert fresh.is_calibrated


def test_lsq_gradient_is_torchs_learnable_fake_quantize():
    config = QuantizerConfig(scheme="lsq", observer="minmax")
    module = quantizer(config, cls=LearnedStepSize).train()
    value = torch.randn(64, 16) * 2
    module.observe(value)
    with torch.no_grad():
        module.scale.mul_(0.5)  # so that some values are clipped
    module.observe(value * 10)  # the observer only gives the first scale
    weight = torch.randn(64, 16)
    (module.grid().round_trip(value) * weight).sum().backward()
    theirs_scale = module.scale.detach().clone().requires_grad_()
    factor = 1 / math.sqrt(16 * 127)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(value, theirs_scale, torch.zeros(1), -127, 127, factor)
    (theirs * weight).sum().backward()
    torch.testing.assert_close(module.scale.grad, theirs_scale.grad, rtol=1e-4, atol=1e-4)


def test_scales_stay_fp32_when_the_model_is_cast():
    for module in (
        quantizer(QuantizerConfig(observer="minmax")).train(),
        quantizer(QuantizerConfig(scheme="lsq", observer="minmax"), cls=LearnedStepSize).train(),
    ):
        module.observe(torch.randn(8, 16))
        before = module.scale.detach().clone()
        module.to(torch.bfloat16).half().double()
        assert module.scale.dtype == torch.float32 and torch.equal(module.scale.detach(), before)
        assert module.observer.min_val.dtype == torch.float32


def test_a_user_adds_a_scheme_and_an_observer():
    class PowerOfTwo(FakeQuantize):
        def scale_from_range(self, low, high):
            scale, zero_point = super().scale_from_range(low, high)
            return torch.exp2(torch.ceil(torch.log2(scale))), zero_point

    class Twice(MinMaxObserver):
        def range_of(self, value):
            low, high = super().range_of(value)
            return 2 * low, 2 * high

    register_scheme("test_pow2", PowerOfTwo)
    register_scheme("test_pow2", PowerOfTwo)
    register_observer("test_twice", Twice)
    with pytest.raises(ValueError, match="'lsq' is LearnedStepSize already"):
        register_scheme("lsq", PowerOfTwo)

    from gruqat_hf.layers import GRULayer

    weight = QuantizerConfig(granularity="channel", observer="dynamic", scheme="test_pow2")
    recipe = QuantRecipe(weight_hidden=weight, x=QuantizerConfig(observer="test_twice"), h=QuantizerConfig(observer="fixed"))
    layer = GRULayer(5, 6, recipe=recipe).train()
    x = torch.randn(4, 3, 5)
    layer(x)
    assert layer.x.scale.item() * 127 == pytest.approx(2 * x.abs().max().item())
    out, _ = layer.eval()(x)
    frozen, _ = layer.freeze()(x)
    assert torch.equal(out, frozen)
    exponents = torch.log2(layer.weight_hidden.blocks_scale)
    assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8, or 16.*9"),
        ({"bits": True}, "bits"),
        ({"granularity": "row"}, "granularity must be one of.*'row'"),
        ({"granularity": "group"}, "needs QuantizerConfig.group_size"),
        ({"group_size": 4}, "needs granularity='group'"),
        ({"scale": 0.1}, "needs observer='fixed'"),
        ({"observer": "fixed", "scale": -1.0}, "positive finite"),
        ({"observer": "fixed", "scale": float("nan")}, "positive finite"),
        ({"observer": "fixed", "zero_point": 3}, "symmetric=False"),
        ({"observer": "fixed", "symmetric": False, "zero_point": 3}, "needs a scale with it"),
        ({"observer": "fixed", "scale": 1.0, "symmetric": False, "zero_point": 2.6}, "must be an integer"),
        ({"observer": "fixed", "scale": 1e-50}, "1e-37 to 1e37"),
        ({"observer": "fixed", "scale": 1.0, "symmetric": False, "zero_point": 300}, r"\[-128, 127\]"),
        ({"ema_decay": 1.0}, r"\[0, 1\)"),
        ({"percentile": 50.0}, r"\(50, 100\]"),
        ({"ema_decay": "much"}, "ema_decay.*'much'"),
        ({"observer": ["ema"]}, "observer must be a name"),
    ],
)
def test_bad_quantizer_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": QuantizerConfig(granularity="channel")}, "QuantRecipe.x cannot have granularity 'channel'; possible: tensor"),
        ({"h": QuantizerConfig(observer="dynamic")}, "QuantRecipe.h cannot be observed dynamically"),
        ({"h": QuantizerConfig(bits=16)}, "only the carried state"),
        ({"weight_input": QuantizerConfig(symmetric=False)}, "weights are symmetric"),
    ],
)
def test_bad_recipes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        QuantRecipe(**kwargs)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'int7'; presets:.*int8_state16"):
        QuantRecipe.of("int7")
    with pytest.raises(ValueError, match="no field weight; its fields:.*weight_hidden"):
        QuantRecipe.of({"weight": {}})
    with pytest.raises(ValueError, match="no field nbits"):
        QuantizerConfig.of({"nbits": 4})
    with pytest.raises(ValueError, match="observer is 'best'; known:.*percentile"):
        quantizer(QuantizerConfig(observer="best"))


_configs = st.builds(
    QuantizerConfig,
    bits=st.integers(2, 8),
    granularity=st.just("tensor"),
    symmetric=st.booleans(),
    observer=st.sampled_from(["minmax", "ema", "percentile"]),
    scheme=st.sampled_from(["observed", "lsq"]),
    ema_decay=st.floats(0, 0.999),
)


@given(points=st.dictionaries(st.sampled_from([p for p in POINTS if not p.startswith("weight")]), _configs))
@settings(max_examples=40, deadline=None)
def test_recipes_survive_json(points):
    import json

    recipe = QuantRecipe(**points)
    assert QuantRecipe.of(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    assert QuantRecipe.of(PRESETS[name].to_dict()) == PRESETS[name] and PRESETS[name].name == name
