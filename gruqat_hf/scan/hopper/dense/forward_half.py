"""Forward scan of large blocks on Hopper clusters whose products are of fp16 operands, floats or integers.

A step waits for: the others' states, product, sum over its parts, gates, own state to all others. Weights stay in registers,
inputs of the next steps are on their way to shared memory, results are stored after the state is sent.
"""

from __future__ import annotations

import triton
from torch import Tensor

from ...spec import grid_size
from ...triton.block_diagonal.weights import packed
from ...triton.math import codes, gru_gates, in_range, load_grid
from ..cluster import ClusterCall
from ..exchange import area_of, area_shape, close_exchange, open_exchange, read_chunks, send_chunks, wait_for_round
from ..gluon import gl, jit, mma_v2, wait_for_copies
from ..layouts import copy_layout, ring_memory
from . import STAGES
from .layouts import CHANNELS, ROWS, SPLITS, WARPS, product_layout, send_layout, sum_layout, sum_memory
from .tiles import fetch_inputs, lines_of_slot, load_gates, read_gate, store_gates
from .weights import HalfWeights

_CHANNELS = gl.constexpr(CHANNELS)
_ROWS = gl.constexpr(ROWS)
_SPLITS = gl.constexpr(SPLITS)


@jit
def _operand_at(DEPTH: gl.constexpr):
    """Where in a slot the first chunk of a thread's part of a product's right side lies."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(), 2)
    split = gl.arange(0, _SPLITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    k = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    return split * (DEPTH * _ROWS * 2) + row * (_CHANNELS * 2) + ((k >> 1) & 3) * 16


@jit
def _load_weights(weight, DEPTH: gl.constexpr):
    """A program's part of a gate's weights into registers, as a product's left side."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(), 2)
    split = gl.arange(0, _SPLITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    out = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    into = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    return gl.load(weight + (split * _CHANNELS + out) * DEPTH + into)


@jit
def _summed(memory):
    """The sum of a product's parts, as a tile of gates."""
    return gl.sum(memory.load(sum_layout()), axis=0)


@jit
def _send(x, memory, area, to, SLOT: gl.constexpr, AREA: gl.constexpr, PROGRAMS: gl.constexpr):
    """A program's slice of the state to all programs, itself as well."""
    SEND: gl.constexpr = send_layout(PROGRAMS)
    memory.permute([1, 0]).store(x.to(gl.float16))
    chunk = gl.expand_dims(memory.load(gl.SliceLayout(0, SEND)), 0)
    chunk, _ = gl.broadcast(chunk, area)
    send_chunks(chunk, area, to, SLOT, AREA)


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, STATE_N: gl.constexpr,
    REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (p, j, k): slice p of block k, of rows j * ROWS and on. Other parameters as in the block-diagonal kernel.

    Steps go in pairs for the two slots of the exchange; a last step that is none computes on zeros, and stores nothing.
    """
    SUMS: gl.constexpr = sum_layout()
    GATES: gl.constexpr = gl.SliceLayout(0, SUMS)
    PRODUCT: gl.constexpr = product_layout()
    SEND: gl.constexpr = send_layout(PROGRAMS)
    BLOCK: gl.constexpr = PROGRAMS * _CHANNELS
    DEPTH: gl.constexpr = BLOCK // _SPLITS
    AREA: gl.constexpr = area_shape((BLOCK * _ROWS * 2,), 2)
    WIDTH: gl.constexpr = gi.dtype.element_ty.primitive_bitwidth // 8
    COPY: gl.constexpr = copy_layout(_CHANNELS, WIDTH, 8)
    part = gl.program_id(0)
    first_row = gl.program_id(1) * _ROWS
    block = gl.program_id(2)

    tile = weight + (block * PROGRAMS + part) * (_CHANNELS * BLOCK)
    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    w_r = _load_weights(tile, DEPTH)
    w_z = _load_weights(tile + gate_stride, DEPTH)
    w_n = _load_weights(tile + 2 * gate_stride, DEPTH)

    s = part * _CHANNELS + gl.arange(0, _CHANNELS, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = block * SIZE + s
    b_r, b_z, b_n = load_gates(bias, c, own, H)
    if PORTABLE:
        s_r, s_z, s_n = load_gates(scale, c, own, H)
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    if state_grid is not None:
        state_scale, state_inv, state_low, state_high = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    inside = own[:, None] & (b < B)[None, :]
    offset = b[None, :] * H + c[:, None]
    h = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row
    if gates is not None:
        planes: gl.constexpr = 1 if gates.dtype.element_ty == gl.int64 else 4
        gates_p = gates + start * row * planes
        gates_offset = b[None, :] * (planes * H) + c[:, None]
    if mask is not None:
        mask_p = mask + start * B + b

    ring = gl.allocate_shared_memory(gi.dtype.element_ty, [STAGES, 4 * _ROWS, _CHANNELS], ring_memory(_CHANNELS, 4, WIDTH))
    lines, present = lines_of_slot(ring, block, part, first_row, B, H, SIZE, COPY)
    gi_p = gi + start * row * 3
    for i in gl.static_range(STAGES - 1):
        fetch_inputs(ring, i, gi_p, lines, present, T)
        gi_p += step * 3

    sums_r = gl.allocate_shared_memory(gl.float32, [_SPLITS, _CHANNELS, _ROWS], sum_memory())
    sums_z = gl.allocate_shared_memory(gl.float32, [_SPLITS, _CHANNELS, _ROWS], sum_memory())
    sums_n = gl.allocate_shared_memory(gl.float32, [_SPLITS, _CHANNELS, _ROWS], sum_memory())
    own_state = gl.allocate_shared_memory(gl.float16, [_ROWS, _CHANNELS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    zeros = gl.full([_SPLITS, _CHANNELS, _ROWS], 0.0, gl.float32, layout=PRODUCT)
    operand_at = _operand_at(DEPTH)
    open_exchange(AREA)
    rank = gl.arange(0, PROGRAMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SEND)))[:, None, None]
    chunk_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SEND)))[None, :, None]
    chunk = gl.arange(0, _CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, SEND)))[None, None, :] >> 3
    place = part * (_CHANNELS * _ROWS * 2) + chunk_row * (_CHANNELS * 2) + chunk * 16
    area = area_of(rank + place * 0)
    to = area + place
    x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
    _send(x, own_state, area, to, 0, AREA, PROGRAMS)

    for t in range(0, T, 2):
        for u in gl.static_range(2):
            if mask is not None:
                real = gl.load(mask_p, mask=(b < B) & (t + u < T), other=0)
                mask_p += sign * B
            wait_for_round(t // 2, u, AREA)
            right = read_chunks(operand_at, u, AREA, DEPTH // 32, _CHANNELS * _ROWS * 2)
            sums_r.store(mma_v2(w_r, right, zeros))
            sums_n.store(mma_v2(w_n, right, zeros))
            sums_z.store(mma_v2(w_z, right, zeros))
            wait_for_copies(STAGES - 2)
            slot = (t + u) % STAGES
            gi_r = read_gate(ring, slot, 0, GATES)
            gi_n = read_gate(ring, slot, 2, GATES)
            gi_z = read_gate(ring, slot, 1, GATES)
            gh_r = _summed(sums_r)
            gh_n = _summed(sums_n)
            gh_z = _summed(sums_z)
            if PORTABLE:
                gh_r = gh_r * s_r
                gh_z = gh_z * s_z
                gh_n = gh_n * s_n
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r + b_r, gh_z + b_z, gh_n + b_n, h, PORTABLE)
            if state_grid is not None:
                if gates is not None:
                    z = gl.where(in_range(new, state_inv, state_low, state_high), z, -1.0)
                new = codes(new, state_inv, state_low, state_high) * state_scale
            here = inside & (t + u < T)
            if mask is not None:
                new = gl.where((real != 0)[None, :], new, h)
            h = new
            x = codes(h, h_inv, h_low, h_high) if PORTABLE else h
            _send(x, own_state, area, to, 1 - u, AREA, PROGRAMS)
            fetch_inputs(ring, t + u + STAGES - 1, gi_p, lines, present, T)
            gi_p += step * 3
            gl.store(out_p + offset, h.to(states.dtype.element_ty), mask=here)
            out_p += step
            if gates is not None:
                store_gates(gates_p + gates_offset, r, z, n, hn, here, H)
                gates_p += step * planes
    # The last round is nobody's state, but must have come before a program may end.
    wait_for_round((T + 1) // 2, 0, AREA, False)
    close_exchange()


def call(
    weights: HalfWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> ClusterCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    return ClusterCall(
        kernel=_forward,
        grid=(1, triton.cdiv(rows, ROWS), weights.blocks),
        io=(gi, h0, mask, states, packed(gates)),
        static=(weights.weight, weights.scale, weights.bias, weights.h_grid, weights.state_grid, steps, rows),
        constants={
            "H": hidden,
            "SIZE": weights.size,
            "PROGRAMS": weights.programs,
            "STAGES": STAGES,
            "STATE_N": grid_size(weights.state_grid),
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=WARPS,
        portable=weights.quantized,
        cluster=weights.programs,
    )
