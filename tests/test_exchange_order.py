"""The order of channels that clusters for two-factor operands read and write: what is packed for it, and how it is come by.

Gluon has no interpreter: what its kernels do with these weights is done here step by step, with the same places in memory.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from scan_helpers import STRUCTURES, build
from torch import Tensor

from gruqat_hf.operands import Factor, MonarchOperand
from gruqat_hf.scan.hopper.monarch import layout
from gruqat_hf.scan.inputs import ScanInputs
from gruqat_hf.scan.product import OperandProduct
from gruqat_hf.scan.reference import scan_reference
from gruqat_hf.scan.triton import choice
from gruqat_hf.scan.triton.device import INTERPRETED

ROWS = 4
#: Shapes of both factors: monarch with 8, 4 and 16 blocks, one first factor for each gate, butterflies of 128 to 1024.
FACTORS = {
    "monarch8 of 512": ((1, 8, 64, 64), (3, 8, 64, 64)),
    "monarch8 of 1024": ((1, 8, 128, 128), (3, 8, 128, 128)),
    "monarch4 of 512": ((1, 4, 128, 128), (3, 4, 128, 128)),
    "monarch16 of 512, per gate": ((3, 16, 32, 32), (3, 16, 32, 32)),
    "butterfly of 128": ((3, 8, 16, 16), (3, 16, 8, 8)),
    "butterfly of 512": ((3, 16, 32, 32), (3, 32, 16, 16)),
    "butterfly of 1024": ((3, 32, 32, 32), (3, 32, 32, 32)),
}

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in Triton's interpreter, in a process that test_triton_scan.py starts"
)


def natural(values: Tensor, programs: int) -> Tensor:
    """Channels in exchange order, ``p * BLOCK + u``, in that of the layer, ``u * C + p``."""
    return values.unflatten(-1, (programs, -1)).transpose(-1, -2).flatten(-2)


@dataclass
class Cluster:
    """Programs with a slot each, of a tile of ROWS rows; sides of a product are float64, so that sums are exact enough."""

    programs: int
    block: int

    @property
    def share(self) -> int:
        return self.block // self.programs

    def places(self, number: Tensor) -> Tensor:
        """Where a channel's value of each row lies in a slot, in values."""
        return ((number >> 5) * (ROWS * 32) + ((number >> 3) & 3) * 8 + (number & 7))[:, None] + torch.arange(ROWS) * 32

    def sent(self, tiles: Tensor) -> Tensor:
        """Slots ``[C, BLOCK * ROWS]`` after each program has sent its tile ``[C, BLOCK, ROWS]`` by shares."""
        slots = torch.full((self.programs, self.block * ROWS), float("nan"), dtype=tiles.dtype)
        u = torch.arange(self.block)
        for part, tile in enumerate(tiles):
            places = self.places(part * self.share + u % self.share)
            slots[(u // self.share)[:, None].expand_as(places), places] = tile
        assert not slots.isnan().any()
        return slots

    def kept(self, tiles: Tensor) -> Tensor:
        """Slots after each program has written its tile to its own memory."""
        slots = torch.full((self.programs, self.block * ROWS), float("nan"), dtype=tiles.dtype)
        slots[:, self.places(torch.arange(self.block))] = tiles
        return slots

    def right(self, slots: Tensor) -> Tensor:
        """A product's right side ``[C, BLOCK, ROWS]`` as threads read it: of column 2 * row, 16-byte chunks 32 inputs apart."""
        k, row = torch.arange(self.block)[:, None], torch.arange(ROWS)
        register = (k >> 4) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
        first = row * 32 + ((k >> 1) & 3) * 8
        return slots[:, first + (register >> 3) * (ROWS * 32) + (register & 7)]

    def arrived(self, slots: Tensor) -> Tensor:
        """Tiles as a thread reads its own two channels of what arrived in the order of senders."""
        return slots[:, self.places(torch.arange(self.block))]


@pytest.mark.parametrize("name", FACTORS)
def test_the_order_in_which_shares_arrive(name):
    """A step's two products, and those of the backward pass, through the exchange and back, are the operand's."""
    torch.manual_seed(0)
    shapes = FACTORS[name]
    first, second = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    gates, hidden = shapes[0][0], shapes[0][1] * shapes[0][2]
    programs = layout.programs_of(*shapes)
    cluster = Cluster(programs, hidden // programs)
    packed = layout.pack_first(first, programs), layout.pack_second(second, programs)
    h = torch.randn(ROWS, hidden, dtype=torch.float64)

    def tiles(values: Tensor) -> Tensor:  # [ROWS, H] in exchange order -> [C, BLOCK, ROWS]
        return values.t().unflatten(0, (programs, -1))

    def rows(tiles: Tensor) -> Tensor:
        return natural(tiles.flatten(0, 1).t(), programs)

    right = cluster.right(cluster.sent(tiles(layout.by_share(h, 1, programs))))
    mids = [cluster.right(cluster.sent(weights @ right)) for weights in packed[0]]
    found = [rows(packed[1][g] @ mids[g % gates]) for g in range(3)]
    wanted = OperandProduct(MonarchOperand(Factor(first), Factor(second)), None)(h)
    assert torch.allclose(torch.stack(found, dim=1), wanted)

    back = layout.pack_first_back(first, programs), layout.pack_second_back(second, programs)
    gradients = torch.randn(ROWS, 3, hidden, dtype=torch.float64)
    own = [cluster.right(cluster.kept(tiles(layout.by_share(gradients[:, g], 1, programs)))) for g in range(3)]
    dmids = [back[1][g] @ own[g] for g in range(3)]
    dmids = [sum(dmids)] if gates == 1 else dmids
    total = sum(back[0][g] @ cluster.right(cluster.sent(dmids[g])) for g in range(gates))
    found_dh = rows(cluster.arrived(cluster.sent(total)))

    leaf = h.clone().requires_grad_()
    mid = OperandProduct(MonarchOperand(Factor(first), Factor(second)), None).first_product(leaf).flatten(2)
    mid.retain_grad()
    blocks = second.shape[1]
    out = torch.einsum("glqr,ngrl->ngql", second, mid.expand(-1, 3, -1).unflatten(-1, (-1, blocks))).flatten(2)
    out.backward(gradients)
    assert torch.allclose(found_dh, leaf.grad)
    assert torch.allclose(torch.stack([rows(dmid) for dmid in dmids], dim=1), mid.grad)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("size, inner", [(512, 8), (512, 64), (128, 4), (2048, 16), (64, 1)])
def test_transposition(size, inner, dtype):
    from gruqat_hf.scan.triton.transposition import transposed

    x = (torch.randn(7, 3, size) * 50).abs().to(dtype)
    wanted = x.unflatten(-1, (-1, inner)).transpose(-1, -2).flatten(-2)
    assert torch.equal(transposed(x, inner), wanted)
    assert torch.equal(transposed(transposed(x, inner), size // inner), x)
    assert transposed(x[:0], inner).shape == (0, 3, size)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposition_finds_the_largest_magnitude(dtype):
    from gruqat_hf.scan.triton.transposition import transposed

    x = torch.randn(23, 512).to(dtype)
    x[11, 77] = -9.0
    largest = torch.zeros(2)
    transposed(x, 8, largest[1:])
    assert largest.tolist() == [0.0, 9.0]
    x[3, 5] = float("nan")
    transposed(x, 8, largest[:1])
    assert largest[0].isnan()


class _Call:
    """Stands for the launch of a kernel in exchange order; runs the reference in it."""

    def __init__(self, inputs: ScanInputs, programs: int) -> None:
        self.inputs, self.programs = inputs, programs

    def compiled(self):
        def run(gi: Tensor, h0: Tensor, mask: Tensor | None, states: Tensor, gates: None) -> None:
            i = self.inputs
            mask = None if mask is None else mask.bool()
            inputs = ScanInputs(
                natural(gi, self.programs), h0, i.operand, i.bias, i.grids, mask, i.reverse, quantized=i.quantized
            )
            states.copy_(layout.by_share(scan_reference(inputs)[0], 2, self.programs))

        return run


@interpreted
@pytest.mark.parametrize("recipe", [None, "int8_state16", "int4_per_group_64"])
@pytest.mark.parametrize("structure", ["dense", "blockdiag", "monarch", "diagonal"])
def test_plans_of_a_family_in_exchange_order(structure, recipe, monkeypatch):
    """The input product comes in that order, states leave in the layer's, and a family that takes fewer rows is replaced."""
    programs = 4
    rules = ModuleType("exchanging")
    rules.refuses = lambda inputs, facts: None if inputs.gi.shape[1] > 1 else "it is a single row"
    rules.interleaved_programs = lambda operand: programs
    forward = ModuleType("exchanging.forward")
    forward.prepare = lambda spec: spec
    forward.call = lambda spec, gi, h0, mask, reverse, states, gates: _Call(
        ScanInputs(gi, h0, spec.operand, spec.bias, spec.grids, mask, reverse, quantized=spec.quantized), programs
    )
    monkeypatch.setitem(sys.modules, "exchanging", rules)
    monkeypatch.setitem(sys.modules, "exchanging.forward", forward)
    monkeypatch.setitem(choice._FAMILIES, "exchanging", rules)
    from gruqat_hf.scan.triton.plan import prepare_plan

    hidden = 32
    layer = build(STRUCTURES["monarch"], recipe, hidden, hidden, torch.device("cpu"), structure_input=STRUCTURES[structure])
    x, h0 = torch.randn(5, 3, hidden), torch.rand(3, hidden)
    mask = torch.rand(5, 3) > 0.3
    layer.backend = "reference"
    with torch.no_grad():
        plan = prepare_plan(layer._layer_weights(), x, lambda inputs, facts: ("exchanging",))
        assert not isinstance(plan, str), plan
        for rows, given in ((3, None), (3, mask), (1, None), (2, mask[:, :2])):
            wanted, last = layer(x[:, :rows], h0[:rows], given)
            found, found_last = plan(x[:, :rows], h0[:rows], given, False)
            found = found if given is None else found.masked_fill(~given.unsqueeze(-1), 0.0)
            for value, reference in ((found, wanted), (found_last, last)):
                assert torch.equal(value, reference) if recipe else torch.allclose(value, reference, atol=1e-5)
