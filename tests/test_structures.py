"""What structures lower to, accept and refuse."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from gruqat_hf.operands import BlockDiagonalOperand, DiagonalOperand, Factor, MonarchOperand
from gruqat_hf.structures import Structure, StructureConfig, build_structure, register_structure, structure_class

KINDS = ("dense", "diagonal", "blockdiag", "monarch", "butterfly", "circulant", "ldr")
INVERTIBLE = ("dense", "diagonal", "blockdiag", "monarch", "circulant")
SQUARE_ONLY = ("diagonal", "butterfly", "circulant", "ldr")
VARIANTS = {
    "dense": StructureConfig("dense"),
    "diagonal": StructureConfig("diagonal"),
    "blockdiag": StructureConfig("blockdiag", nblocks=2),
    "monarch": StructureConfig("monarch", nblocks=2),
    "monarch per gate": StructureConfig("monarch", nblocks=2, per_gate=True),
    "butterfly": StructureConfig("butterfly"),
    "butterfly of 3": StructureConfig("butterfly", factor_pairs=3),
    "circulant": StructureConfig("circulant"),
    "ldr": StructureConfig("ldr"),
    "ldr of rank 3": StructureConfig("ldr", rank=3),
}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def product(structure: Structure, x: Tensor) -> Tensor:
    """``[gates, batch, out]``."""
    return x @ structure.lower().to_dense().mT


def test_diagonal_multiplies_elementwise():
    structure = build_structure("diagonal", 7, 7)
    x = torch.randn(5, 7)
    torch.testing.assert_close(product(structure, x), structure.weight[:, None] * x)


@pytest.mark.parametrize(
    ("config", "n_in", "n_out", "form", "shapes"),
    [
        ("dense", 5, 7, BlockDiagonalOperand, {"blocks": (3, 1, 7, 5)}),
        ("diagonal", 7, 7, DiagonalOperand, {"diagonal": (3, 7)}),
        ("blockdiag", 20, 12, BlockDiagonalOperand, {"blocks": (3, 4, 3, 5)}),
        ("monarch", 20, 12, MonarchOperand, {"first": (1, 4, 5, 5), "second": (3, 4, 3, 5)}),
        ({"kind": "monarch", "per_gate": True}, 20, 12, MonarchOperand, {"first": (3, 4, 5, 5), "second": (3, 4, 3, 5)}),
        ("butterfly", 512, 512, MonarchOperand, {"first": (3, 16, 32, 32), "second": (3, 32, 16, 16)}),
        ("butterfly", 64, 64, MonarchOperand, {"first": (3, 8, 8, 8), "second": (3, 8, 8, 8)}),
        ("butterfly", 2, 2, MonarchOperand, {"first": (3, 1, 2, 2), "second": (3, 2, 1, 1)}),
        ({"kind": "butterfly", "factor_pairs": 2}, 8, 8, BlockDiagonalOperand, {"blocks": (3, 1, 8, 8)}),
        ("circulant", 9, 9, BlockDiagonalOperand, {"blocks": (3, 1, 9, 9)}),
        ({"kind": "ldr", "rank": 2}, 9, 9, BlockDiagonalOperand, {"blocks": (3, 1, 9, 9)}),
    ],
)
def test_operand_has_documented_form_and_shapes(config, n_in, n_out, form, shapes):
    operand = build_structure(config, n_in, n_out).lower()
    assert type(operand) is form
    assert {name: tuple(factor.values.shape) for name, factor in operand.factors.items()} == shapes
    assert (operand.in_features, operand.out_features) == (n_in, n_out)
    assert operand.to_dense().shape == (3, n_out, n_in)


@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_gates_is_free(variant, gates):
    operand = build_structure(VARIANTS[variant], 8, 8, gates=gates).lower()
    assert operand.to_dense().shape == (gates, 8, 8)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "circulant", "ldr"])
def test_odd_sizes_and_one(kind, size):
    structure = build_structure(kind, size, size)
    product(structure, torch.randn(2, size)).sum().backward()
    # Matrices of size 1 have no subdiagonal.
    assert all(value.grad.isfinite().all() and value.grad.any() for value in structure.parameters() if value.numel())


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_draws_every_parameter_anew_in_place(variant):
    structure = build_structure(VARIANTS[variant], 16, 16)
    before = {name: (value, value.detach().clone()) for name, value in structure.named_parameters()}
    drawn = structure.initial_parameters()
    assert {name: (value.shape, value.dtype) for name, value in drawn.items()} == {
        name: (value.shape, value.dtype) for name, (value, _) in before.items()
    }
    assert not any(value.requires_grad for value in drawn.values())
    structure.reset_parameters()
    for name, value in structure.named_parameters():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1]) == name.startswith("subdiagonal")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_matrix(variant):
    size = 4 if variant.startswith("butterfly") else 6
    structure = build_structure(VARIANTS[variant], size, size, gates=2, dtype=torch.float64)
    names = [f"structure.{name}" for name, _ in structure.named_parameters()]

    def matrix(*values: Tensor) -> Tensor:
        return torch.func.functional_call(Lowered(structure), dict(zip(names, values, strict=True)), ())

    inputs = tuple(value.detach().clone().requires_grad_() for value in structure.parameters())
    if structure.kind == "ldr":
        # A zero on a subdiagonal is where an implementation that divides loses its gradient.
        inputs[0].data[:, 2] = 0.0
    assert torch.autograd.gradcheck(matrix, inputs)


class Lowered(nn.Module):
    """The matrices as a forward, for functional_call."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self) -> Tensor:
        return self.structure.lower().to_dense()


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_device_then_materialised(variant):
    structure = build_structure(VARIANTS[variant], 16, 16, device="meta")
    structure.reset_parameters()
    assert all(value.is_meta for value in structure.parameters())
    assert all(factor.values.is_meta for factor in structure.lower().factors.values())
    structure.to_empty(device="cpu").reset_parameters()
    assert structure.lower().to_dense().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_operand_keeps_the_dtype(variant, dtype):
    structure = build_structure(VARIANTS[variant], 16, 16, dtype=dtype)
    assert all(value.dtype == dtype for value in structure.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = structure.lower().factors
    assert all(factor.values.dtype == dtype and not factor.is_quantized for factor in factors.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_operand_round_trip_or_refusal(variant):
    config = VARIANTS[variant]
    source, target = build_structure(config, 16, 16), build_structure(config, 16, 16)
    assert source.invertible == (config.kind in INVERTIBLE)
    operand = source.lower()
    if not source.invertible:
        with pytest.raises(ValueError, match=f"'{config.kind}' cannot be recovered.*'dense'"):
            target.load_operand(operand)
        return
    parameters = dict(target.named_parameters())
    target.load_operand(operand)
    for name, value in source.named_parameters():
        assert torch.equal(parameters[name], value) and parameters[name].requires_grad


def test_load_operand_reads_codes_and_scales():
    codes = torch.randint(-127, 128, (3, 2, 4, 4), dtype=torch.int8)
    scale = torch.rand(3, 2, 4, 2) + 0.5
    operand = BlockDiagonalOperand(blocks=Factor(codes, scale, qmax=127))
    structure = build_structure(VARIANTS["blockdiag"], 8, 8)
    structure.load_operand(operand)
    assert torch.equal(structure.lower().to_dense(), operand.to_dense())


def test_load_operand_refuses_other_forms_and_shapes():
    dense, shared = build_structure("dense", 8, 8), build_structure(VARIANTS["monarch"], 8, 8)
    with pytest.raises(ValueError, match="'dense' is loaded from a BlockDiagonalOperand, got MonarchOperand"):
        dense.load_operand(shared.lower())
    before = copy.deepcopy(shared.state_dict())
    with pytest.raises(ValueError, match=r"first the shape \[3, 2, 4, 4\].*has \[1, 2, 4, 4\]"):
        shared.load_operand(build_structure(VARIANTS["monarch per gate"], 8, 8).lower())
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
    with pytest.raises(ValueError, match="operand of kind 'circulant' must be circulant"):
        build_structure("circulant", 8, 8).load_operand(dense.lower())


@pytest.mark.parametrize("size", [1, 2, 9, 16])
def test_circulant_codes_are_stored_as_one_vector(size):
    structure = build_structure("circulant", size, size)
    assert structure.rows_share_values
    blocks = torch.round(structure.lower().blocks.values.detach() * 100).to(torch.int8)
    stored = structure.pack_codes({"blocks": blocks})
    assert stored["blocks"].shape == (3, size) and stored["blocks"].dtype == torch.int8
    assert torch.equal(stored["blocks"], blocks[:, 0, :, 0])
    assert torch.equal(structure.unpack_codes(stored, size)["blocks"], blocks)


def test_circulant_codes_that_are_not_circulant_are_refused():
    cls = structure_class("circulant")
    blocks = torch.zeros(3, 1, 4, 4, dtype=torch.int8)
    blocks[1, 0, 2, 3] = 1
    with pytest.raises(ValueError, match="must be circulant"):
        cls.pack_codes({"blocks": blocks})
    with pytest.raises(ValueError, match=r"\[gates, 1, size, size\]"):
        cls.pack_codes({"blocks": blocks[:, 0]})
    with pytest.raises(ValueError, match=r"must be \[gates, 5\], got \[3, 4\]"):
        cls.unpack_codes({"blocks": torch.zeros(3, 4, dtype=torch.int8)}, 5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "circulant"])
def test_other_codes_are_stored_as_they_are(kind):
    cls = structure_class(kind)
    codes = {"first": torch.ones(1, dtype=torch.int8), "second": torch.ones(2, dtype=torch.int8)}
    assert cls.unpack_codes(cls.pack_codes(codes), 8) == codes
    assert cls.rows_share_values == (kind == "diagonal")


@pytest.mark.parametrize("kind", SQUARE_ONLY)
def test_square_only_kinds_refuse_rectangles(kind):
    with pytest.raises(ValueError, match=rf"{kind}.*in_features=8, out_features=16; 8x8 or 16x16.*dense, blockdiag, monarch"):
        build_structure(kind, 8, 16)


@pytest.mark.parametrize("kind", ["blockdiag", "monarch"])
def test_nblocks_must_divide_both_sides(kind):
    with pytest.raises(ValueError, match=r"nblocks=5 .*=24 and out_features=36; .*would work: 1, 2, 3, 4, 6, 12$"):
        build_structure(StructureConfig(kind, nblocks=5), 24, 36)


@pytest.mark.parametrize(("size", "works"), [(1, "2 or 4"), (3, "2 or 4"), (48, "32 or 64"), (513, "512 or 1024")])
def test_butterfly_refuses_other_sizes_than_powers_of_two(size, works):
    with pytest.raises(ValueError, match=f"got in_features=out_features={size}; {works} would work"):
        build_structure("butterfly", size, size)


def test_butterfly_names_powers_of_two_for_a_rectangle():
    with pytest.raises(ValueError, match="32x32 or 64x64 would work"):
        build_structure("butterfly", 48, 64)


@pytest.mark.parametrize("sizes", [{"in_features": 0}, {"out_features": -2}, {"in_features": 2.0}, {"gates": 0}])
def test_sizes_must_be_positive_integers(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be an integer of at least 1"):
        build_structure("dense", **{"in_features": 4, "out_features": 4, **sizes})


def test_class_refuses_a_config_of_another_kind():
    with pytest.raises(ValueError, match="of kind 'dense', got a config of kind 'circulant'; call build_structure"):
        structure_class("dense")(4, 4, StructureConfig("circulant"))
    assert structure_class("blockdiag")(8, 8).config.nblocks == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hadamard"}, "kind is 'hadamard'; known kinds: blockdiag, butterfly"),
        ({"kind": ["dense"]}, "known kinds"),
        ({"kind": "dense", "nblocks": 2}, "nblocks=2 has no meaning for kind 'dense', which reads no options"),
        ({"kind": "ldr", "rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"kind": "monarch", "per_gate": 1}, "per_gate must be True or False"),
        ({"kind": "monarch", "blocks": 2}, "no field blocks"),
    ],
)
def test_config_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        build_structure(fields, 8, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_repr_tells_sizes_and_options(variant):
    config = VARIANTS[variant]
    text = build_structure(config, 8, 8).extra_repr()
    assert text.startswith("in_features=8, out_features=8, gates=3")
    assert all(f"{name}={value}" in text for name, value in config.to_dict().items() if name != "kind")
    assert StructureConfig.of(config.to_dict()) == config


@pytest.fixture
def restored_registry():
    """Forget what a test registers."""
    from gruqat_hf import structures
    from gruqat_hf.structures import config

    classes, options = dict(structures._CLASSES), dict(config._OPTIONS)
    yield
    for table, kept in ((structures._CLASSES, classes), (config._OPTIONS, options)):
        table.clear()
        table.update(kept)


@pytest.mark.usefixtures("restored_registry")
def test_structure_of_a_user():
    @register_structure(options={"rank": 2})
    class LowRank(Structure):
        kind = "lowrank"

        def parameter_shapes(self):
            rank = self.config.rank
            return {"up": (self.gates, self.out_features, rank), "down": (self.gates, rank, self.in_features)}

        def initial_parameters(self):
            return {"up": self.normal("up", 0.1), "down": self.uniform("down", 0.1)}

        def lower(self):
            return BlockDiagonalOperand(blocks=Factor((self.up @ self.down).unsqueeze(1)))

    structure = build_structure("lowrank", 6, 4)
    assert structure.config == StructureConfig("lowrank", rank=2) and structure_class("lowrank") is LowRank
    assert structure.lower().to_dense().shape == (3, 4, 6)
    product(structure, torch.randn(2, 6)).sum().backward()
    assert structure.up.grad is not None
    with pytest.raises(ValueError, match="cannot be recovered"):
        structure.load_operand(structure.lower())
    with pytest.raises(ValueError, match="nblocks=2 has no meaning for kind 'lowrank', which reads rank"):
        StructureConfig("lowrank", nblocks=2)
    assert register_structure(LowRank, {"rank": 3}) is LowRank
    assert StructureConfig("lowrank").rank == 3


@pytest.mark.usefixtures("restored_registry")
def test_registration_refusals():
    dense = structure_class("dense")
    with pytest.raises(ValueError, match=r"'dense' is taken by .*DenseStructure; give Mine another kind"):
        register_structure(type("Mine", (dense,), {}))
    with pytest.raises(ValueError, match="subclass of Structure, got"):
        register_structure(nn.Linear)
    with pytest.raises(ValueError, match=r"Mine\.kind must be a name"):
        register_structure(type("Mine", (Structure,), {}))
    with pytest.raises(ValueError, match=r"Mine\.invertible is True, so it must define parameters_from"):
        register_structure(type("Mine", (Structure,), {"kind": "mine", "invertible": True}))
    with pytest.raises(ValueError, match="options width are none of"):
        register_structure(type("Mine", (dense,), {"kind": "mine"}), {"width": 2})
    with pytest.raises(ValueError, match="known kinds"):
        StructureConfig("mine")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StructureConfig("ldr", rank=9), "rank=9 exceeds the size 8.*1 to 8 would work"),
        (StructureConfig("butterfly", factor_pairs=1 << 40), "factor_pairs=.*exceeds the size 8.*1 to 8 would work"),
    ],
)
def test_options_beyond_the_size_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_structure(config, 8, 8)


def test_import_is_light():
    heavy = "print([name for name in ('torch_structured', 'triton', 'scipy', 'einops') if name in sys.modules])"

    def loaded_by(module: str) -> str:
        command = [sys.executable, "-c", f"import sys, {module}; {heavy}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert loaded_by("gruqat_hf.structures") == loaded_by("transformers.modeling_utils")


def test_ldr_under_a_checkpoint():
    """Which hands out what was saved for the backward pass once."""
    structure = build_structure(StructureConfig("ldr"), 6, 6, gates=3)
    found = []
    for run in (lambda call: call(), lambda call: torch.utils.checkpoint.checkpoint(call, use_reentrant=False)):
        structure.zero_grad()
        run(lambda: structure.lower().to_dense().square().sum()).backward()
        found.append([parameter.grad.clone() for parameter in structure.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
