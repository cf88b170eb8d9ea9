// A GRU layer over a sequence: the input product of a stretch of steps, then the scan over them.
// The definition of every bit is gruqat_hf/scan/reference.py.
#pragma once

#include <algorithm>
#include <utility>

#include "operands.h"

struct Layer {
    int32_t hidden, padded;  // padded: hidden, up to a multiple of TILE; the pitch of every array over features
    Operand input, recurrent;
    const float *bias_input, *bias_hidden;  // [3, padded] (and one TILE more), or null
    const float* state_grid;                // [4, padded]: scale, inverse, low, high of the carried state; or null
    const float* gates_grid;                // [4, 3, padded], of the pre-activations; or null
};

struct Call {
    const float* x;         // [steps, batch, in], or null where gi is given
    int64_t x_step, x_row;  // strides
    const float* gi;        // [steps, batch, 3, hidden]
    const float* h0;        // [batch, hidden] or null
    const uint8_t* mask;    // [steps, batch] or null
    int64_t mask_step, mask_row;
    float *out, *last;  // [steps, batch, hidden], [batch, hidden]
    float* gates;       // [steps, batch, 4, padded]: r, z, n and the hidden product of n, for the backward pass; or null
    int64_t steps, batch;
    int32_t reverse, threads;
};

// The OpenMP library that torch runs on: a second pool of threads would fight with it for the cores.
struct Team {
    void (*run)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
    int (*member)();                                          // omp_get_thread_num
    int (*size)();                                            // omp_get_num_threads
};
static Team team = {nullptr, nullptr, nullptr};

// Tasks keep to their threads from call to call, so that what a task reads stays in its core's cache.
template <typename F>
static void parallel(int tasks, int threads, const F& task) {
    if (threads <= 1 || tasks <= 1 || team.run == nullptr) {
        for (int i = 0; i < tasks; i++) task(i);
        return;
    }
    struct Shared {
        const F& task;
        int tasks;
    } shared = {task, tasks};
    auto member = [](void* data) {
        Shared& all = *(Shared*)data;
        for (int i = team.member(); i < all.tasks; i += team.size()) all.task(i);
    };
    team.run(member, &shared, unsigned(std::min(tasks, threads)), 0);
}

static inline Floats on_grid(Floats value, const float* grid, size_t pitch, size_t at) {
    const Floats inverse = load(grid + pitch + at), low = load(grid + 2 * pitch + at), high = load(grid + 3 * pitch + at);
    return grid_codes(value, inverse, low, high) * load(grid + at);
}

// Features [first, last) of one step of one row: from h [padded] to next, which may be the same. gi has its gates gi_pitch apart,
// gh (bias included) padded. `saved` [4, padded] or null.
static void step_row(
    const Layer& layer, const float* gi, size_t gi_pitch, const float* gh, const float* h, float* next, float* saved,
    size_t first, size_t last
) {
    const size_t padded = layer.padded;
    for (size_t i = first; i < last; i += LANES) {
        Floats r = load(gi + i) + load(gh + i), z = load(gi + gi_pitch + i) + load(gh + padded + i);
        if (layer.gates_grid) {
            r = on_grid(r, layer.gates_grid, 3 * padded, i);
            z = on_grid(z, layer.gates_grid, 3 * padded, padded + i);
        }
        r = portable_sigmoid(r);
        z = portable_sigmoid(z);
        Floats n = load(gi + 2 * gi_pitch + i) + r * load(gh + 2 * padded + i);
        if (layer.gates_grid) n = on_grid(n, layer.gates_grid, 3 * padded, 2 * padded + i);
        n = portable_tanh(n);
        Floats state = (1.0f - z) * n + z * load(h + i);
        if (layer.state_grid) state = on_grid(state, layer.state_grid, padded, i);
        if (saved) {
            store(saved + i, r);
            store(saved + padded + i, z);
            store(saved + 2 * padded + i, n);
            store(saved + 3 * padded + i, load(gh + 2 * padded + i));
        }
        store(next + i, state);
    }
}

