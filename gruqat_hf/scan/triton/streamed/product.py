"""The product that both streamed scans are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from ..math import codes, to_tf32
from ..memory import fetch


@triton.jit
def product(
    weight, x, o, scale, own, b, rows_in, grid,
    PADDED: tl.constexpr, IN: tl.constexpr, ROW: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``o`` of a ``weight`` times ``IN`` inputs, ``[TILE, ROWS]`` fp32. Input i of row b is at ``x + b * ROW + i * STRIDE``.

    With a ``scale`` the product is one of codes: a group's sum is exact, group terms are added in ascending order. Scales of the
    next group lie SCALES further. ROUND without a ``scale``: inputs are put on their ``grid``, weights are float.
    """
    INTEGER: tl.constexpr = scale is not None
    WIDTH: tl.constexpr = IN // GROUPS
    total = tl.zeros((TILE, ROWS), tl.float32)
    for g in tl.range(0, GROUPS, num_stages=STAGES if WIDTH <= DEPTH else 1):
        part = tl.zeros((TILE, ROWS), tl.int32 if INTEGER else tl.float32)
        for start in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
            inside = start + tl.arange(0, DEPTH)
            i = g * WIDTH + inside
            w = tl.load(weight + o[:, None] * PADDED + i[None, :], mask=(inside < WIDTH)[None, :], other=0.0)
            at = x + b[None, :] * ROW + i[:, None] * STRIDE
            v = fetch(at, (inside < WIDTH)[:, None] & rows_in[None, :])
            if INTEGER:
                part += tl.dot(w, codes(v, grid[1], grid[2], grid[3]).to(w.dtype)).to(tl.int32)
            else:
                if ROUND:
                    v = codes(v, grid[1], grid[2], grid[3]) * grid[0]
                v = v.to(w.dtype)
                if w.dtype == tl.float32:
                    v = to_tf32(v, PRECISION)
                part = tl.dot(w, v, part, input_precision=PRECISION)
        if INTEGER:
            total += part.to(tl.float32) * tl.load(scale + g * SCALES + o, mask=own, other=0.0)[:, None]
        else:
            total += part
    return total
