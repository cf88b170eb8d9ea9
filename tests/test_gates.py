from __future__ import annotations

import numpy as np
import pytest
import torch

from gruqat_hf.arithmetic import gates, portable_sigmoid, portable_tanh

INFINITY_BITS = 0x7F800000
GATES = {"tanh": (portable_tanh, torch.tanh, 1e-6), "sigmoid": (portable_sigmoid, torch.sigmoid, 5e-7)}

# Part of the checkpoint format: these never change. (input bits, tanh bits, sigmoid bits)
GOLDEN = (
    (0x00000000, 0x00000000, 0x3F000000),  # 0
    (0x80000000, 0x80000000, 0x3F000000),  # -0
    (0x000002CA, 0x000002CA, 0x3F000000),  # 1.0005271e-42
    (0x2EDBE6FF, 0x2EDBE6FF, 0x3F000000),  # 1.00000001e-10
    (0xBA83126F, 0xBA83126C, 0x3EFFDF3B),  # -0.00100000005
    (0x3DCCCCCD, 0x3DCC1EBD, 0x3F066509),  # 0.100000001
    (0x3F000000, 0x3EEC9AA0, 0x3F1F597F),  # 0.5
    (0xBF400000, 0xBF229922, 0x3EA442AF),  # -0.75
    (0x3F800000, 0x3F42F7DA, 0x3F3B26A8),  # 1
    (0xBFC00000, 0xBF67B7CA, 0x3E3ACDBC),  # -1.5
    (0x40000000, 0x3F76CA81, 0x3F617BED),  # 2
    (0xC0500000, 0xBF7F3B41, 0x3D18E428),  # -3.25
    (0x40900000, 0x3F7FEFD6, 0x3F7D2FF6),  # 4.5
    (0xC0B80000, 0xBF7FFEAD, 0x3B4FEB80),  # -5.75
    (0x40D00000, 0x3F7FFFB2, 0x3F7F9DA0),  # 6.5
    (0x40F33333, 0x3F7FFFF4, 0x3F7FDF36),  # 7.5999999
    (0x40F64F7D, 0x3F7FFFFA, 0x3F7FE23E),  # 7.69720316
    (0xC0F64F7E, 0xBF800000, 0x39EE0400),  # -7.69720364
    (0x41100000, 0x3F800000, 0x3F7FF7EB),  # 9
    (0xC1480000, 0xBF800000, 0x36740000),  # -12.5
    (0x41700000, 0x3F800000, 0x3F7FFFFB),  # 15
    (0xC1764F7E, 0xBF800000, 0x00000000),  # -15.3944073
    (0x7F61B1E6, 0x3F800000, 0x3F800000),  # 3.00000001e+38
    (0xFF800000, 0xBF800000, 0x00000000),  # -inf
)


def from_bits(bits) -> torch.Tensor:
    return torch.as_tensor(np.asarray(bits, dtype=np.uint32).view(np.float32).copy())


