"""Forward scan of a block-diagonal operand on Hopper.

A step waits for: state to shared memory, barrier, product, gates. All else is out of its way: weights stay in registers, inputs
of the next STAGES steps are on their way to shared memory, those of the next one to registers.
"""

from __future__ import annotations

from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import BlockWeights, packed, prepare
from ...triton.device import device_facts
from ...triton.exchange_plan import cdiv
from ...triton.family import KernelCall, aligned
from ...triton.math import codes, gru_gates, in_range, load_grid, pack_gates
from ..gluon import commit_copies, copy_to_shared, gl, jit, mma_v2, wait_for_copies
from ..layouts import (
    copy_layout,
    gate_layout,
    load_weights,
    operand_memory,
    product_layout,
    ring_memory,
    to_columns,
    to_gates,
    to_product,
)
from . import STAGES, rows_of_tile

__all__ = ["call", "forward", "prepare"]


@jit
def _read(ring, slot, ROWS: gl.constexpr, GATES: gl.constexpr):
    """The three gates' inputs of a step, fp32."""
    tile = ring.index(slot)
    r = tile.slice(0, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    z = tile.slice(ROWS, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    n = tile.slice(2 * ROWS, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    return r, z, n


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, STATE_N: gl.constexpr,
    FULL: gl.constexpr, REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on. Parameters as in the portable tier's kernel of the same name.

    Steps go in pairs, each with shared memory of its own: what one step writes no thread can still be reading for the other, so
    that one barrier a step is enough. A last step that is none computes on zeros, and stores nothing.
    """
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    PRODUCT: gl.constexpr = product_layout(BLOCK)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    BYTES: gl.constexpr = gi.dtype.element_ty.primitive_bitwidth // 8
    COPY: gl.constexpr = copy_layout(BLOCK, BYTES, BLOCK // 16)
    RING: gl.constexpr = ring_memory(BLOCK, ROWS, BYTES)
    SLOTS: gl.constexpr = STAGES // 2
    k = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS

    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    tile = weight + k * BLOCK * BLOCK
    w_r = load_weights(tile, BLOCK)
    w_z = load_weights(tile + gate_stride, BLOCK)
    w_n = load_weights(tile + 2 * gate_stride, BLOCK)

    s = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = k * SIZE + s
    b_r = gl.load(bias + c, mask=own, other=0.0)[:, None]
    b_z = gl.load(bias + H + c, mask=own, other=0.0)[:, None]
    b_n = gl.load(bias + 2 * H + c, mask=own, other=0.0)[:, None]
    zeros = gl.full([BLOCK, ROWS], 0.0, gl.float32, layout=GATES)
    if PORTABLE:
        start_r = to_product(zeros)
        start_z = start_r
        start_n = start_r
        s_r = gl.load(scale + c, mask=own, other=0.0)[:, None]
        s_z = gl.load(scale + H + c, mask=own, other=0.0)[:, None]
        s_n = gl.load(scale + 2 * H + c, mask=own, other=0.0)[:, None]
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    else:
        start_r = to_product(zeros + b_r)
        start_z = to_product(zeros + b_z)
        start_n = to_product(zeros + b_n)
    if state_grid is not None:
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    inside = (own[:, None] & (b < B)[None, :]) | FULL
    offset = b[None, :] * H + c[:, None]
    h = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row
    if gates is not None:
        PACKED: gl.constexpr = gates.dtype.element_ty == gl.int64
        planes: gl.constexpr = 1 if PACKED else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b
        real_0 = gl.load(mask_p, mask=b < B, other=0)
        real_1 = gl.load(mask_p + sign * B, mask=(b < B) & (1 < T), other=0)

    # A ring's slot is [4 * ROWS, BLOCK]: r, z, n, and a quarter that no one reads.
    even = gl.allocate_shared_memory(gi.dtype.element_ty, [SLOTS, 4 * ROWS, BLOCK], RING)
    odd = gl.allocate_shared_memory(gi.dtype.element_ty, [SLOTS, 4 * ROWS, BLOCK], RING)
    line = gl.arange(0, 4 * ROWS, layout=gl.SliceLayout(1, COPY))
    channel = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))
    line_b = first_row + line % ROWS
    copied = ((line < 3 * ROWS) & (line_b < B))[:, None] & (channel < SIZE)[None, :]
    copy_offset = (line_b * (3 * H) + line // ROWS * H)[:, None] + (k * SIZE + channel)[None, :]
    gi_p = gi + start * row * 3
    for i in gl.static_range(STAGES):
        copy_to_shared((even if i % 2 == 0 else odd).index(i // 2), gi_p + copy_offset, mask=copied & (i < T))
        commit_copies()
        gi_p += step * 3
    x_even = gl.allocate_shared_memory(gl.float16, [BLOCK, 8], operand_memory(BLOCK))
    x_odd = gl.allocate_shared_memory(gl.float16, [BLOCK, 8], operand_memory(BLOCK))
    wait_for_copies(STAGES - 1)
    gi_r, gi_z, gi_n = _read(even, 0, ROWS, GATES)

    for t in range(0, T, 2):
        slot = (t // 2) % SLOTS
        for u in gl.static_range(2):
            x_memory = x_even if u == 0 else x_odd
            if PORTABLE:
                x = codes(h, h_inv, h_low, h_high).to(gl.float16)
            else:
                x = h.to(gl.float16)
            x_memory.store(to_columns(x))
            wait_for_copies(STAGES - 2)
            right = x_memory.load(RIGHT)
            copy_to_shared((even if u == 0 else odd).index(slot), gi_p + copy_offset, mask=copied & (t + u + STAGES < T))
            commit_copies()
            gi_p += step * 3
            gh_r = to_gates(mma_v2(w_r, right, start_r), ROWS)
            gh_n = to_gates(mma_v2(w_n, right, start_n), ROWS)
            gh_z = to_gates(mma_v2(w_z, right, start_z), ROWS)
            if PORTABLE:
                gh_r = gh_r * s_r + b_r
                gh_z = gh_z * s_z + b_z
                gh_n = gh_n * s_n + b_n
            next_r, next_z, next_n = _read(odd if u == 0 else even, slot if u == 0 else (t // 2 + 1) % SLOTS, ROWS, GATES)
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h, PORTABLE)
            gi_r = next_r
            gi_z = next_z
            gi_n = next_n
            if state_grid is not None:
                if gates is not None:
                    z = gl.where(in_range(new, state_inv, state_low, state_high), z, -1.0)
                new = codes(new, state_inv, state_low, state_high) * state_scale
            if mask is not None:
                new = gl.where(((real_0 if u == 0 else real_1) != 0)[None, :], new, h)
            h = new
            here = inside & (t + u < T)
            gl.store(out_p + offset, h.to(states.dtype.element_ty), mask=here)
            out_p += step
            if gates is not None:
                if PACKED:
                    gl.store(gates_p + gates_offset, pack_gates(r, z, n, hn), mask=here)
                else:
                    gl.store(gates_p + gates_offset, r, mask=here)
                    gl.store(gates_p + gates_offset + H, z, mask=here)
                    gl.store(gates_p + gates_offset + 2 * H, n, mask=here)
                    gl.store(gates_p + gates_offset + 3 * H, hn, mask=here)
                gates_p += step * planes
        if mask is not None:
            mask_p += 2 * sign * B
            real_0 = gl.load(mask_p, mask=(b < B) & (t + 2 < T), other=0)
            real_1 = gl.load(mask_p + sign * B, mask=(b < B) & (t + 3 < T), other=0)


def call(
    weights: BlockWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> KernelCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    tile = rows_of_tile(weights.blocks, rows, device_facts(gi.device).processors)
    return KernelCall(
        kernel=_forward,
        grid=(weights.blocks, cdiv(rows, tile), 1),
        io=(gi, h0, mask, states, packed(gates)),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "BLOCK": weights.padded,
            "ROWS": tile,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "FULL": weights.size == weights.padded and rows % tile == 0,
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=weights.padded // 16,
        portable=weights.quantized,
    )


def forward(
    weights: BlockWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    call(weights, aligned(gi), h0, mask, reverse, states, gates).run()
