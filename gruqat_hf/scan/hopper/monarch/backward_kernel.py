"""The kernel of the backward scan of two-factor operands on Hopper clusters, from the last step of the scan to the first.

A step waits for: the state's gradient, that times three coefficients to shared memory, barrier, product with the second factor,
its result to the others, product with the first, its result to the others. Coefficients follow from saved gates and states
alone, and are ready before: they are computed while the first results are on their way, and what a step leaves behind is stored
while the second are, when warps are closest together. Stores of one would otherwise be in the way of what another sends. The
kernel's loop begins where a program waits for the others anyhow, so that its own bookkeeping costs nothing.
"""

from __future__ import annotations

from ...triton.math import in_range, load_grid
from ..exchange import area_of, area_shape, close_exchange, expect_round, open_exchange, read_pairs, send_pairs, wait_for_round
from ..gluon import constexpr_function, gl, jit
from ..gradients import coefficients, powers
from ..layouts import gate_layout, product_layout
from .maxima import hear_largest, maxima_bytes, program_told, tell_largest
from .memory import in_order, open_memory, pair_bytes, plane_bytes, wait_for_step
from .product import chunks_at, load_sides, multiply, place_in_slot, read_right
from .steps import fetch_step, mid_gradients, take_step


@constexpr_function
def exchange_area(BLOCK, PROGRAMS, ROWS, FIRST_GATES):
    """The exchange's: of mid values' and states' gradients, twice, and of maxima."""
    SLOT = BLOCK * ROWS * 2
    return area_shape((FIRST_GATES * SLOT, SLOT), 2, maxima_bytes(BLOCK, ROWS))


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
        first_weights = first_weights + (load_sides(first_tile + g * GATE, BLOCK),)
    w_r = load_sides(second_tile, BLOCK)
    w_z = load_sides(second_tile + GATE, BLOCK)
    w_n = load_sides(second_tile + 2 * GATE, BLOCK)
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
    # A thread's elements share the first of these: one comparison does for both.
    row_end = gl.where(b < B, T, 0)
    end = gl.where(inside, T, 0)
    mine = part * BLOCK + u
    offset = b[None, :] * H + mine[:, None]
    wide = b[None, :] * (3 * H) + mine[:, None]
    natural = b[None, :] * H + (u * PROGRAMS + part)[:, None]
    initial = gl.load(h0 + natural, mask=inside, other=0.0).to(gl.float32)
    grad = gl.load(dlast + offset, mask=inside, other=0.0).to(gl.float32)
    at = start * row
    runs = None
    if mask is not None:
        mask_p = mask + start * B + b
        runs = (gl.load(mask_p, mask=b < B, other=0) != 0)[None, :]
        mask_p += sign * B
        real = gl.load(mask_p, mask=1 < row_end, other=0), gl.load(mask_p + sign * B, mask=2 < row_end, other=0)
    passing = None, None
    if passes is not None:
        passes_p = passes + start * row + offset
        passing = gl.load(passes_p, mask=inside, other=0), gl.load(passes_p + step, mask=1 < end, other=0)
    peak = gl.load(largest_gradient + b, mask=b < B, other=0.0)
    up, down = powers(gl.maximum(peak, gl.load(largest_gradient + B + b, mask=b < B, other=0.0)), 0)

    memory = open_memory(STEPS * STEP + 6 * SLOT)
    pair = (u >> 1)[:, None] * ROWS + j[None, :]
    saved_at = memory + pair * 16
    state_at = memory + (pair * PAIR + SAVED)
    saved_p = gates + start * row + offset
    grad_p = dstates + start * row + offset
    state_p = states + start * row + step + offset
    for i in gl.static_range(STEPS):
        fetch_step(saved_at + i * STEP, state_at + i * STEP, saved_p, grad_p, state_p, i, end, PLANE)
        saved_p += step
        grad_p += step
        state_p += step

    number = part * SHARE + u % SHARE
    base = open_exchange(AREA, PROGRAMS)
    right_at = chunks_at(BLOCK)
    own_at = place_in_slot(u[:, None], j[None, :], BLOCK)
    dmid_at = b[None, :] * (FIRST_GATES * H) + mine[:, None]
    area = area_of((u // SHARE)[:, None] + j[None, :] * 0, base)
    to = area + place_in_slot(number[:, None], j[None, :], BLOCK)
    listener = area_of(program_told(u, PROGRAMS)[:, None] + j[None, :] * 0, base)
    put_at = memory + own_at + STEPS * STEP
    get_at = memory + right_at + STEPS * STEP
    came_at = base + own_at
    right_at += base
    nothing = gl.full([BLOCK, 8], 0.0, gl.float32, layout=product_layout(BLOCK))
    ones = gl.full([BLOCK, ROWS], 1.0, gl.float32, layout=GATES)

    wait_for_step(STEPS - 1)
    saved, d, h = take_step(saved_at, state_at, states.dtype.element_ty, PLANE)
    h = gl.where(T == 1, initial, h)
    c_r, c_z, c_hn, c_n, direct = coefficients(saved, h, runs, CLIPPED)
    grad += d
    scaled = grad * up[None, :]
    if mask is not None:
        scaled = gl.where(runs, scaled, 0.0)
    mids = mid_gradients((w_r, w_z, w_n), scaled, c_r, c_z, c_hn, put_at, get_at, passing[0], FIRST_GATES)
    for g in gl.static_range(FIRST_GATES):
        send_pairs(mids[g].to(gl.float16), area, to + g * SLOT, 0, AREA)

    for t in range(0, T, 2):
        next_passing = passing
        for i in gl.static_range(2):
            # While gradients of mid values are on their way: all that the next step needs but the gradient that will come.
            in_order()
            counted = grad if mask is None else gl.where(runs, grad, 0.0)
            da_r = counted * c_r
            da_z = counted * c_z
            da_n = counted * c_n
            dh_n = counted * c_hn
            rest = grad * direct
            weighted = ones * down[None, :]
            change = ones
            if h_grid is not None:
                inner = in_range(h, h_inv, h_low, h_high)
                weighted = gl.where(inner, weighted, 0.0)
                change = gl.where(inner, change, 0.0)
            wait_for_step(STEPS - 2)
            coming = ((t + i + 1) & (STEPS - 1)) * STEP
            saved, d, h = take_step(saved_at + coming, state_at + coming, states.dtype.element_ty, PLANE)
            # The memory of this step, which has been read, is that of another.
            going = ((t + i) & (STEPS - 1)) * STEP
            fetch_step(saved_at + going, state_at + going, saved_p, grad_p, state_p, t + i + STEPS, end, PLANE)
            saved_p += step
            grad_p += step
            state_p += step
            h = gl.where(t + i + 2 == T, initial, h)
            if mask is not None:
                runs = (real[i] != 0)[None, :]
                comes = runs
            else:
                # The second step of a last pair may be none: it hands its gradient on.
                comes = (t + 1 < row_end)[None, :] if i == 0 else None
            c_r, c_z, c_hn, c_n, direct = coefficients(saved, h, comes, CLIPPED)
            rest += d
            unscale = down
            if t % RESCALE == 0:
                if i == 0:
                    tell_largest(grad, u, listener, part, PROGRAMS, 4, AREA)
                else:
                    largest = hear_largest(base, t // RESCALE, PROGRAMS, BLOCK, ROWS, 4, AREA, GATES)
                    up, down = powers(gl.maximum(largest, peak), 0)
            # What comes as 0 must not become NaN, however much gradients have shrunk since.
            change *= gl.minimum(unscale * up, 2.0**100)[None, :]
            scaled_rest = rest * up[None, :]

            wait_for_round(base, (t >> 1) & 1, 2 * i, AREA, False)
            right = (read_right(right_at, 2 * i, AREA, BLOCK),)
            for g in gl.static_range(1, FIRST_GATES):
                right = right + (read_right(right_at + g * SLOT, 2 * i, AREA, BLOCK),)
            total = multiply(first_weights[0], right[0], nothing)
            for g in gl.static_range(1, FIRST_GATES):
                total += multiply(first_weights[g], right[g], nothing)
            send_pairs(total.to(gl.float16), area, to, 2 * i + 1, AREA)
            expect_round(base, 2 * i, AREA)

            # While these gradients are on their way: what this step leaves behind.
            in_order()
            here = t + i < end
            if dmid is not None:
                for g in gl.static_range(FIRST_GATES):
                    gl.store(dmid + at * FIRST_GATES + dmid_at + g * H, mids[g] * unscale[None, :], mask=here)
            if adjoint is not None:
                gl.store(adjoint + at + offset, counted, mask=here)
            dgi_p = dgi + at * 3 + wide
            gl.store(dgi_p, da_r.to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + H, da_z.to(dgi.dtype.element_ty), mask=here)
            gl.store(dgi_p + 2 * H, da_n.to(dgi.dtype.element_ty), mask=here)
            if dgh_n is not None:
                gl.store(dgh_n + at + offset, dh_n.to(dgi.dtype.element_ty), mask=here)
            at += step
            if i == 0:
                # Of the pair after this one, both at once: a wait for one would be a wait for what was set out for after it.
                if mask is not None:
                    mask_p += 2 * sign * B
                    next_real = (
                        gl.load(mask_p, mask=t + 3 < row_end, other=0),
                        gl.load(mask_p + sign * B, mask=t + 4 < row_end, other=0),
                    )
                if passes is not None:
                    passes_p += 2 * step
                    next_passing = (
                        gl.load(passes_p, mask=t + 2 < end, other=0),
                        gl.load(passes_p + step, mask=t + 3 < end, other=0),
                    )

            wait_for_round(base, (t >> 1) & 1, 2 * i + 1, AREA, False)
            came = read_pairs(came_at, 2 * i + 1, AREA).to(gl.float32)
            scaled = came * change + scaled_rest
            if mask is not None:
                scaled = gl.where(runs, scaled, 0.0)
            grad = came * weighted + rest
            own = (1 - i) * 3 * SLOT
            now = passing[1] if i == 0 else next_passing[0]
            mids = mid_gradients((w_r, w_z, w_n), scaled, c_r, c_z, c_hn, put_at + own, get_at + own, now, FIRST_GATES)
            for g in gl.static_range(FIRST_GATES):
                send_pairs(mids[g].to(gl.float16), area, to + g * SLOT, 2 * (1 - i), AREA)
            expect_round(base, 2 * i + 1, AREA)
        if mask is not None:
            real = next_real
        if passes is not None:
            passing = next_passing
    # There is no step after the last, whose gradient would be added.
    gl.store(dh0 + natural, grad.to(dh0.dtype.element_ty), mask=inside)
    # The last round is of no step, but must have come before a program may end.
    wait_for_round(base, ((T + 1) >> 1) & 1, 0, AREA, False)
    close_exchange()