// The states of rows [first, last) while a sequence is walked.
class Scan {
  public:
    Scan(const Layer& layer, const Call& call, int first, int last)
        : layer(layer), call(call), first(first), rows(last - first) {
        const size_t padded = layer.padded;
        h = scratch.take<float>(rows * padded);
        gh = scratch.take<float>(rows * 3 * padded);
        std::memset(h, 0, rows * padded * sizeof(float));
        std::memset(gh, 0, rows * 3 * padded * sizeof(float));
        for (int row = 0; call.h0 && row < rows; row++)
            std::memcpy(h + row * padded, call.h0 + (first + row) * size_t(layer.hidden), layer.hidden * sizeof(float));
        for (size_t i = 0; layer.state_grid && i < rows * padded; i += LANES)
            store(h + i, on_grid(load(h + i), layer.state_grid, padded, i % padded));
    }

    // Step `t`, with gi of its rows `gi_stride` apart.
    void step(int64_t t, const float* gi, size_t gi_stride, size_t gi_pitch) {
        multiply(0, operand_tiles(layer.recurrent));
        advance(t, gi, gi_stride, gi_pitch, h, 0, layer.padded);
    }

    // As step(), shared out over the outputs; for a hidden operand of one block.
    void step_together(int64_t t, const float* gi, size_t gi_stride, size_t gi_pitch) {
        const int tiles = operand_tiles(layer.recurrent), parts = std::min(call.threads, tiles);
        if (next == nullptr) {
            next = scratch.take<float>(rows * size_t(layer.padded));
            std::memset(next, 0, rows * size_t(layer.padded) * sizeof(float));
        }
        parallel(parts, call.threads, [&](int part) {
            const int from = tiles * part / parts, to = tiles * (part + 1) / parts;
            multiply(from, to);
            advance(t, gi, gi_stride, gi_pitch, next, size_t(from) * TILE, size_t(to) * TILE);
        });
        std::swap(h, next);
    }

    void finish() {
        const size_t hidden = layer.hidden, padded = layer.padded;
        for (int row = 0; row < rows; row++)
            std::memcpy(call.last + (first + row) * hidden, h + row * padded, hidden * sizeof(float));
    }

  private:
    const Layer& layer;
    const Call& call;
    const int first, rows;
    Scratch scratch;
    float *h, *gh, *next = nullptr;

    void multiply(int from, int to) {
        const size_t padded = layer.padded;
        operand_rows(layer.recurrent, {h, ptrdiff_t(padded), 0, 1}, rows, gh, padded, layer.bias_hidden, from, to);
    }

    // Features [from, to) of the states after step `t`.
    void advance(int64_t t, const float* gi, size_t gi_stride, size_t gi_pitch, float* target, size_t from, size_t to) {
        const size_t padded = layer.padded, end = std::min(to, size_t(layer.hidden));
        for (int row = 0; row < rows; row++) {
            const size_t at = t * call.batch + first + row;
            float* saved = call.gates ? call.gates + at * 4 * padded : nullptr;
            const float* before = h + row * padded;
            float* after = target + row * padded;
            if (!call.mask || call.mask[t * call.mask_step + (first + row) * call.mask_row]) {
                step_row(layer, gi + row * gi_stride, gi_pitch, gh + row * 3 * padded, before, after, saved, from, to);
            } else if (after != before) {
                std::memcpy(after + from, before + from, (to - from) * sizeof(float));
            }
            std::memcpy(call.out + at * layer.hidden + from, after + from, (end - from) * sizeof(float));
        }
    }
};

// Bytes of the hidden weights from which on it pays that each thread reads only its share of them, for few rows as for many.
constexpr double SHARE_BYTES = 1 << 20;

static inline bool shares_step(const Layer& layer) {
    const Factor& f = layer.recurrent.first;
    const double bytes = operand_work(layer.recurrent) * (f.integer ? sizeof(Weight) : sizeof(float));
    return layer.recurrent.kind == BLOCKS && f.blocks == 1 && bytes >= SHARE_BYTES;
}

