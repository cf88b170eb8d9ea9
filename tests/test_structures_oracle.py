"""Products, gradients and initial weights of structures, against torch-structured's layers and written-out definitions."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gruqat_hf.structures import Structure, StructureConfig, build_structure


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def oracle() -> SimpleNamespace:
    """torch-structured's layers; it warns of old torch interfaces when it is imported.

    It also imports triton, which CPU builds of torch do not bring. An empty module in its place, for the time of the import,
    makes it take its kernels as absent and use its PyTorch code, which is what multiplies on the CPU in any case.
    """
    absent = ("triton", "triton.language") if importlib.util.find_spec("triton") is None else ()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        for name in absent:
            patch.setitem(sys.modules, name, ModuleType(name))
        pytest.importorskip("torch_structured")
        from torch_structured import Butterfly
        from torch_structured.monarch.blockdiag_linear import BlockdiagLinear
        from torch_structured.monarch.monarch_linear import MonarchLinear
        from torch_structured.structured.layers import Circulant, LDRSubdiagonal
    return SimpleNamespace(
        Butterfly=Butterfly,
        BlockdiagLinear=BlockdiagLinear,
        MonarchLinear=MonarchLinear,
        Circulant=Circulant,
        LDRSubdiagonal=LDRSubdiagonal,
    )


def product(structure: Structure, x: Tensor) -> Tensor:
    """``[gates, batch, out]``."""
    return x @ structure.lower().to_dense().mT


def set_values(layer: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value)
    return layer


def oracle_layer(oracle: SimpleNamespace, structure: Structure, gate: int) -> tuple[nn.Module, dict[str, tuple[str, int]]]:
    """A layer of torch-structured with the weights of one gate, and where each of its parameters is in the structure."""
    n_in, n_out, config = structure.in_features, structure.out_features, structure.config
    own = {name: value.detach() for name, value in structure.named_parameters()}
    if config.kind == "dense":
        return set_values(nn.Linear(n_in, n_out, bias=False), {"weight": own["weight"][gate, 0]}), {"weight": ("weight", gate)}
    if config.kind == "blockdiag":
        layer = oracle.BlockdiagLinear(n_in, n_out, bias=False, nblocks=config.nblocks)
        places = {"weight": ("weight", gate)}
    elif config.kind == "monarch":
        layer = oracle.MonarchLinear(n_in, n_out, bias=False, nblocks=config.nblocks)
        places = {"w1": ("first", gate if config.per_gate else 0), "w2": ("second", gate)}
    elif config.kind == "butterfly":
        layer = oracle.Butterfly(n_in, n_out, bias=False, init=own["twiddle"][gate][None], nblocks=config.factor_pairs)
        places = {"twiddle": ("twiddle", gate)}
    elif config.kind == "circulant":
        layer = oracle.Circulant(layer_size=n_in, bias=False)
        places = {"c": ("weight", gate)}
    else:
        layer = oracle.LDRSubdiagonal(layer_size=n_in, r=config.rank, bias=False)
        places = {"subd_A": ("subdiagonal_a", gate), "subd_B": ("subdiagonal_b", gate), "G": ("left", gate), "H": ("right", gate)}
    values = {theirs: own[ours][at].view_as(layer.get_parameter(theirs)) for theirs, (ours, at) in places.items()}
    return set_values(layer, values), places


@pytest.mark.parametrize(
    ("config", "n_in", "n_out"),
    [
        (StructureConfig("dense"), 20, 12),
        (StructureConfig("blockdiag", nblocks=4), 32, 32),
        (StructureConfig("blockdiag", nblocks=3), 12, 21),
        (StructureConfig("monarch", nblocks=4), 16, 16),
        (StructureConfig("monarch", nblocks=4), 48, 48),
        (StructureConfig("monarch", nblocks=8), 24, 24),
        (StructureConfig("monarch", nblocks=3), 15, 6),
        (StructureConfig("monarch", nblocks=2), 6, 14),
        (StructureConfig("monarch", nblocks=4, per_gate=True), 48, 48),
        (StructureConfig("monarch", nblocks=3, per_gate=True), 6, 15),
        (StructureConfig("butterfly"), 2, 2),
        (StructureConfig("butterfly"), 32, 32),
        (StructureConfig("butterfly"), 64, 64),
        (StructureConfig("butterfly", factor_pairs=2), 32, 32),
        (StructureConfig("butterfly", factor_pairs=3), 16, 16),
        (StructureConfig("circulant"), 32, 32),
        (StructureConfig("circulant"), 37, 37),
        (StructureConfig("ldr"), 32, 32),
        (StructureConfig("ldr", rank=3), 64, 64),
    ],
    ids=lambda value: "-".join(map(str, value.to_dict().values())) if isinstance(value, StructureConfig) else str(value),
)
def test_product_and_gradients_equal_torch_structured(oracle, config, n_in, n_out):
    structure = build_structure(config, n_in, n_out)
    if config.kind == "ldr":
        # Subdiagonals of exactly 1 would hide whether A and B are confused; up to 1 keeps powers in range.
        for subdiagonal in (structure.subdiagonal_a, structure.subdiagonal_b):
            nn.init.uniform_(subdiagonal, 0.5, 1.0)
    x = torch.randn(5, n_in, requires_grad=True)
    out = product(structure, x)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    expected_grads = {name: torch.zeros_like(value) for name, value in structure.named_parameters()}
    x_oracle = x.detach().clone().requires_grad_()
    for gate in range(3):
        layer, places = oracle_layer(oracle, structure, gate)
        expected = layer(x_oracle)
        torch.testing.assert_close(out[gate], expected, rtol=1e-5, atol=1e-5)
        (expected * weights[gate]).sum().backward()
        for theirs, (ours, at) in places.items():
            expected_grads[ours][at] += layer.get_parameter(theirs).grad.view_as(expected_grads[ours][at])
    torch.testing.assert_close(x.grad, x_oracle.grad, rtol=1e-5, atol=1e-5)
    for name, value in structure.named_parameters():
        scale = expected_grads[name].abs().max().clamp_min(1.0)
        torch.testing.assert_close(value.grad / scale, expected_grads[name] / scale, rtol=1e-5, atol=1e-5)


def krylov(subdiagonal: Tensor, vector: Tensor) -> Tensor:
    operator = torch.diag(subdiagonal, -1)
    columns = [vector]
    for _ in range(len(vector) - 1):
        columns.append(operator @ columns[-1])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 1), (3, 2), (7, 1), (12, 3), (33, 2)])
def test_ldr_of_any_size_is_its_krylov_definition(size, rank):
    structure = build_structure(StructureConfig("ldr", rank=rank), size, size, dtype=torch.float64)
    for name, value in structure.named_parameters():
        nn.init.normal_(value)
        if "subdiagonal" in name and size > 3:
            with torch.no_grad():
                value[:, size // 2] = 0.0
    dense = structure.lower().to_dense()
    for gate in range(3):
        a, b = structure.subdiagonal_a[gate], structure.subdiagonal_b[gate]
        terms = [krylov(a, structure.left[gate, r]) @ krylov(b, structure.right[gate, r]).T for r in range(rank)]
        torch.testing.assert_close(dense[gate], sum(terms))


def moments(values: Tensor) -> tuple[float, float, float]:
    values = values.detach().double().flatten()
    return values.mean().item(), values.std().item(), values.abs().max().item()


def assert_same_distribution(ours: Tensor, theirs: Tensor, *, tolerance: float = 0.03):
    (our_mean, our_std, our_max), (mean, std, largest) = moments(ours), moments(theirs)
    assert our_std == pytest.approx(std, rel=tolerance)
    assert abs(our_mean - mean) < 5 * std * math.sqrt(1 / ours.numel() + 1 / theirs.numel())
    # A uniform draw ends at sqrt(3) of its deviation, a normal one of this many values beyond 3.
    assert (our_max > 2 * our_std) == (largest > 2 * std)


@pytest.mark.parametrize(("n_in", "n_out"), [(256, 256), (256, 128), (128, 384)])
def test_dense_starts_as_torch_gru(n_in, n_out):
    gru = nn.GRU(n_in, n_out)
    assert_same_distribution(build_structure("dense", n_in, n_out).weight, gru.weight_ih_l0)
    assert_same_distribution(build_structure("dense", n_out, n_out).weight, gru.weight_hh_l0)


def test_diagonal_keeps_the_product_variance_of_torch_gru():
    diagonal = build_structure("diagonal", 4096, 4096).weight
    hidden = nn.GRU(1, 64).weight_hh_l0
    assert diagonal.square().mean().item() == pytest.approx(64 * hidden.square().mean().item(), rel=0.05)


@pytest.mark.parametrize(("n_in", "n_out", "nblocks"), [(256, 256, 4), (256, 512, 8)])
def test_blockdiag_starts_as_torch_structured(oracle, n_in, n_out, nblocks):
    layer = oracle.BlockdiagLinear(n_in, n_out, bias=False, nblocks=nblocks)
    assert_same_distribution(build_structure(StructureConfig("blockdiag", nblocks=nblocks), n_in, n_out).weight, layer.weight)


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize(("n_in", "n_out", "nblocks"), [(256, 256, 4), (512, 256, 32), (128, 512, 2)])
def test_monarch_starts_as_torch_structured(oracle, n_in, n_out, nblocks, per_gate):
    layer = oracle.MonarchLinear(n_in, n_out, bias=False, nblocks=nblocks)
    structure = build_structure(StructureConfig("monarch", nblocks=nblocks, per_gate=per_gate), n_in, n_out)
    assert_same_distribution(structure.first, layer.w1)
    assert_same_distribution(structure.second, layer.w2)
    dense_std = layer.convert_to_dense_weight().std().item()
    for gate in structure.lower().to_dense():
        assert gate.std().item() == pytest.approx(dense_std, rel=0.05)


def test_butterfly_circulant_and_ldr_start_as_torch_structured(oracle):
    size = 1024
    butterfly = oracle.Butterfly(size, size, bias=False, init="randn", nblocks=2)
    assert_same_distribution(build_structure(StructureConfig("butterfly", factor_pairs=2), size, size).twiddle, butterfly.twiddle)
    circulant = torch.cat([oracle.Circulant(layer_size=size, bias=False).c for _ in range(8)])
    assert_same_distribution(build_structure("circulant", size, size, gates=8).weight, circulant, tolerance=0.05)
    layer = oracle.LDRSubdiagonal(layer_size=size, r=8, bias=False)
    ldr = build_structure(StructureConfig("ldr", rank=8), size, size)
    assert_same_distribution(ldr.left, layer.G, tolerance=0.05)
    assert_same_distribution(ldr.right, layer.H, tolerance=0.05)
    assert torch.equal(ldr.subdiagonal_a[0], layer.subd_A) and torch.equal(ldr.subdiagonal_b[0], layer.subd_B)
