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
from ...triton.math import codes, gru_gates, load_grid, on_grid, pack_gates
from ..gluon import commit_copies, copy_to_shared, gl, jit, wait_for_copies
from ..layouts import channel_of_row, copy_layout, operand_memory, product_layout
from . import REGISTERS, STAGES, rows_of_tile
from .folding import is_folded, load_sides, multiply, tile_layout, tile_memory, to_right

__all__ = ["call", "forward", "prepare"]


@jit
def _read(ring, slot, ROWS: gl.constexpr, GATES: gl.constexpr):
    """The three gates' inputs of a step, fp32."""
    tile = ring.index(slot)
    r = tile.slice(0, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    z = tile.slice(ROWS, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    n = tile.slice(2 * ROWS, ROWS, 0).permute([1, 0]).load(GATES).to(gl.float32)
    return r, z, n


@jit
def _start(bias, SIZE: gl.constexpr, BLOCK: gl.constexpr):
    """Biases of a block, as a product that others are added to."""
    PRODUCT: gl.constexpr = product_layout(BLOCK)
    s = channel_of_row(gl.arange(0, BLOCK, layout=gl.SliceLayout(1, PRODUCT)))
    one = gl.load(bias + s, mask=s < SIZE, other=0.0)
    return gl.full([BLOCK, 8], 0.0, gl.float32, layout=PRODUCT) + one[:, None]


@jit(do_not_specialize=["T", "B"])
def _forward(
    gi, h0, mask, states, gates, weight, scale, bias, h_grid, state_grid, T, B,
    H: gl.constexpr, SIZE: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, STATE_N: gl.constexpr,
    REVERSE: gl.constexpr, PORTABLE: gl.constexpr,
):  # fmt: skip
    """Program (k, j): block k of rows j * ROWS and on. Parameters as in the portable tier's kernel of the same name.

    Steps go in pairs, each with shared memory of its own: what one step writes no thread can still be reading for the other, so
    that one barrier a step is enough. A last step that is none computes on zeros, and stores nothing.
    """
    GATES: gl.constexpr = tile_layout(BLOCK, ROWS)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, product_layout(BLOCK), 2)
    LINES: gl.constexpr = BLOCK // 2 if is_folded(BLOCK, ROWS) else BLOCK
    BYTES: gl.constexpr = gi.dtype.element_ty.primitive_bitwidth // 8
    COPY: gl.constexpr = copy_layout(BLOCK, BYTES, BLOCK // 16)
    RING: gl.constexpr = tile_memory(BLOCK, ROWS, BYTES)
    SLOTS: gl.constexpr = STAGES // 2
    k = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS

    gate_stride: gl.constexpr = (H // SIZE) * BLOCK * BLOCK
    tile = weight + k * BLOCK * BLOCK
    w_r = load_sides(tile, BLOCK, ROWS)
    w_z = load_sides(tile + gate_stride, BLOCK, ROWS)
    w_n = load_sides(tile + 2 * gate_stride, BLOCK, ROWS)

    s = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    b = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    own = s < SIZE
    c = k * SIZE + s
    if PORTABLE:
        start_r = None
        start_z = None
        start_n = None
        b_r = gl.load(bias + c, mask=own, other=0.0)[:, None]
        b_z = gl.load(bias + H + c, mask=own, other=0.0)[:, None]
        b_n = gl.load(bias + 2 * H + c, mask=own, other=0.0)[:, None]
        s_r = gl.load(scale + c, mask=own, other=0.0)[:, None]
        s_z = gl.load(scale + H + c, mask=own, other=0.0)[:, None]
        s_n = gl.load(scale + 2 * H + c, mask=own, other=0.0)[:, None]
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)
    else:
        start_r = _start(bias + k * SIZE, SIZE, BLOCK)
        start_z = _start(bias + H + k * SIZE, SIZE, BLOCK)
        start_n = _start(bias + 2 * H + k * SIZE, SIZE, BLOCK)
    if state_grid is not None:
        carried = load_grid(state_grid, gl.where(own, c, 0)[:, None], STATE_N)

    row = B.to(gl.int64) * H
    sign: gl.constexpr = -1 if REVERSE else 1
    start = (T - 1).to(gl.int64) if REVERSE else gl.to_tensor(0).to(gl.int64)
    step = row * sign
    inside = own[:, None] & (b < B)[None, :]
    # Elements outside of a tensor are past its end at once: one comparison a step does for both.
    row_end = gl.where(b < B, T, 0)
    end = gl.where(inside, T, 0)
    offset = b[None, :] * H + c[:, None]
    h = gl.load(h0 + offset, mask=inside, other=0.0).to(gl.float32)
    out_p = states + start * row + offset
    if gates is not None:
        PACKED: gl.constexpr = gates.dtype.element_ty == gl.int64
        planes: gl.constexpr = 1 if PACKED else 4
        gates_p = gates + start * row * planes + (b[None, :] * (planes * H) + c[:, None])
    if mask is not None:
        mask_p = mask + start * B + b
        runs_0 = (gl.load(mask_p, mask=b < B, other=0) != 0)[None, :]
        runs_1 = (gl.load(mask_p + sign * B, mask=1 < row_end, other=0) != 0)[None, :]

    # A ring's slot is [4 * ROWS, BLOCK]: r, z, n, and a quarter that no one reads.
    even = gl.allocate_shared_memory(gi.dtype.element_ty, [SLOTS, 4 * ROWS, BLOCK], RING)
    odd = gl.allocate_shared_memory(gi.dtype.element_ty, [SLOTS, 4 * ROWS, BLOCK], RING)
    line = gl.arange(0, 4 * ROWS, layout=gl.SliceLayout(1, COPY))
    channel = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))
    line_b = first_row + line % ROWS
    copied = ((line < 3 * ROWS) & (line_b < B))[:, None] & (channel < SIZE)[None, :]
    copy_end = gl.where(copied, T, 0)
    gi_p = gi + start * row * 3 + ((line_b * (3 * H) + line // ROWS * H)[:, None] + (k * SIZE + channel)[None, :])
    for i in gl.static_range(STAGES):
        copy_to_shared((even if i % 2 == 0 else odd).index(i // 2), gi_p, mask=i < copy_end)
        commit_copies()
        gi_p += step * 3
    x_even = gl.allocate_shared_memory(gl.float16, [LINES, 8], operand_memory(LINES))
    x_odd = gl.allocate_shared_memory(gl.float16, [LINES, 8], operand_memory(LINES))
    wait_for_copies(STAGES - 1)
    gi_r, gi_z, gi_n = _read(even, 0, ROWS, GATES)

    for t in range(0, T, 2):
        slot = (t >> 1) & (SLOTS - 1)
        next_slot = (slot + 1) & (SLOTS - 1)
        if mask is not None:
            mask_p += 2 * sign * B
            runs_2 = (gl.load(mask_p, mask=t + 2 < row_end, other=0) != 0)[None, :]
            runs_3 = (gl.load(mask_p + sign * B, mask=t + 3 < row_end, other=0) != 0)[None, :]
        for u in gl.static_range(2):
            x_memory = x_even if u == 0 else x_odd
            if PORTABLE:
                x = codes(h, h_inv, h_low, h_high).to(gl.float16)
            else:
                x = h.to(gl.float16)
            x_memory.store(to_right(x))
            wait_for_copies(STAGES - 2)
            right = x_memory.load(RIGHT)
            gh_r = multiply(w_r, right, ROWS, start_r)
            gh_z = multiply(w_z, right, ROWS, start_z)
            gh_n = multiply(w_n, right, ROWS, start_n)
            next_r, next_z, next_n = _read(odd if u == 0 else even, slot if u == 0 else next_slot, ROWS, GATES)
            if PORTABLE:
                gh_r = gh_r * s_r + b_r
                gh_z = gh_z * s_z + b_z
                gh_n = gh_n * s_n + b_n
            r, z, n, hn, new = gru_gates(gi_r, gi_z, gi_n, gh_r, gh_z, gh_n, h, PORTABLE)
            gi_r = next_r
            gi_z = next_z
            gi_n = next_n
            # After the gates, whose chain is the longest.
            copy_to_shared((even if u == 0 else odd).index(slot), gi_p, mask=t + u + STAGES < copy_end)
            commit_copies()
            gi_p += step * 3
            if state_grid is not None:
                new, z = on_grid(new, z, carried, gates is not None)
            if mask is not None:
                new = gl.where(runs_0 if u == 0 else runs_1, new, h)
            h = new
            here = t + u < end
            gl.store(out_p, h.to(states.dtype.element_ty), mask=here)
            out_p += step
            if gates is not None:
                if PACKED:
                    gl.store(gates_p, pack_gates(r, z, n, hn), mask=here)
                else:
                    gl.store(gates_p, r, mask=here)
                    gl.store(gates_p + H, z, mask=here)
                    gl.store(gates_p + 2 * H, n, mask=here)
                    gl.store(gates_p + 3 * H, hn, mask=here)
                gates_p += step * planes
        if mask is not None:
            runs_0 = runs_2
            runs_1 = runs_3


def _rows_of_tile(weights: BlockWeights, rows: int, processors: int) -> int:
    """As in the backward scan, but 2 where all such programs run at once: half of the gates to compute a step."""
    few = weights.padded >= 32 and weights.blocks * cdiv(rows, 2) <= processors
    return 2 if few else rows_of_tile(weights.blocks, rows, processors)


def call(
    weights: BlockWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> KernelCall:
    """The launch that fills ``states``, and ``gates`` if given."""
    steps, rows, _, hidden = gi.shape
    tile = _rows_of_tile(weights, rows, device_facts(gi.device).processors)
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
            "REVERSE": reverse,
            "PORTABLE": weights.quantized,
        },
        warps=weights.padded // 16,
        portable=weights.quantized,
        registers=REGISTERS,
    )


def forward(
    weights: BlockWeights, gi: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool, states: Tensor, gates: Tensor | None
) -> None:
    """Fill ``states``, and ``gates`` if given."""
    call(weights, aligned(gi), h0, mask, reverse, states, gates).run()
