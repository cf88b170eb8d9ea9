"""Clusters in which several tiles of rows take turns: as many as a launch chooses by itself, and others that it might."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import Case, Run, check_against_reference, distance, matmul_precision, skip_unless_hopper

from gruqat_hf.scan.triton.device import DeviceFacts

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "rows, blocks, programs, tiles",
    [
        *((1, 1, 16, 1), (56, 1, 16, 1), (57, 1, 16, 3), (128, 1, 16, 3), (300, 1, 16, 3), (24, 2, 16, 1), (32, 2, 16, 3)),
        *((120, 2, 8, 1), (128, 2, 8, 3)),
    ],
)
def test_launches_choose_what_is_done_first(monkeypatch, rows, blocks, programs, tiles):
    """On a GPU that runs 7 or 15 clusters at once: a second wave of them takes longer than three tiles in turns."""
    turns = pytest.importorskip("gruqat_hf.scan.hopper.dense.turns")
    monkeypatch.setattr(turns, "clusters_at_once", lambda size, index: {16: 7, 8: 15}[size])
    assert turns.tiles_of_cluster(rows, blocks, programs, torch.device("cpu"), {1: 1.0, 3: 1.75}) == tiles


@pytest.mark.parametrize(
    "rows, blocks, programs, least, taken",
    [
        *((1, 1, 16, 1, 1), (7, 1, 16, 1, 1), (8, 1, 16, 1, 2), (15, 1, 16, 1, 4), (28, 1, 16, 1, 4), (29, 1, 16, 1, 8)),
        *((1, 1, 16, 2, 2), (14, 1, 16, 2, 2), (7, 2, 8, 1, 1), (8, 2, 8, 1, 2), (1, 9, 16, 1, 8), (1000, 1, 16, 1, 8)),
    ],
)
def test_small_batches_are_spread_over_clusters(monkeypatch, rows, blocks, programs, least, taken):
    turns = pytest.importorskip("gruqat_hf.scan.hopper.dense.turns")
    monkeypatch.setattr(turns, "clusters_at_once", lambda size, index: {16: 7, 8: 15}[size])
    assert turns.rows_taken(rows, blocks, programs, torch.device("cpu"), least) == taken


def test_a_smaller_gpu_than_a_program_was_exported_for_is_named(monkeypatch):
    wide = pytest.importorskip("gruqat_hf.scan.hopper.dense.wide")
    facts = DeviceFacts(processors=70, shared_bytes=232448, capability=(9, 0))
    monkeypatch.setattr(wide, "device_facts", lambda device: facts)
    assert [*wide.waves(20, 2, CUDA)] == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    with pytest.raises(RuntimeError, match="3 blocks, which need 96 programs at once, but cuda has 70 processors"):
        [*wide.waves(20, 3, CUDA)]


@pytest.mark.parametrize("most_turns", [1, 4])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 8, 9, 40, 70, 128, 129, 200, 1000])
def test_launches_beyond_a_cluster_share_all_rows_out(monkeypatch, rows, blocks, most_turns):
    wide = pytest.importorskip("gruqat_hf.scan.hopper.dense.wide")
    facts = DeviceFacts(processors=132, shared_bytes=232448, capability=(9, 0))
    monkeypatch.setattr(wide, "device_facts", lambda device: facts)
    launches, tiles, at_once = [*wide.waves(rows, blocks, CUDA, most_turns)], -(-rows // 8), 4 // blocks
    assert len(launches) == -(-tiles // (at_once * most_turns))
    ends = [first for first, _, _ in launches[1:]] + [tiles]
    assert launches[0].first == 0
    for (first, groups, turns), end in zip(launches, ends):
        assert groups <= at_once and turns == -(-(end - first) // at_once) <= most_turns
        assert end - first <= groups * turns < end - first + turns


def choose_tiles(monkeypatch: pytest.MonkeyPatch, tiles: int) -> None:
    from gruqat_hf.scan.hopper.dense import forward_bytes, forward_half

    for module in (forward_bytes, forward_half):
        monkeypatch.setattr(module, "tiles_of_cluster", lambda *_: tiles)


@pytest.fixture(params=[1, 3], ids=lambda tiles: f"{tiles} tiles")
def tiles(request, monkeypatch) -> int:
    skip_unless_hopper()
    choose_tiles(monkeypatch, request.param)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 6, 9, 20, 33, 150])
@pytest.mark.parametrize("size", [200, 512])
@pytest.mark.parametrize("changes", [{}, {"masked": True, "reverse": True, "bias": False}], ids=["plain", "masked"])
def test_states_and_gradients(tiles, size, rows, changes):
    case = Case(35, rows, 2 if size == 512 else 3, size, **changes)
    check_against_reference("hopper_dense", case.inputs("dense", CUDA), 2e-4, 8e-4)
    case = replace(case, steps=18, quantized=True, per_channel=True)
    check_against_reference("hopper_dense", case.inputs("dense", CUDA), 0.0, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6, 13, 25, 33])
def test_blocks_of_8_bit_codes(tiles, rows):
    case = Case(19, rows, 1, 1000, quantized=True, masked=True)
    check_against_reference("hopper_dense", case.inputs("dense", CUDA), 0.0, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_a_rows_bits_are_its_own(monkeypatch, tiles, quantized):
    """Whatever tile it is in, however many others there are, and whoever takes turns with it."""
    inputs = Case(40, 70, 1, 512, quantized=quantized).inputs("dense", CUDA)
    dstates = torch.randn(40, 70, 512, device=CUDA)
    with matmul_precision("high"):
        run = Run.of("hopper_dense", inputs)
        found = run.backward(dstates, dstates[0])
        for _ in range(200):
            again = Run.of("hopper_dense", inputs)
            assert torch.equal(again.states, run.states)
            assert torch.equal(again.backward(dstates, dstates[0]).dgi, found.dgi)
        with monkeypatch.context() as patch:
            choose_tiles(patch, 4 - tiles)
            assert torch.equal(Run.of("hopper_dense", inputs).states, run.states)
        for rows in (slice(0, 8), slice(13, 40), slice(64, 70), slice(5, 6), slice(20, 22), slice(30, 33), slice(50, 63)):
            some = replace(inputs, gi=inputs.gi[:, rows].contiguous(), h0=inputs.h0[rows].contiguous())
            part = Run.of("hopper_dense", some)
            assert torch.equal(part.states, run.states[:, rows])
            alone = part.backward(dstates[:, rows].contiguous(), dstates[0, rows].contiguous())
            assert torch.equal(alone.dgi, found.dgi[:, rows]) and torch.equal(alone.dh0, found.dh0[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("rows, size", [(1, 512), (3, 512), (2, 200), (1, 1024)])
def test_rows_that_are_none_leave_sums_alone(rows, size):
    """Programs have tiles of 8 rows, of which others hear no more than there are; however long a sequence is."""
    skip_unless_hopper()
    with matmul_precision("high"):
        run = Run.of("hopper_dense", Case(5000, rows, 1, size).inputs("dense", CUDA))
        dstates = torch.randn_like(run.states)
        found = run.backward(dstates, dstates[0], want_weights=True)
    hidden = torch.cat([found.dgi[:, :, :2], found.dgh_n[:, :, None]], dim=2)
    for bias, gradient in ((found.dbias, hidden), (found.dbias_input, found.dgi)):
        assert distance(bias, gradient.double().sum((0, 1))) <= 1e-5
