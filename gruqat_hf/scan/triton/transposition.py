"""Tensors from one order of channels to another: rows of ``[A, B]`` to rows of ``[B, A]``.

Clusters of :mod:`..hopper.monarch` give program ``p`` of C every C-th channel, and read and write fastest where a program's
channels lie together: channel ``u * C + p`` at place ``p * BLOCK + u`` of its row, which is such a transposition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exchange_plan import cdiv
from .family import KernelCall, aligned
from .magnitude import magnitude_bits

#: Values that a program moves.
_VALUES = 4096


@triton.jit(do_not_specialize=["R", "N"])
def _transpose(x, out, largest, R, N, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """``x`` ``[R, A, B]`` → ``out`` ``[R, B, A]``; ``largest`` ``[N]``: bits of fp32 values, each raised to the largest magnitude
    of every N-th row."""
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * (A * B) + tl.arange(0, A * B)[None, :]
    ok = (row < R)[:, None]
    values = tl.load(x + at, mask=ok, other=0)
    if largest is not None:
        tl.atomic_max(largest + row % N, tl.max(magnitude_bits(values), axis=1), mask=row < R, sem="relaxed")
    values = tl.permute(values.reshape(ROWS, A, B), (0, 2, 1)).reshape(ROWS, A * B)
    tl.store(out + at, values, mask=ok)


def transposition(x: Tensor, out: Tensor, inner: int, largest: Tensor | None = None) -> KernelCall:
    """The launch that fills ``out``, ``[..., n * inner]`` as ``x``, rows of ``[n, inner]`` as those of ``[inner, n]``.

    Args:
        largest: ``[N]`` fp32, each value raised to the largest magnitude of every N-th row of ``x``; infinity and NaN do not
            count.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    together = max(1, _VALUES // width)
    return KernelCall(
        kernel=_transpose,
        grid=(cdiv(rows, together), 1, 1),
        io=(x, out, None if largest is None else largest.view(torch.int32)),
        static=(rows, 1 if largest is None else largest.numel()),
        constants={"A": width // inner, "B": inner, "ROWS": together},
    )


def transposed(x: Tensor, inner: int, largest: Tensor | None = None) -> Tensor:
    """As :func:`transposition`, into a new tensor. Both factors of the width must be powers of two."""
    x = aligned(x.contiguous())
    out = torch.empty_like(x)
    if x.numel():
        transposition(x, out, inner, largest).run()
    return out
