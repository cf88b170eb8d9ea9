"""Backward scan of two-factor operands on Hopper clusters: one launch, and what brings tensors into its order and out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.block_diagonal.weights import packed
from ...triton.exchange_plan import cdiv
from ...triton.family import ScanGradients, aligned
from ...triton.monarch import backward as portable
from ...triton.monarch.weights import Orders, mid_values, weight_gradients
from ...triton.transposition import transposed
from ..cluster import ClusterCall
from ..exchange import area_bytes
from . import STEPS, TILE_ROWS, registers
from .backward_kernel import backward_kernel, exchange_area
from .weights import BackwardWeights
from .weights import backward_weights as prepare

__all__ = ["backward", "prepare"]

#: Steps between two looks at the size of gradients; even.
_RESCALE = 16


def backward(
    prepared: BackwardWeights,
    gi: Tensor,
    h0: Tensor,
    states: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    reverse: bool,
    dstates: Tensor,
    dlast: Tensor,
    want_adjoint: bool,
    want_weights: bool = False,
    interleaved: bool = False,
) -> ScanGradients:
    """Gradients of the scan's inputs and, if wanted, of the weights; interleaved: that of ``gi`` in exchange order."""
    if prepared.portable is not None:
        assert not interleaved
        scan = gi, h0, states, gates, mask, reverse, dstates, dlast
        return portable.backward(prepared.portable, *scan, want_adjoint, want_weights)
    spec = prepared.spec
    assert prepared.first is not None
    steps, rows, _, hidden = gi.shape
    first_gates, programs, block, _ = prepared.first.shape
    orders = Orders(states=1, mid=programs, gates=programs)
    mid = passes = dgh_n = dmid = None
    if want_weights or spec.grids.mid is not None:
        mid = mid_values(spec, states, h0, reverse, want_weights, orders)
        passes = mid.passes
    if want_weights:
        dgh_n = gi.new_empty((steps, rows, hidden))
        dmid = gi.new_empty((steps, rows, first_gates, hidden), dtype=torch.float32)
    dgi, dh0 = torch.empty_like(gi), torch.empty_like(h0)
    adjoint = torch.empty_like(states, dtype=torch.float32) if want_adjoint else None
    largest = torch.zeros((2, rows), dtype=torch.float32, device=gi.device)
    dstates, dlast = transposed(dstates, programs, largest[0]), transposed(dlast, programs, largest[1])
    ClusterCall(
        kernel=backward_kernel,
        grid=(1, cdiv(rows, TILE_ROWS), 1),
        io=(
            h0, mask, transposed(states, programs), packed(aligned(gates)), passes, dstates, dlast,
            dgi, dgh_n, dh0, adjoint, dmid,
        ),
        static=(largest, prepared.first, prepared.second, prepared.h_grid, steps, rows),
        constants={
            "H": hidden,
            "PROGRAMS": programs,
            "ROWS": TILE_ROWS,
            "STEPS": STEPS,
            "FIRST_GATES": first_gates,
            "RESCALE": _RESCALE,
            "CLIPPED": spec.grids.state is not None,
            "REVERSE": reverse,
        },
        warps=block // 16,
        cluster=programs,
        exchange=area_bytes(exchange_area(block, programs, TILE_ROWS, first_gates)),
        registers=registers(rows, programs, block // 16, gi.device),
    ).run()  # fmt: skip
    dfirst = dsecond = dbias = None
    if want_weights:
        assert mid is not None and dmid is not None and dgh_n is not None
        dfirst, dsecond, dbias = weight_gradients(spec, states, h0, reverse, mid, dmid, dgi, dgh_n, orders)
    dgi = dgi if interleaved else transposed(dgi, block)
    adjoint = None if adjoint is None else transposed(adjoint, block)
    return ScanGradients(dgi=dgi, dh0=dh0, adjoint=adjoint, dfirst=dfirst, dsecond=dsecond, dbias=dbias)
