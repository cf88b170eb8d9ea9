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
from .blocks import Axis, axes, natural, place, rows_before

#: Results of a program that takes several blocks, bytes of a sector of memory, and warps.
_RESULTS, _SECTOR, _WARPS = 4096, 32, 8


@triton.jit
def _inputs(at, ok, i, END, grid, inv, low, high, AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """Inputs ``i`` below ``END`` of blocks and rows at ``at``, as the product reads them: codes in fp16, or fp32."""
    x = tl.load(at[:, :, None] + place(i, AXIS)[None, None, :], mask=ok & (i < END)[None, None, :], other=0.0).to(tl.float32)
    if grid is not None:
        return codes(x, inv, low, high).to(tl.float16)
    else:
        return to_tf32(x, PRECISION)


@triton.jit
def _dot(x, w, total, PRECISION: tl.constexpr):
    """``total`` and the products of blocks ``[blocks, rows, in]`` with ``[blocks, in, out]``."""
    if x.shape[0] == 1:
        x = tl.reshape(x, (x.shape[1], x.shape[2]))
        w = tl.reshape(w, (w.shape[1], w.shape[2]))
        total = tl.dot(x, w, tl.reshape(total, (total.shape[1], total.shape[2])), input_precision=PRECISION)
        return tl.reshape(total, (1, total.shape[0], total.shape[1]))
    else:
        return tl.dot(x, w, total, input_precision=PRECISION)


@triton.jit
def _in_memory_order(values, RUN: tl.constexpr):
    """``[blocks, rows, elements]`` → ``[rows, runs, blocks * RUN]``: RUN elements of a block lie beside those of the next one."""
    BLOCKS: tl.constexpr = values.shape[0]
    RUNS: tl.constexpr = values.shape[2] // RUN
    values = tl.permute(tl.reshape(values, (BLOCKS, values.shape[1], RUNS, RUN)), (1, 2, 0, 3))
    return tl.reshape(values, (values.shape[0], RUNS, BLOCKS * RUN))


@triton.jit(do_not_specialize=["R", "B"])
def _kernel(
    states, h0, out, passes, weight, scale, h_grid, mid_grid, R, B,
    STATES_ROW: tl.constexpr, H0_ROW: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, IN: tl.constexpr, OUT_BLOCK: tl.constexpr, OUT: tl.constexpr,
    GATES: tl.constexpr, GROUPS: tl.constexpr, MID_SCALES: tl.constexpr, CODES: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out[r, g, k, o] = sum over i of weight[g, k, o, i] * x[r, k, i]``; programs differ in columns, then blocks, then rows.

    BLOCKS: a divisor of all, that a program takes together, because their results lie side by side.

    With ``h_grid`` products are of codes: one exact sum for each group of inputs, times its scale. With ``mid_grid`` ``out`` gets
    codes (CODES) or what they stand for. SCALE: strides of the weights' scales. BLOCK, IN, OUT_BLOCK, OUT: axes of blocks and
    elements of rows and of results; those of inputs in one stride where there are groups.
    """
    tiles: tl.constexpr = (OUT[0] + COLUMNS - 1) // COLUMNS
    WIDTH: tl.constexpr = IN[0] // GROUPS
    ONCE: tl.constexpr = GROUPS == 1 and WIDTH <= DEPTH
    CHANNELS: tl.constexpr = OUT_BLOCK[0] * OUT[0]
    turns: tl.constexpr = BLOCK[0] // BLOCKS
    first_o = tl.program_id(0) % tiles * COLUMNS
    first_k = tl.program_id(0) // tiles % turns * BLOCKS
    o = first_o + tl.arange(0, COLUMNS)
    k = first_k + tl.arange(0, BLOCKS)
    n = tl.cast(tl.program_id(0) // (tiles * turns), tl.int64) * ROWS + tl.arange(0, ROWS)
    own = (o < OUT[0])[None, None, :]
    ok = (n < R)[None, :, None]
    # Results as they lie in memory: rows, runs, and what is in a run.
    if BLOCKS == 1:
        RUN: tl.constexpr = COLUMNS
        at_run = place(o, OUT)[None, :]
        whole = (o < OUT[0])[None, :]
    else:
        RUN: tl.constexpr = 1 if OUT[1] == OUT[0] else OUT[1]
        run = first_o // RUN + tl.arange(0, COLUMNS // RUN)[:, None]
        c = tl.arange(0, BLOCKS * RUN)[None, :]
        at_run = run * (OUT[3] if OUT[1] == OUT[0] else OUT[2]) + c
        whole = run * RUN + c % RUN < OUT[0]
    position = place(first_k, OUT_BLOCK) + at_run[None, :, :]
    whole = (n < R)[:, None, None] & whole[None, :, :]
    at = rows_before(states, h0, n, R, B, STATES_ROW, H0_ROW, REVERSE)[None, :] + place(k, BLOCK)[:, None]
    depth = tl.arange(0, DEPTH)
    if h_grid is not None:
        h_scale, inv, low, high = load_grid(h_grid, 0, 1)
    else:
        inv, low, high = 1.0, 0.0, 0.0
    if ONCE:
        x_once = _inputs(at, ok, depth, WIDTH, h_grid, inv, low, high, IN, PRECISION)
    passed = tl.zeros((ROWS, COLUMNS // RUN, BLOCKS * RUN), tl.int32)
    for g in tl.static_range(GATES):
        row = ((g * BLOCK[0] + natural(k, BLOCK)) * OUT[0])[:, None, None] + natural(o, OUT)[None, None, :]
        total = tl.zeros((BLOCKS, ROWS, COLUMNS), tl.float32)
        for j in tl.range(0, GROUPS, num_stages=1):
            acc = tl.zeros((BLOCKS, ROWS, COLUMNS), tl.float32)
            for start in tl.range(0, WIDTH, DEPTH, num_stages=1):
                i = j * WIDTH + start + depth
                end = (j + 1) * WIDTH
                x = x_once if ONCE else _inputs(at, ok, i, end, h_grid, inv, low, high, IN, PRECISION)
                weight_p = weight + row * IN[0] + natural(i, IN)[None, :, None]
                w = tl.load(weight_p, mask=own & (i < end)[None, :, None], other=0)
                if h_grid is not None:
                    acc = _dot(x, w.to(tl.float16), acc, PRECISION)
                else:
                    acc = _dot(x, to_tf32(w.to(tl.float32), PRECISION), acc, PRECISION)
            if h_grid is not None:
                scale_at = (natural(k, BLOCK) * SCALE[1])[:, None, None] + (natural(o, OUT) * SCALE[2])[None, None, :]
                acc = acc * (h_scale * tl.load(scale + g * SCALE[0] + j * SCALE[3] + scale_at, mask=own, other=0.0))
            total += acc
        total = _in_memory_order(total, RUN)
        if mid_grid is not None:
            mid_scale, mid_inv, mid_low, mid_high = load_grid(mid_grid, g if MID_SCALES > 1 else 0, MID_SCALES)
            passed |= in_range(total, mid_inv, mid_low, mid_high).to(tl.int32) << g
            total = codes(total, mid_inv, mid_low, mid_high)
            if not CODES:
                total = total * mid_scale
        if out is not None:
            tl.store(out + (n * GATES + g)[:, None, None] * CHANNELS + position, total.to(out.dtype.element_ty), mask=whole)
    if passes is not None:
        tl.store(passes + n[:, None, None] * CHANNELS + position, passed.to(tl.uint8), mask=whole)


def _together(block: Axis, element: Axis, width: int) -> int:
    """How many blocks a program takes, of results of ``width`` bytes: several where those of a block, as floats, fill no sector
    of memory in a row, and those of the next block lie beside them. Warps share blocks out, so that there is one for each."""
    if element.count == element.size and element.inner == 1:
        return 1
    run = 1 if element.count == element.size else element.count
    together = max(_WARPS, min(2 * _WARPS, _SECTOR // (run * width)))
    fits = block.inner == run and run & (run - 1) == 0 and block.count % together == 0
    return together if fits and 4 * run < _SECTOR else 1


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
    together = _together(out_block, out, dtype.itemsize)
    if together > 1:
        tile_rows = min(tile_rows, max(16, _RESULTS // (together * columns)))
    KernelCall(
        kernel=_kernel,
        grid=(blocks // together * cdiv(outs, columns) * cdiv(size, tile_rows), 1, 1),
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
            "BLOCKS": together,
            "ROWS": tile_rows,
            "COLUMNS": columns,
            "DEPTH": depth,
        },
        warps=4 if is_old else _WARPS,
        portable=h_grid is not None,
    ).run()
    return values, passes
