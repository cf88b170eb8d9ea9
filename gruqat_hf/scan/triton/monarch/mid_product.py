"""The first factor's product with all rows at once: for the backward pass with everything around it, for observers by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....operands import Factor
from ....quantization import Grid
from ...spec import pack_grid
from ..device import device_facts
from ..exchange_plan import cdiv, power_of_two
from ..family import KernelCall
from ..math import codes, in_range, load_grid, to_tf32
from .blocks import axes, natural, place, rows_before


@triton.jit
def _inputs(at, ok, i, END, grid, inv, low, high, AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """Inputs ``i`` below ``END`` of the rows at ``at``, as the product reads them: codes in fp16, or fp32."""
    x = tl.load(at[:, None] + place(i, AXIS)[None, :], mask=ok[:, None] & (i < END)[None, :], other=0.0).to(tl.float32)
    if grid is not None:
        return codes(x, inv, low, high).to(tl.float16)
    else:
        return to_tf32(x, PRECISION)


@triton.jit(do_not_specialize=["R", "B"])
def _kernel(
    states, h0, out, passes, weight, scale, h_grid, mid_grid, R, B,
    STATES_ROW: tl.constexpr, H0_ROW: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, IN: tl.constexpr, OUT_BLOCK: tl.constexpr, OUT: tl.constexpr,
    GATES: tl.constexpr, GROUPS: tl.constexpr, MID_SCALES: tl.constexpr, CODES: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out[r, g, k, o] = sum over i of weight[g, k, o, i] * x[r, k, i]``; programs differ in columns, then blocks, then rows.

    With ``h_grid`` products are of codes: one exact sum for each group of inputs, times its scale. With ``mid_grid`` ``out`` gets
    codes (CODES) or what they stand for. SCALE: strides of the weights' scales. BLOCK, IN, OUT_BLOCK, OUT: axes of blocks and
    elements of rows and of results; those of inputs in one stride where there are groups.
    """
    tiles: tl.constexpr = (OUT[0] + COLUMNS - 1) // COLUMNS
    WIDTH: tl.constexpr = IN[0] // GROUPS
    ONCE: tl.constexpr = GROUPS == 1 and WIDTH <= DEPTH
    CHANNELS: tl.constexpr = OUT_BLOCK[0] * OUT[0]
    o = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(0) // tiles % BLOCK[0]
    n = tl.cast(tl.program_id(0) // (tiles * BLOCK[0]), tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = n < R
    own = o < OUT[0]
    whole = ok[:, None] & own[None, :]
    position = (place(k, OUT_BLOCK) + place(o, OUT))[None, :]
    at = rows_before(states, h0, n, R, B, STATES_ROW, H0_ROW, REVERSE) + place(k, BLOCK)
    depth = tl.arange(0, DEPTH)
    if h_grid is not None:
        h_scale, inv, low, high = load_grid(h_grid, 0, 1)
    else:
        inv, low, high = 1.0, 0.0, 0.0
    if ONCE:
        x_once = _inputs(at, ok, depth, WIDTH, h_grid, inv, low, high, IN, PRECISION)
    passed = tl.zeros((ROWS, COLUMNS), tl.int32)
    for g in tl.static_range(GATES):
        weight_p = weight + ((g * BLOCK[0] + natural(k, BLOCK)) * OUT[0] + natural(o, OUT))[None, :] * IN[0]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for j in tl.range(0, GROUPS, num_stages=1):
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in tl.range(0, WIDTH, DEPTH, num_stages=1):
                i = j * WIDTH + start + depth
                end = (j + 1) * WIDTH
                x = x_once if ONCE else _inputs(at, ok, i, end, h_grid, inv, low, high, IN, PRECISION)
                w = tl.load(weight_p + natural(i, IN)[:, None], mask=own[None, :] & (i < end)[:, None], other=0)
                if h_grid is not None:
                    acc = tl.dot(x, w.to(tl.float16), acc)
                else:
                    acc = tl.dot(x, to_tf32(w.to(tl.float32), PRECISION), acc, input_precision=PRECISION)
            if h_grid is not None:
                scale_p = scale + g * SCALE[0] + natural(k, BLOCK) * SCALE[1] + natural(o, OUT) * SCALE[2] + j * SCALE[3]
                acc = acc * (h_scale * tl.load(scale_p, mask=own, other=0.0))[None, :]
            total += acc
        if mid_grid is not None:
            mid_scale, mid_inv, mid_low, mid_high = load_grid(mid_grid, g if MID_SCALES > 1 else 0, MID_SCALES)
            passed |= in_range(total, mid_inv, mid_low, mid_high).to(tl.int32) << g
            total = codes(total, mid_inv, mid_low, mid_high)
            if not CODES:
                total = total * mid_scale
        if out is not None:
            tl.store(out + (n * GATES + g)[:, None] * CHANNELS + position, total.to(out.dtype.element_ty), mask=whole)
    if passes is not None:
        tl.store(passes + n[:, None] * CHANNELS + position, passed.to(tl.uint8), mask=whole)


def code_dtype(grid: Grid) -> torch.dtype:
    """The smallest in which a grid's codes are exact."""
    return torch.int8 if grid.magnitude <= 127 else torch.float16 if grid.magnitude <= 2048 else torch.float32


def multiply(
    first: Factor,
    h_grid: Grid | None,
    rows: Tensor,
    precision: str,
    *,
    h0: Tensor | None = None,
    reverse: bool = False,
    mid_grid: Grid | None = None,
    as_codes: bool = False,
    want_values: bool = True,
    programs: tuple[int, int] = (1, 1),
) -> tuple[Tensor | None, Tensor | None]:
    """The mid values of ``rows`` ``[R, H]``, ``[R, g, H]``, and where ``mid_grid`` lets gradients through.

    Args:
        h_grid: of the rows; the product must then be ``is_exact``.
        h0: rows are the states ``rows`` one step before, and these, ``[B, H]``, before the first step.
        mid_grid: that the results go through, which become values of the grid in fp32, or its codes in :func:`code_dtype`.
        programs: whose exchange orders ``rows`` and the results are in; 1 for natural order.

    Returns:
        The values, None unless wanted, and ``[R, H]`` uint8 with bit i for the i-th of g; None without a mid grid.
    """
    gates, blocks, outs, ins = first.values.shape
    size, channels = rows.shape[0], blocks * outs
    dtype = code_dtype(mid_grid) if mid_grid is not None and as_codes else torch.float32
    values = torch.empty((size, gates, channels), dtype=dtype, device=rows.device) if want_values else None
    passes = None if mid_grid is None else torch.empty((size, channels), dtype=torch.uint8, device=rows.device)
    scale, mid = None, pack_grid(mid_grid)
    if h_grid is not None:
        assert first.scale is not None
        scale = first.scale.expand(*first.values.shape[:3], first.groups)
    block, element = axes(rows.shape[1], blocks, False, programs[0])
    out_block, out = axes(channels, blocks, False, programs[1])
    block, out_block = block.split_like(out_block), out_block.split_like(block)
    groups = 1 if scale is None else first.groups
    assert groups == 1 or element.count == element.size
    # Before Ampere a product holds more of its operands in registers.
    is_old = torch.version.hip is None and device_facts(rows.device).capability < (8, 0)
    tile_rows, most = (32, 32) if is_old else (128, 64)
    columns, depth = (min(most, max(16, power_of_two(size))) for size in (outs, ins // groups))
    KernelCall(
        kernel=_kernel,
        grid=(blocks * cdiv(outs, columns) * cdiv(size, tile_rows), 1, 1),
        io=(rows, h0, values, passes),
        static=(first.values.contiguous(), scale, pack_grid(h_grid), mid, size, 0 if h0 is None else h0.shape[0]),
        constants={
            "STATES_ROW": rows.stride(0),
            "H0_ROW": 0 if h0 is None else h0.stride(0),
            "SCALE": None if scale is None else scale.stride(),
            "BLOCK": tuple(block),
            "IN": tuple(element),
            "OUT_BLOCK": tuple(out_block),
            "OUT": tuple(out),
            "GATES": gates,
            "GROUPS": groups,
            "MID_SCALES": 1 if mid is None else mid.shape[1],
            "CODES": as_codes,
            "REVERSE": reverse,
            "PRECISION": precision,
            "ROWS": tile_rows,
            "COLUMNS": columns,
            "DEPTH": depth,
        },
        warps=4 if is_old else 8,
        portable=h_grid is not None,
    ).run()
    return values, passes