static inline int64_t step_at(const Call& call, int64_t count) { return call.reverse ? call.steps - 1 - count : count; }

// Inputs of rows [first, last) for the steps from the start-th on, in the order in which they are walked.
static Rows input_rows(const Call& call, int64_t start, int first, int last) {
    const float* base = call.x + step_at(call, start) * call.x_step + first * call.x_row;
    return {base, call.reverse ? -call.x_step : call.x_step, ptrdiff_t(call.x_row), last - first};
}

// Input product and scan of rows [first, last), a stretch of steps at a time: what passes between them stays in the cache.
static void walk_rows(const Layer& layer, const Call& call, int first, int last) {
    const int rows = last - first;
    const size_t padded = layer.padded;
    const int64_t stretch = std::clamp<int64_t>(64 / rows, 1, call.steps);
    Scratch scratch;
    float* gi = scratch.take<float>(stretch * rows * 3 * padded);
    std::memset(gi, 0, stretch * rows * 3 * padded * sizeof(float));
    Scan scan(layer, call, first, last);
    for (int64_t start = 0; start < call.steps; start += stretch) {
        const int count = int(std::min(stretch, call.steps - start));
        Rows x = input_rows(call, start, first, last);
        operand_rows(layer.input, x, count * rows, gi, padded, layer.bias_input, 0, operand_tiles(layer.input));
        for (int i = 0; i < count; i++) scan.step(step_at(call, start + i), gi + i * rows * 3 * padded, 3 * padded, padded);
    }
    scan.finish();
}

// As walk_rows for all rows, products shared out over their outputs: for fewer rows than threads, or large weights.
static void walk_together(const Layer& layer, const Call& call) {
    const int rows = int(call.batch), tiles = operand_tiles(layer.input);
    const bool shared = shares_step(layer);
    const size_t padded = layer.padded;
    const int64_t stretch = std::clamp<int64_t>(128 / rows, 1, call.steps);
    Scratch scratch;
    float* gi = scratch.take<float>(stretch * rows * 3 * padded);
    std::memset(gi, 0, stretch * rows * 3 * padded * sizeof(float));
    Scan scan(layer, call, 0, rows);
    for (int64_t start = 0; start < call.steps; start += stretch) {
        const int count = int(std::min(stretch, call.steps - start));
        Rows x = input_rows(call, start, 0, rows);
        const int parts = std::min(call.threads, tiles);
        parallel(parts, call.threads, [&](int part) {
            operand_rows(
                layer.input, x, count * rows, gi, padded, layer.bias_input, tiles * part / parts, tiles * (part + 1) / parts
            );
        });
        for (int i = 0; i < count; i++) {
            const float* own = gi + i * rows * 3 * padded;
            if (shared) {
                scan.step_together(step_at(call, start + i), own, 3 * padded, padded);
            } else {
                scan.step(step_at(call, start + i), own, 3 * padded, padded);
            }
        }
    }
    scan.finish();
}

// The scan alone, of rows [first, last).
static void walk_products(const Layer& layer, const Call& call, int first, int last) {
    const size_t hidden = layer.hidden, padded = layer.padded, stride = 3 * hidden;
    Scan scan(layer, call, first, last);
    Scratch scratch;
    float* copy = hidden == padded ? nullptr : scratch.take<float>((last - first) * 3 * padded);
    if (copy) std::memset(copy, 0, (last - first) * 3 * padded * sizeof(float));
    for (int64_t count = 0; count < call.steps; count++) {
        const int64_t t = step_at(call, count);
        const float* gi = call.gi + (t * call.batch + first) * stride;
        if (copy) {
            for (int row = 0; row < 3 * (last - first); row++)
                std::memcpy(copy + row * padded, gi + row * hidden, hidden * sizeof(float));
            scan.step(t, copy, 3 * padded, padded);
        } else {
            scan.step(t, gi, stride, hidden);
        }
    }
    scan.finish();
}
