"""What the backward kernels of blocks leave behind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gluon import gl, jit


class Gradients(NamedTuple):
    """Attributes:
    dgi: ``[T, B, 3, H]``, dgh_n: ``[T, B, H]``, dh0: ``[B, H]``, in the dtypes of gi and h0.
    adjoint: ``[T, B, H]`` fp32, or None.
    """

    dgi: Tensor
    dgh_n: Tensor
    dh0: Tensor
    adjoint: Tensor | None

    @classmethod
    def like(cls, gi: Tensor, h0: Tensor, want_adjoint: bool) -> Gradients:
        """Room for them."""
        states = (gi.shape[0], *h0.shape)
        adjoint = gi.new_empty(states, dtype=torch.float32) if want_adjoint else None
        return cls(torch.empty_like(gi), gi.new_empty(states), torch.empty_like(h0), adjoint)


def room_for_sums(gi: Tensor, tiles: int) -> Tensor:
    """``[6, tiles of rows, H]`` fp32: of each tile, the sums for the hidden bias's gates, then for those of the input's."""
    return gi.new_empty((6, tiles, gi.shape[3]), dtype=torch.float32)


@jit
def store_step(dgi_p, dgh_n_p, adjoint_p, grad, c_r, c_z, c_hn, c_n, here, H: gl.constexpr):
    """Store a step's gradients where ``here``, and give those of r, z, the hidden product's n and the input's n.

    ``grad`` is that of the step's state, 0 where a mask says that the step does not run.
    """
    if adjoint_p is not None:
        gl.store(adjoint_p, grad, mask=here)
    da_r = grad * c_r
    da_z = grad * c_z
    da_n = grad * c_n
    dh_n = grad * c_hn
    gl.store(dgi_p, da_r.to(dgi_p.dtype.element_ty), mask=here)
    gl.store(dgi_p + H, da_z.to(dgi_p.dtype.element_ty), mask=here)
    gl.store(dgi_p + 2 * H, da_n.to(dgi_p.dtype.element_ty), mask=here)
    gl.store(dgh_n_p, dh_n.to(dgh_n_p.dtype.element_ty), mask=here)
    return da_r, da_z, dh_n, da_n


@jit
def store_sums(sums_p, gate, db_r, db_z, db_n, db_in, own):
    """Sum ``[channels, rows]`` over a tile's rows, and store what both biases get: six values of each channel, ``gate`` apart."""
    sum_r = gl.sum(db_r, axis=1)
    sum_z = gl.sum(db_z, axis=1)
    gl.store(sums_p, sum_r, mask=own)
    gl.store(sums_p + gate, sum_z, mask=own)
    gl.store(sums_p + 2 * gate, gl.sum(db_n, axis=1), mask=own)
    gl.store(sums_p + 3 * gate, sum_r, mask=own)
    gl.store(sums_p + 4 * gate, sum_z, mask=own)
    gl.store(sums_p + 5 * gate, gl.sum(db_in, axis=1), mask=own)
