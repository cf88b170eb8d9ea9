"""The kernel of the backward scan of two-factor operands on Hopper clusters, from the last step of the scan to the first.

A step waits for: the state's gradient, that times three coefficients to shared memory, barrier, product with the second factor,
its result to the others, product with the first, its result to the others. Coefficients follow from saved gates and states
alone, and are ready before; what a step leaves behind is stored while results are on their way.
"""

from __future__ import annotations

from ...triton.math import in_range, load_grid
from ..exchange import area_of, area_shape, close_exchange, open_exchange, read_pairs, send_pairs, wait_for_round
from ..gluon import constexpr_function, gl, jit, mma_v2
from ..gradients import coefficients, hear_largest, maxima_bytes, powers, tell_largest
from ..layouts import gate_layout, load_weights, product_layout, to_gates
from .memory import (
    commit_step,
    copy_pairs,
    in_order,
    meet,
    open_memory,
    pair_bytes,
    plane_bytes,
    put_pairs,
    take_chunks,
    take_pairs,
    wait_for_step,
)
from .product import chunks_at, load_parts, multiply, parts_of, read_parts


@constexpr_function
def exchange_area(BLOCK, PROGRAMS, ROWS, FIRST_GATES):
    """The exchange's: of mid values' and states' gradients, twice, and of maxima."""
    SLOT = BLOCK * ROWS * 2
    return area_shape((FIRST_GATES * SLOT, SLOT), 2, maxima_bytes(PROGRAMS, ROWS, BLOCK // 16))


@jit(do_not_specialize=["T", "B"])
def backward_kernel(
    h0, mask, states, gates, passes, dstates, dlast, dgi, dgh_n, dh0, adjoint, dmid, largest_gradient, first, second, h_grid,
    T, B, H: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, STEPS: gl.constexpr, FIRST_GATES: gl.constexpr,
    RESCALE: gl.constexpr, CLIPPED: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Program (p, j): block p of either factor, of rows j * ROWS and on.

    Parameters as in the portable kernel, but that all but ``h0`` and ``dh0`` are in exchange order; ``dgh_n`` and ``dmid`` may be
    None; ``largest_gradient`` ``[2, B]`` is that of each row of dstates, then of dlast.

    Steps go in pairs, each with shared memory and slots of its own.
    """
    BLOCK: gl.constexpr = H // PROGRAMS
    SHARE: gl.constexpr = BLOCK // PROGRAMS
    GATES: gl.constexpr = gate_layout(BLOCK, ROWS)
    PRODUCT: gl.constexpr = product_layout(BLOCK)
    SLOT: gl.constexpr = BLOCK * ROWS * 2
    AREA: gl.constexpr = exchange_area(BLOCK, PROGRAMS, ROWS, FIRST_GATES)
    GATE: gl.constexpr = PROGRAMS * BLOCK * BLOCK
    PLANE: gl.constexpr = plane_bytes(states.dtype.element_ty, BLOCK, ROWS)
    SAVED: gl.constexpr = plane_bytes(gl.int64, BLOCK, ROWS)
    STEP: gl.constexpr = SAVED + 2 * PLANE
    PAIR: gl.constexpr = pair_bytes(states.dtype.element_ty)
    part = gl.program_id(0)
    first_row = gl.program_id(1) * ROWS

    first_tile = first + part * (BLOCK * BLOCK)
    second_tile = second + part * (BLOCK * BLOCK)
    first_weights = ()
    for g in gl.static_range(FIRST_GATES):
        first_weights = first_weights + (load_parts(first_tile + g * GATE, BLOCK),)
    w_r = load_weights(second_tile, BLOCK)
    w_z = load_weights(second_tile + GATE, BLOCK)
    w_n = load_weights(second_tile + 2 * GATE, BLOCK)
    if h_grid is not None:
        _, h_inv, h_low, h_high = load_grid(h_grid, 0, 1)

    u = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, GATES))
    j = gl.arange(0, ROWS, layout=gl.SliceLayout(0, GATES))
    b = first_row + j
    row = B.to(gl.int64) * H
    sign: gl.constexpr = 1 if REVERSE else -1
    start = gl.to_tensor(0).to(gl.int64) if REVERSE else (T - 1).to(gl.int64)
    step = row * sign
    inside = (b < B)[None, :] & (u >= 0)[:, None]
    mine = part * BLOCK + u
    offset = b[None, :] * H + mine[:, None]
    wide = b[None, :] * (3 * H) + mine[:, None]
    natural = b[None, :] * H + (u * PROGRAMS + part)[:, None]
    initial = gl.load(h0 + natural, mask=inside, other=0.0).to(gl.float32)
    carry = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32)
    at = start * row
    valid = b < B
    if mask is not None:
        mask_p = mask + start * B + b
        now = gl.load(mask_p, mask=valid, other=0)
        mask_p += sign * B
        real = gl.load(mask_p, mask=valid & (1 < T), other=0), gl.load(mask_p + sign * B, mask=valid & (2 < T), other=0)
    if passes is not None:
        passes_p = passes + start * row + offset
        passing = gl.load(passes_p, mask=inside, other=0), gl.load(passes_p + step, mask=inside & (1 < T), other=0)
    peak = gl.load(largest_gradient + b, mask=b < B, other=0.0)
    up, down = powers(gl.maximum(peak, gl.load(largest_gradient + B + b, mask=b < B, other=0.0)), 0)

    open_memory(STEPS * STEP + 6 * SLOT)
    pair = (u >> 1)[:, None] * ROWS + j[None, :]
    saved_at = pair * 16
    state_at = pair * PAIR + SAVED
    saved_p = gates + start * row + offset
    grad_p = dstates + start * row + offset
    state_p = states + start * row + step + offset
    for i in gl.static_range(STEPS):
        copy_pairs(saved_at + i * STEP, saved_p, inside & (i < T))
        copy_pairs(state_at + i * STEP, grad_p, inside & (i < T))
        copy_pairs(state_at + (i * STEP + PLANE), state_p, inside & (i + 1 < T))
        commit_step()
        saved_p += step
        grad_p += step
        state_p += step

    zeros = gl.full([BLOCK, 8], 0.0, gl.float32, layout=PRODUCT)
    right_at = chunks_at(BLOCK, ROWS, 1)
    number = part * SHARE + u % SHARE
    place = ((number >> 5) * (ROWS * 64) + ((number >> 3) & 3) * 16 + (number & 7) * 2)[:, None] + j[None, :] * 64
    base = open_exchange(AREA)
    chunk_at = base + chunks_at(BLOCK, ROWS, parts_of(BLOCK))
    carry_at = ((u >> 5) * (ROWS * 64) + ((u >> 3) & 3) * 16 + (u & 7) * 2)[:, None] + j[None, :] * 64
    dmid_at = b[None, :] * (FIRST_GATES * H) + mine[:, None]
    area = area_of((u // SHARE)[:, None] + j[None, :] * 0, base)
    to = area + place

    wait_for_step(STEPS - 1)
    h = take_pairs(state_at + PLANE, states.dtype.element_ty).to(gl.float32)
    h = gl.where(T == 1, initial, h)
    runs = inside
    if mask is not None:
        runs = inside & (now != 0)[None, :]
    c_r, c_z, c_hn, c_n, direct = coefficients(take_pairs(saved_at, gl.int64), h, runs, CLIPPED)
    d = take_pairs(state_at, states.dtype.element_ty).to(gl.float32)
    scaled = (d + carry) * up[None, :]

    for t in range(0, T, 2):
        for i in gl.static_range(2):
            own = STEPS * STEP + i * (3 * SLOT)
            put_pairs(carry_at + own, (scaled * c_r).to(gl.float16))
            put_pairs(carry_at + (own + SLOT), (scaled * c_z).to(gl.float16))
            put_pairs(carry_at + (own + 2 * SLOT), (scaled * c_hn).to(gl.float16))
            meet()
            x_r = take_chunks(right_at + own, BLOCK // 32, ROWS * 64)
            x_z = take_chunks(right_at + (own + SLOT), BLOCK // 32, ROWS * 64)
            x_n = take_chunks(right_at + (own + 2 * SLOT), BLOCK // 32, ROWS * 64)
            mids = (to_gates(mma_v2(w_r, x_r, zeros), ROWS),)
            mids = mids + (to_gates(mma_v2(w_z, x_z, zeros), ROWS),)
            mids = mids + (to_gates(mma_v2(w_n, x_n, zeros), ROWS),)
            if FIRST_GATES == 1:
                mids = (mids[0] + mids[1] + mids[2],)
            here = inside & (t + i < T)
            sent = ()
            for g in gl.static_range(FIRST_GATES):
                mid = mids[g]
                if passes is not None:
                    mid = gl.where(((passing[i].to(gl.int32) >> g) & 1) != 0, mid, 0.0)
                send_pairs(mid.to(gl.float16), area, to + g * SLOT, 2 * i, AREA)
                sent = sent + (mid,)

            # While gradients of mid values are on their way: what this step leaves behind.
            in_order()
            if dmid is not None:
                for g in gl.static_range(FIRST_GATES):
                    gl.store(dmid + at * FIRST_GATES + dmid_at + g * H, sent[g] * down[None, :], mask=here)
            grad = d + carry
            if adjoint is not None:
                gl.store(adjoint + at + offset, gl.where(runs, grad, 0.0), mask=here)
            dgi_p = dgi + at * 3 + wide
            gl.store(dgi_p, (grad * c_r).to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + H, (grad * c_z).to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + 2 * H, (grad * c_n).to(dgi.dtype.element_ty), mask=here)
            if dgh_n is not None:
                gl.store(dgh_n + at + offset, (grad * c_hn).to(dgi.dtype.element_ty), mask=here)
            at += step
            passed = grad * direct
            weighted = gl.full([BLOCK, ROWS], 1.0, gl.float32, layout=GATES) * down[None, :]
            if h_grid is not None:
                weighted = gl.where(in_range(h, h_inv, h_low, h_high), weighted, 0.0)
            # The memory of this step, which has been read, is that of another.
            going = ((t + i) & (STEPS - 1)) * STEP
            copy_pairs(saved_at + going, saved_p, inside & (t + i + STEPS < T))
            copy_pairs(state_at + going, grad_p, inside & (t + i + STEPS < T))
            copy_pairs(state_at + (going + PLANE), state_p, inside & (t + i + STEPS + 1 < T))
            commit_step()
            saved_p += step
            grad_p += step
            state_p += step

            if t % RESCALE == 0:
                if i == 0:
                    tell_largest(base, carry, part, PROGRAMS, 4, AREA)
                else:
                    largest = hear_largest(base, t // RESCALE, PROGRAMS, ROWS, 4, AREA, GATES)
                    up, down = powers(gl.maximum(largest, peak), 0)

            wait_for_round(base, t >> 1, 2 * i, AREA)
            total = multiply(first_weights[0], read_parts(chunk_at, 2 * i, AREA, BLOCK, ROWS), zeros, ROWS)
            for g in gl.static_range(1, FIRST_GATES):
                right = read_parts(chunk_at + g * SLOT, 2 * i, AREA, BLOCK, ROWS)
                total += multiply(first_weights[g], right, zeros, ROWS)
            send_pairs(total.to(gl.float16), area, to, 2 * i + 1, AREA)

            # The next step's coefficients, while the others' results are on their way.
            wait_for_step(STEPS - 1)
            coming = ((t + i + 1) & (STEPS - 1)) * STEP
            h = take_pairs(state_at + (coming + PLANE), states.dtype.element_ty).to(gl.float32)
            h = gl.where(t + i + 2 == T, initial, h)
            d = take_pairs(state_at + coming, states.dtype.element_ty).to(gl.float32)
            runs = inside & (t + i + 1 < T)
            if mask is not None:
                runs = runs & (real[i] != 0)[None, :]
            if i == 0:
                # Of the pair after this one, both at once: a wait for one would be a wait for what was set out for after it.
                if mask is not None:
                    mask_p += 2 * sign * B
                    next_real = (
                        gl.load(mask_p, mask=valid & (t + 3 < T), other=0),
                        gl.load(mask_p + sign * B, mask=valid & (t + 4 < T), other=0),
                    )
                if passes is not None:
                    passes_p += 2 * step
                    next_passing = (
                        gl.load(passes_p, mask=inside & (t + 2 < T), other=0),
                        gl.load(passes_p + step, mask=inside & (t + 3 < T), other=0),
                    )
            c_r, c_z, c_hn, c_n, direct = coefficients(take_pairs(saved_at + coming, gl.int64), h, runs, CLIPPED)
            passed_on = (d + passed) * up[None, :]
            wait_for_round(base, t >> 1, 2 * i + 1, AREA)
            came = read_pairs(base + carry_at, 2 * i + 1, AREA).to(gl.float32) * weighted
            scaled = came * up[None, :] + passed_on
            carry = came + passed
        if mask is not None:
            real = next_real
        if passes is not None:
            passing = next_passing
    gl.store(dh0 + natural, carry.to(dh0.dtype.element_ty), mask=inside)
    close_exchange()
