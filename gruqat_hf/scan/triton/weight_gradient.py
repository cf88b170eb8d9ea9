"""Gradient of a block-diagonal operand's values: one product over all steps and rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import ScanSpec, is_integer, pack_grid
from .device import device_facts
from .exchange_plan import cdiv, power_of_two
from .family import KernelCall
from .math import codes, count, load_grid, to_tf32
from .precision import fp32_precision

#: Rows that a program adds up at a time, and loads of them on their way: by the bytes of a value in tf32, and else. Measured.
_DEPTH_AND_STAGES = {4: (16, 3), 2: (64, 2)}
_OTHER_DEPTH_AND_STAGES = 32, 3
#: Rows at least for each program.
_ROWS = 128


@triton.jit(do_not_specialize=["R", "B", "CHUNK"])
def _kernel(
    dgi, dgh_n, h0, states, h_grid, parts, R, B, CHUNK,
    H: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, REVERSE: tl.constexpr, INTEGER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, k, j): a ``[out, in]`` tile of block k, of rows j * CHUNK and on, all three gates.

    Rows are step * B + batch; ``states`` one step earlier are the inputs.
    """
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    k = tl.program_id(1)
    j = tl.program_id(2)
    o = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    i = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    own_o = (o < SIZE)[None, :]
    own_i = (i < SIZE)[None, :]
    if h_grid is not None:
        h_scale, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    dw_r = tl.zeros((TILE, TILE), tl.float32)
    dw_z = dw_r
    dw_n = dw_r
    begin = tl.cast(j, tl.int64) * CHUNK
    for start in tl.range(0, count(CHUNK), DEPTH, num_stages=STAGES):
        n = begin + start + tl.arange(0, DEPTH)
        here = (start + tl.arange(0, DEPTH) < CHUNK) & (n < R)
        before = n - B
        initial = n
        if REVERSE:
            before = n + B
            initial = n - (R - B)
        is_first = (before < 0) | (before >= R)
        channel = (k * SIZE + i)[None, :]
        later = (here & (is_first == 0))[:, None] & own_i
        x = tl.load(states + before[:, None] * H + channel, mask=later, other=0.0).to(tl.float32)
        x += tl.load(h0 + initial[:, None] * H + channel, mask=(here & is_first)[:, None] & own_i, other=0.0).to(tl.float32)
        if h_grid is not None:
            x = codes(x, h_inv, h_low, h_high)
            if not INTEGER:
                x = x * h_scale
        p = dgi + n[:, None] * (3 * H) + (k * SIZE + o)[None, :]
        inside = here[:, None] & own_o
        g_r = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        g_z = tl.load(p + H, mask=inside, other=0.0).to(tl.float32)
        g_n = tl.load(dgh_n + n[:, None] * H + (k * SIZE + o)[None, :], mask=inside, other=0.0).to(tl.float32)
        x, g_n = to_tf32(x, PRECISION), to_tf32(g_n, PRECISION)
        g_r, g_z = to_tf32(g_r, PRECISION), to_tf32(g_z, PRECISION)
        dw_r = tl.dot(tl.trans(g_r), x, dw_r, input_precision=PRECISION)
        dw_z = tl.dot(tl.trans(g_z), x, dw_z, input_precision=PRECISION)
        dw_n = tl.dot(tl.trans(g_n), x, dw_n, input_precision=PRECISION)
    out = parts + (tl.cast(j, tl.int64) * 3 * H + k * SIZE) * SIZE + o[:, None] * SIZE + i[None, :]
    inside = (o < SIZE)[:, None] & (i < SIZE)[None, :]
    tl.store(out, dw_r, mask=inside)
    tl.store(out + H * SIZE, dw_z, mask=inside)
    tl.store(out + 2 * H * SIZE, dw_n, mask=inside)


def weight_gradient(spec: ScanSpec, dgi: Tensor, dgh_n: Tensor, h0: Tensor, states: Tensor, reverse: bool) -> Tensor:
    """Gradient of the values of the operand's one factor, fp32.

    Args:
        dgi, dgh_n: gradients of the hidden product: the first two gates of ``dgi`` and ``dgh_n``.
        h0, states: what the product was taken of.
    """
    (factor,) = spec.operand.factors.values()
    _, blocks, size, _ = factor.values.shape
    steps, rows, hidden = states.shape
    total = steps * rows
    precision = fp32_precision(spec)
    tile = min(64 if precision == "tf32" else 32, max(16, power_of_two(size)))
    tiles = cdiv(size, tile) ** 2
    # About two programs for each processor, each with enough rows to be worth its sum.
    chunks = max(1, min(cdiv(total, _ROWS), 2 * device_facts(dgi.device).processors // (tiles * blocks)))
    depth, stages = _DEPTH_AND_STAGES[dgi.element_size()] if precision == "tf32" else _OTHER_DEPTH_AND_STAGES
    parts = dgi.new_empty((chunks, *factor.values.shape), dtype=torch.float32)
    integer = is_integer(factor, spec.grids.h)
    KernelCall(
        kernel=_kernel,
        grid=(tiles, blocks, chunks),
        io=(dgi, dgh_n, h0, states),
        static=(pack_grid(spec.grids.h), parts, total, rows, cdiv(total, chunks)),
        constants={
            "H": hidden,
            "SIZE": size,
            "TILE": tile,
            "DEPTH": depth,
            "STAGES": stages if device_facts(dgi.device).shared_bytes > 1 << 17 else 1,
            "REVERSE": reverse,
            "INTEGER": integer,
            "PRECISION": precision,
        },
    ).run()
    result = parts.sum(0)
    if factor.scale is None:
        return result
    scale = spec.grids.h.scale.reshape(-1, 1, 1, 1) * factor.scale if integer else factor.scale
    return (result.unflatten(-1, (factor.groups, -1)) * scale.unsqueeze(-1)).flatten(-2)