def to_bits(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().view(np.uint32)


def strided_inputs(stride: int = 2503) -> torch.Tensor:
    """Finite fp32 bit patterns and infinities of both signs in steps of a prime, about 1.7 million at the default stride."""
    positive = np.append(np.arange(0, INFINITY_BITS, stride, dtype=np.uint32), np.uint32(INFINITY_BITS))
    return from_bits(np.concatenate([positive, positive | np.uint32(0x80000000)]))


def saturation_inputs(clamp: float) -> torch.Tensor:
    """Every fp32 value from 2^18 steps below the clamp to 2^10 above it."""
    middle = int(np.float32(clamp).view(np.uint32))
    return from_bits(np.arange(middle - 2**18, middle + 2**10, dtype=np.uint32))


def recipe(x: np.ndarray, clamp: float, numerator, denominator) -> np.ndarray:
    """The documented recipe, written again in numpy, where every fp32 operation is rounded on its own."""
    f = np.float32
    p3, p2, p1, p0 = map(f, numerator)
    (a, b), (c, e) = ((f(u), f(v)) for u, v in denominator)
    x = np.minimum(np.maximum(x, f(-clamp)), f(clamp))
    s = x * x
    n = (((p3 * s + p2) * s + p1) * s + p0) * x
    d = ((s + a) * s + b) * ((s + c) * s + e)
    y = (np.int32(gates.RECIPROCAL_SEED) - d.view(np.int32)).view(f)
    z = f(gates.RECIPROCAL_CENTRE) - d * y
    r = n * y
    w = z * z
    return r + ((z + w) * r) * (w + f(1))


def recipe_tanh(x: np.ndarray) -> np.ndarray:
    return recipe(x, gates.TANH_CLAMP, gates.TANH_NUMERATOR, gates.TANH_DENOMINATOR)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("inputs", ["strided", "dense", "saturation"])
def test_error_and_bounds(name, inputs):
    function, reference, tolerance = GATES[name]
    clamp = gates.TANH_CLAMP if name == "tanh" else gates.SIGMOID_CLAMP
    x = {
        "strided": strided_inputs,
        "dense": lambda: torch.linspace(-12, 12, 2_000_001),
        "saturation": lambda: torch.cat([saturation_inputs(clamp), -saturation_inputs(clamp)]),
    }[inputs]()
    y = function(x)
    assert (y.double() - reference(x.double())).abs().max() < tolerance
    assert y.max() <= 1
    assert y.min() >= (-1 if name == "tanh" else 0)


def test_eager_gives_the_bits_of_the_recipe():
    x = torch.cat([strided_inputs(), saturation_inputs(gates.TANH_CLAMP), torch.linspace(-12, 12, 1_000_001)])
    tanh = recipe_tanh(x.numpy())
    np.testing.assert_array_equal(to_bits(portable_tanh(x)), tanh.view(np.uint32))
    half = np.float32(0.5)
    sigmoid = recipe_tanh(x.numpy() * half) * half + half
    np.testing.assert_array_equal(to_bits(portable_sigmoid(x)), sigmoid.view(np.uint32))
    folded = recipe(x.numpy(), gates.SIGMOID_CLAMP, gates.SIGMOID_NUMERATOR, gates.SIGMOID_DENOMINATOR) + half
    np.testing.assert_array_equal(folded.view(np.uint32), sigmoid.view(np.uint32))


def test_golden_bits():
    x, tanh, sigmoid = (np.array(column, dtype=np.uint32) for column in zip(*GOLDEN, strict=True))
    np.testing.assert_array_equal(to_bits(portable_tanh(from_bits(x))), tanh)
    np.testing.assert_array_equal(to_bits(portable_sigmoid(from_bits(x))), sigmoid)


def test_constants_are_fp32_values():
    floats = [
        gates.RECIPROCAL_CENTRE,
        gates.TANH_CLAMP,
        gates.SIGMOID_CLAMP,
        *gates.TANH_NUMERATOR,
        *gates.SIGMOID_NUMERATOR,
        *(c for pair in gates.TANH_DENOMINATOR + gates.SIGMOID_DENOMINATOR for c in pair),
    ]
    assert all(float(np.float32(c)) == c for c in floats)


def test_tanh_is_exactly_odd():
    x = strided_inputs()
    np.testing.assert_array_equal(to_bits(portable_tanh(-x)), to_bits(-portable_tanh(x)))


@pytest.mark.parametrize("name", GATES)
def test_monotone_to_within_rounding(name):
    function, _, tolerance = GATES[name]
    for x in (torch.linspace(-12, 12, 2_000_001), torch.linspace(-40, 40, 20_001), strided_inputs().sort().values):
        assert function(x).diff().min() > -tolerance


def test_special_values():
    inf, nan, huge = float("inf"), float("nan"), 3.4e38
    x = torch.tensor([0.0, -0.0, inf, -inf, huge, -huge, gates.SIGMOID_CLAMP, -gates.SIGMOID_CLAMP])
    assert portable_tanh(x).tolist() == [0.0, -0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    assert torch.signbit(portable_tanh(x)).tolist() == [False, True] * 4
    assert portable_sigmoid(x).tolist() == [0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    nans = torch.cat([torch.tensor([nan, -nan]), from_bits([0x7F800001, 0x7FFFFFFF, 0xFFC00000])])
    assert portable_tanh(nans).isnan().all()
    assert portable_sigmoid(nans).isnan().all()


@pytest.mark.parametrize("name", GATES)
def test_gradient(name):
    function, reference, _ = GATES[name]
    x = torch.linspace(-10, 10, 4001).requires_grad_()
    weight = torch.linspace(-1, 1, 4001)
    (ours,) = torch.autograd.grad(function(x), x, weight)
    (expected,) = torch.autograd.grad(reference(x), x, weight)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", GATES)
def test_modes_shapes_and_strides(name):
    function = GATES[name][0]
    x = torch.linspace(-9, 9, 24).view(4, 6)
    before, expected = x.clone(), function(x)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(function(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(function(x), expected)
    assert torch.equal(function(x.t()), expected.t())
    assert torch.equal(function(x[:, ::2]), expected[:, ::2])
    assert torch.equal(function(x[:1].expand(3, 6)), expected[:1].expand(3, 6))
    assert torch.equal(function(x[1, 2]), expected[1, 2])
    assert function(torch.empty(0, 5)).shape == (0, 5)
    meta = function(torch.empty(2, 3, device="meta", requires_grad=True))
    assert meta.shape == (2, 3) and meta.is_meta and meta.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("name", GATES)
def test_other_dtypes_are_refused(name, dtype):
    function = GATES[name][0]
    with pytest.raises(ValueError, match=rf"{function.__name__} takes a torch.float32 tensor.*{dtype}.*x.float\(\)"):
        function(torch.zeros(3, dtype=dtype))


def test_kernels_give_the_same_bits(device):
    """On a GPU of every float there is."""
    from kernel_helpers import skip_unless_kernels_run

    skip_unless_kernels_run(device)
    from gate_kernel import gates_of_bits

    number = 1 << (26 if device.type == "cuda" else 12)
    every = number if device.type == "cuda" else (1 << 25) + 12 * number
    for first in range(-(1 << 31), (1 << 31) - number + 1, every):
        bits = torch.arange(number, dtype=torch.int32, device=device) + first
        x = bits.view(torch.float32)
        for found, gate in zip(gates_of_bits(first, number, device), (portable_sigmoid, portable_tanh)):
            wanted = gate(x)
            same = (found.view(torch.int32) == wanted.view(torch.int32)) | (found.isnan() & wanted.isnan())
            assert same.all(), (x[~same][:4], found[~same][:4], wanted[~same][:4])


def test_constants_of_kernels_are_fp32_whatever_the_default_is():
    pytest.importorskip("triton")
    from gruqat_hf.scan.triton.math import _squared

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        for value in (gates.SIGMOID_CLAMP, gates.TANH_CLAMP):
            assert _squared(value) == float(np.float32(value) * np.float32(value))
