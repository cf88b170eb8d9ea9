"""NaN in states whose codes are bytes, of which none means NaN."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton.family import KernelCall
from ...triton.math import count


@triton.jit(do_not_specialize=["T", "B"])
def _spread(
    h0, mask, states, T, B, H: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Program (b, k): block k of row b. A channel that is NaN once is so at the end, which is all that is read as a rule."""
    b = tl.program_id(0)
    s = tl.arange(0, PADDED)
    own = s < SIZE
    c = b * H + tl.program_id(1) * SIZE + s
    row = tl.cast(B, tl.int64) * H
    last = tl.cast(T, tl.int64) - 1
    x = tl.load(states + (0 if REVERSE else last * row) + c, mask=own, other=0.0)
    if tl.max((x != x).to(tl.int32), axis=0) != 0:
        x = tl.load(h0 + c, mask=own, other=0.0).to(tl.float32)
        found = tl.max((x != x).to(tl.int32), axis=0)
        spreads = 0
        for i in tl.range(0, count(T)):
            t = tl.cast(i, tl.int64)
            if REVERSE:
                t = last - t
            real = 1
            if mask is not None:
                real = tl.load(mask + t * B + b).to(tl.int32)
            spreads = tl.where((found != 0) & (real != 0), 1, spreads)
            x = tl.load(states + t * row + c, mask=own, other=0.0)
            found = tl.maximum(found, tl.max((x != x).to(tl.int32), axis=0))
            tl.store(states + t * row + c, float("nan"), mask=own & (spreads != 0))


def spread_nan(h0: Tensor, mask: Tensor | None, states: Tensor, size: int, reverse: bool) -> None:
    """Make a block's channels NaN from the step on that follows one with a NaN among them, as a product with it would.

    Args:
        h0: ``[B, H]``; mask: ``[T, B]`` uint8 or None; states: ``[T, B, H]`` fp32, changed in place; size: of a block.
    """
    steps, rows, hidden = states.shape
    KernelCall(
        kernel=_spread,
        grid=(rows, hidden // size, 1),
        io=(h0, mask, states),
        static=(steps, rows),
        constants={"H": hidden, "SIZE": size, "PADDED": triton.next_power_of_2(size), "REVERSE": reverse},
    ).run()
