// The backward pass of a scan: gradients of the input product, of the initial state and of each step's output. Those of weights,
// bias and scales are one product over all rows afterwards, in PyTorch.
#pragma once

#include "scan.h"

// An operand's transpose in float: factors in the order in which gradients pass them, gates joined along the input, and scaled by
// what rounding to the grid and back does to a gradient, scale * inverse. A diagonal's is [3, padded].
struct Adjoint {
    Operand transposed;
};

struct BackwardCall {
    const float *h0, *states, *gates;  // [batch, hidden], [steps, batch, hidden], and what the forward pass saved
    const float *dstates, *dlast;      // shaped like states and h0; or null
    const uint8_t* mask;               // [steps, batch] or null
    int64_t mask_step, mask_row;
    float *dgi, *dgh_n, *dh0, *adjoint;  // [steps, batch, 3, hidden], like states, like h0, like states or null
    int64_t steps, batch;
    int32_t reverse, threads;
};

// 1 where a value's code lies on the grid, 0 where it was clipped.
static inline Floats inside(Floats value, Floats inverse, Floats low, Floats high) {
    Floats code = round_even(value * inverse);
    Ints kept = (Ints)(code >= low) & (Ints)(code <= high);
    return (Floats)(kept & (Ints)spread(1.0f));
}

static inline Floats inside(Floats value, const Grid& grid) {
    return inside(value, spread(grid.inverse), spread(grid.low), spread(grid.high));
}

// dh [rows, pitch] += transpose of the operand times dgh [rows, 3, pitch], for the states h [rows, pitch] that it had multiplied.
static void add_transposed(
    const Operand& op, const Operand& transposed, const float* h, const float* dgh, int rows, float* dh, int pitch
) {
    const Factor& f = op.first;
    auto add = [&](int row, const float* gradient) {
        for (int i = 0; i < op.in; i += LANES) {
            Floats value = load(gradient + i);
            if (f.integer) value = value * inside(load(h + size_t(row) * pitch + i), f.grid[0]);
            float* target = dh + size_t(row) * pitch + i;
            store(target, load(target) + value);
        }
    };
    Scratch scratch;
    if (op.kind == DIAGONAL) {
        float* sum = scratch.take<float>(pitch);
        const float* weights = (const float*)transposed.first.weights;
        for (int row = 0; row < rows; row++) {
            const float* gradient = dgh + size_t(row) * 3 * pitch;
            for (int i = 0; i < pitch; i += LANES) {
                Floats total = {};
                for (int gate = 0; gate < 3; gate++)
                    total = total + load(weights + gate * pitch + i) * load(gradient + gate * pitch + i);
                store(sum + i, total);
            }
            add(row, sum);
        }
        return;
    }
    if (op.kind == BLOCKS) {
        const Factor& t = transposed.first;
        const size_t width = factor_width(t), out_pitch = op.in + TILE;
        float *packed = scratch.take<float>(rows * width), *sum = scratch.take<float>(rows * out_pitch);
        for (int row = 0; row < rows; row++)
            for (int block = 0; block < f.blocks; block++)
                for (int gate = 0; gate < 3; gate++)
                    std::memcpy(
                        packed + row * width + (block * 3 + gate) * f.out,
                        dgh + (size_t(row) * 3 + gate) * pitch + block * f.out,
                        f.out * sizeof(float)
                    );
        factor_rows(t, 0, packed, width, rows, {sum, out_pitch, 0, nullptr, 0}, t.out, 0, t.blocks * t.tiles);
        for (int row = 0; row < rows; row++) add(row, sum + row * out_pitch);
        return;
    }
    // Monarch: first undoes the second factor.
    constexpr int MOST = 8;
    const Factor &g = op.second, &undo_second = transposed.first, &undo_first = transposed.second;
    const int middle = f.blocks * f.out, sets = g.sets, columns = g.columns;
    const size_t mid_pitch = middle + TILE, in_pitch = op.in + TILE;
    const size_t first_width = factor_width(undo_second), second_width = factor_width(undo_first);
    const size_t h_bytes = packed_width(f) * element_size(f);
    char* codes = scratch.take<char>(MOST * h_bytes + 64);
    float* mid = scratch.take<float>(MOST * sets * mid_pitch);
    float* packed = scratch.take<float>(MOST * std::max(first_width, second_width));
    float* dmid = scratch.take<float>(MOST * mid_pitch);
    float* turned = scratch.take<float>(MOST * sets * mid_pitch);
    float* sum = scratch.take<float>(MOST * in_pitch);
    for (int start = 0; start < rows; start += MOST) {
        const int count = std::min(MOST, rows - start);
        if (g.integer) {
            for (int row = 0; row < count; row++) pack_row(f, 0, h + size_t(start + row) * pitch, codes + row * h_bytes);
            const Target target = {mid, sets * mid_pitch, mid_pitch, nullptr, 0};
            factor_rows(f, 0, codes, packed_width(f), count, target, f.out, 0, f.blocks * f.tiles);
        }
        for (int set = 0; set < sets; set++) {
            for (int row = 0; row < count; row++)
                for (int column = 0; column < columns; column++) {
                    const float* gradient = dgh + (size_t(start + row) * 3 + set + column) * pitch;
                    for (int block = 0; block < g.blocks; block++) {
                        float* target = packed + row * first_width + (size_t(block) * columns + column) * g.out;
                        for (int i = 0; i < g.out; i++) target[i] = gradient[i * g.blocks + block];
                    }
                }
            const Target target = {dmid, mid_pitch, 0, nullptr, 0};
            factor_rows(undo_second, set, packed, first_width, count, target, g.in, 0, g.blocks * undo_second.tiles);
            for (int row = 0; row < count; row++) {
                float* target = turned + (row * sets + set) * mid_pitch;
                for (int i = 0; i < g.in; i++)
                    for (int block = 0; block < g.blocks; block++)
                        target[i * g.blocks + block] = dmid[row * mid_pitch + block * g.in + i];
                for (int i = 0; g.integer && i < middle; i += LANES)
                    store(target + i, load(target + i) * inside(load(mid + (row * sets + set) * mid_pitch + i), g.grid[set]));
            }
        }
        for (int row = 0; row < count; row++)
            for (int block = 0; block < f.blocks; block++)
                for (int set = 0; set < sets; set++)
                    std::memcpy(
                        packed + row * second_width + (block * sets + set) * f.out,
                        turned + (row * sets + set) * mid_pitch + block * f.out,
                        f.out * sizeof(float)
                    );
        const Target target = {sum, in_pitch, 0, nullptr, 0};
        factor_rows(undo_first, 0, packed, second_width, count, target, f.in, 0, f.blocks * undo_first.tiles);
        for (int row = 0; row < count; row++) add(start + row, sum + row * in_pitch);
    }
}

