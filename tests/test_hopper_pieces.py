"""Sequences of more steps than a launch beyond a cluster has: what launches hand on to one another. The kernels themselves are
replaced by recurrences that read and write the same, so that this needs no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import Case
from torch import Tensor

from gruqat_hf.scan.triton.device import DeviceFacts
from gruqat_hf.scan.triton.precision import spec_of

STEPS, ROWS, SIZE = 11, 20, 520


@pytest.fixture(params=[2, 4, 512], ids=lambda most: f"{most} steps")
def modules(request, monkeypatch):
    """Both directions, with launches of so many steps and of two tiles of rows."""
    pytest.importorskip("triton")
    from gruqat_hf.scan.hopper.dense import backward_wide, forward_wide, wide

    monkeypatch.setattr(wide, "_MOST_STEPS", request.param)
    monkeypatch.setattr(wide, "device_facts", lambda device: DeviceFacts(70, 232448, (9, 0)))
    monkeypatch.setattr(backward_wide, "largest_magnitudes", lambda dstates, dlast: dlast)
    return forward_wide, backward_wide


def in_order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def walk(some: tuple[Tensor | None, ...], wave: tuple[int, int, int], reverse: bool) -> None:
    """Stands in for a forward launch."""
    gi, h0, mask, states, _ = some
    first, groups, turns = wave
    rows = slice(8 * first, 8 * (first + groups * turns))
    h = h0[rows].float()
    for t in in_order(len(gi), reverse):
        h = torch.where(mask[t, rows, None] != 0, 0.7 * h + gi[t, rows].float().sum(1), h)
        states[t, rows] = h.to(states.dtype)


def walk_back(some: tuple[Tensor | None, ...], wave: tuple[int, int, int], reverse: bool) -> None:
    """Stands in for a backward launch."""
    h0, mask, states, _, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums = some
    first, tiles, _ = wave
    rows = slice(8 * first, 8 * (first + tiles))
    carry = dlast[rows].float()
    order = in_order(len(states), reverse)
    total = torch.zeros_like(carry)
    for t, earlier in reversed([*zip(order, [None, *order[:-1]])]):
        grad = dstates[t, rows].float() + carry
        before = h0[rows] if earlier is None else states[earlier, rows]
        dgi[t, rows], dgh_n[t, rows] = grad[:, None].to(dgi.dtype), (grad * before).to(dgi.dtype)
        adjoint[t, rows] = grad * mask[t, rows, None]
        carry = 0.7 * grad + 0.01 * before.float()
        total = total + grad
    dh0[rows] = carry.to(dh0.dtype)
    for tile in range(tiles):
        sums[:, first + tile] = total[8 * tile : 8 * (tile + 1)].sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_launches_go_on_where_others_ended(modules, monkeypatch, reverse, dtype):
    forward, backward = modules
    inputs = Case(STEPS, ROWS, 1, SIZE, masked=True, reverse=reverse, dtype=dtype).inputs("dense", torch.device("cpu"))
    gi, h0, mask = inputs.gi / 3, inputs.h0, inputs.mask.view(torch.uint8)
    monkeypatch.setattr(forward, "_launch", lambda weights, some, wave, reverse: walk(some, wave, reverse))
    monkeypatch.setattr(backward, "_launch", lambda prepared, some, largest, wave, reverse: walk_back(some, wave, reverse))
    from gruqat_hf.scan.hopper.dense.weights import backward_weights, half_weights

    states, gates = torch.empty(STEPS, ROWS, SIZE, dtype=dtype), torch.zeros(STEPS, ROWS, 4, SIZE, dtype=torch.float16)
    forward.forward(half_weights(spec_of(inputs)), gi, h0, mask, reverse, states, gates)
    wanted = torch.empty_like(states)
    walk((gi, h0, mask, wanted, gates), (0, 3, 1), reverse)
    assert torch.equal(states, wanted)

    dstates, dlast = torch.randn_like(states), torch.randn_like(h0)
    weights = backward_weights(replace(spec_of(inputs), exact=False))
    found = backward.backward(weights, gi, h0, states, gates, mask, reverse, dstates, dlast, True, True)
    dgi, dgh_n, dh0 = torch.empty_like(gi), torch.empty_like(states), torch.empty_like(h0)
    adjoint, sums = torch.empty(states.shape), torch.empty(6, 3, SIZE)
    walk_back((h0, mask, states, gates, dstates, dlast, dgi, dgh_n, dh0, adjoint, sums), (0, 3, 1), reverse)
    assert torch.equal(found.dgi, dgi) and torch.equal(found.dgh_n, dgh_n) and torch.equal(found.dh0, dh0)
    assert torch.equal(found.adjoint, adjoint)
    assert torch.allclose(found.dbias, sums[:3].sum(1), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.dbias_input, sums[3:].sum(1), rtol=1e-4, atol=1e-4)