// One step of one row, backwards. On entry `dh` [padded] holds the gradient that later steps gave to this step's output; on
// return the part of the previous state's that comes by way of z * h. Gradients of the hidden product go to dgh [3, padded].
static void step_back(
    const Layer& layer, const float* gates, const float* h, const float* dstate, float* dh, float* dgh, float* dgi, float* dgh_n,
    float* adjoint
) {
    const int hidden = layer.hidden, padded = layer.padded;
    for (int i = 0; i < hidden; i += LANES) {
        const int left = hidden - i;
        const Floats r = load(gates + i), z = load(gates + padded + i);
        const Floats n = load(gates + 2 * padded + i), hn = load(gates + 3 * padded + i);
        const Floats before = load(h + i);
        Floats gradient = load(dh + i);
        if (dstate) gradient = gradient + load_part(dstate + i, left);
        if (adjoint) store_part(adjoint + i, gradient, left);
        if (const float* grid = layer.state_grid) {
            const Floats next = (1.0f - z) * n + z * before, scale = load(grid + i), inverse = load(grid + padded + i);
            const Floats kept = inside(next, inverse, load(grid + 2 * padded + i), load(grid + 3 * padded + i));
            gradient = gradient * scale * kept * inverse;
        }
        const Floats dn = gradient * (1.0f - z) * (1.0f - n * n);
        const Floats dz = gradient * (before - n) * (z * (1.0f - z));
        const Floats dr = dn * hn * (r * (1.0f - r));
        const Floats dhn = dn * r;
        store(dh + i, gradient * z);
        store(dgh + i, dr);
        store(dgh + padded + i, dz);
        store(dgh + 2 * padded + i, dhn);
        store_part(dgi + i, dr, left);
        store_part(dgi + hidden + i, dz, left);
        store_part(dgi + 2 * hidden + i, dn, left);
        store_part(dgh_n + i, dhn, left);
    }
}

static void walk_back(const Layer& layer, const Adjoint& adjoint, const BackwardCall& call, int first, int last) {
    const int rows = last - first;
    const size_t hidden = layer.hidden, padded = layer.padded;
    Scratch scratch;
    float *dh = scratch.take<float>(rows * padded), *h = scratch.take<float>(rows * padded);
    float* dgh = scratch.take<float>(rows * 3 * padded);
    for (float* buffer : {dh, h}) std::memset(buffer, 0, rows * padded * sizeof(float));
    std::memset(dgh, 0, rows * 3 * padded * sizeof(float));
    for (int row = 0; call.dlast && row < rows; row++)
        std::memcpy(dh + row * padded, call.dlast + (first + row) * hidden, hidden * sizeof(float));
    for (int64_t count = call.steps - 1; count >= 0; count--) {
        const int64_t t = call.reverse ? call.steps - 1 - count : count;
        const float* states = count == 0 ? call.h0 : call.states + (call.reverse ? t + 1 : t - 1) * call.batch * hidden;
        for (int row = 0; row < rows; row++) {
            const size_t at = t * call.batch + first + row;
            float *own = dh + row * padded, *back = dgh + row * 3 * padded;
            float *dgi = call.dgi + at * 3 * hidden, *dgh_n = call.dgh_n + at * hidden;
            float* target = call.adjoint ? call.adjoint + at * hidden : nullptr;
            const float* dstate = call.dstates ? call.dstates + at * hidden : nullptr;
            std::memcpy(h + row * padded, states + (first + row) * hidden, hidden * sizeof(float));
            if (!call.mask || call.mask[t * call.mask_step + (first + row) * call.mask_row]) {
                step_back(layer, call.gates + at * 4 * padded, h + row * padded, dstate, own, back, dgi, dgh_n, target);
                continue;
            }
            for (size_t i = 0; dstate && i < hidden; i++) own[i] += dstate[i];
            std::memset(back, 0, 3 * padded * sizeof(float));
            std::memset(dgi, 0, 3 * hidden * sizeof(float));
            std::memset(dgh_n, 0, hidden * sizeof(float));
            if (target) std::memset(target, 0, hidden * sizeof(float));
        }
        add_transposed(layer.recurrent, adjoint.transposed, h, dgh, rows, dh, padded);
    }
    for (int row = 0; row < rows; row++)
        std::memcpy(call.dh0 + (first + row) * hidden, dh + row * padded, hidden * sizeof(float));
}
