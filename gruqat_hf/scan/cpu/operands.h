// Products of whole operands (block-diagonal, diagonal, monarch) with rows of activations.
#pragma once

#include <cstdlib>
#include <limits>

#include "products.h"

// Scratch of one thread, kept from call to call. Whoever takes memory gives it back by leaving the scope of its Scratch.
class Scratch {
  public:
    Scratch() : start(used()) {}
    ~Scratch() { used() = start; }
    Scratch(const Scratch&) = delete;

    template <typename T>
    T* take(size_t count) {
        size_t bytes = (count * sizeof(T) + 2 * 64 - 1) / 64 * 64;  // room for a vector written past the end
        return (T*)grab(bytes);
    }

  private:
    struct Arena {
        char* chunks[32] = {};
        size_t sizes[32] = {};
        ~Arena() {
            for (char* chunk : chunks) std::free(chunk);
        }
    };
    struct Mark {
        int chunk;
        size_t offset;
    };
    Mark start;

    static Arena& arena() {
        static thread_local Arena own;
        return own;
    }
    static Mark& used() {
        static thread_local Mark own = {0, 0};
        return own;
    }
    static void* grab(size_t bytes) {
        Arena& all = arena();
        Mark& mark = used();
        while (mark.offset + bytes > all.sizes[mark.chunk]) {
            if (all.chunks[mark.chunk] == nullptr) {
                size_t size = size_t(1) << (mark.chunk + 18);
                while (size < bytes) size *= 2;
                all.chunks[mark.chunk] = (char*)std::aligned_alloc(64, size);
                if (all.chunks[mark.chunk] == nullptr) std::abort();
                all.sizes[mark.chunk] = size;
                mark.offset = 0;
            } else {
                mark = {mark.chunk + 1, 0};
            }
        }
        void* memory = all.chunks[mark.chunk] + mark.offset;
        mark.offset += bytes;
        return memory;
    }
};

// Rows that lie in steps of `inner` rows each.
struct Rows {
    const float* base;
    ptrdiff_t outer_stride, inner_stride;
    int inner;

    const float* operator[](int row) const { return base + row / inner * outer_stride + row % inner * inner_stride; }
};

enum OperandKind { BLOCKS, DIAGONAL, MONARCH };

struct Operand {
    int32_t kind, in, out;
    Factor first, second;  // of a diagonal: first.weights and first.scales are float [3, padded out], integer codes in float
};

static inline void fill_nan(float* values, int count) {
    for (int i = 0; i < count; i++) values[i] = std::numeric_limits<float>::quiet_NaN();
}

// Whether one of the values has no code.
static inline bool has_nan(const Grid& grid, const float* values, int count) {
    for (int i = 0; i < count; i++)
        if (std::isnan(values[i] * grid.inverse)) return true;
    return false;
}

// One row of flat codes into the packed layout, groups padded to whole steps.
static void spread_groups(const Factor& f, const Code* flat, Code* packed) {
    const int groups = f.blocks * f.groups, width = f.in / f.groups, padded = f.steps * PACK;
    for (int group = 0; group < groups; group++)
        std::memcpy(packed + group * padded, flat + group * width, width * sizeof(Code));
}

// One row of inputs, packed. Returns whether an integer row has a NaN.
static bool pack_row(const Factor& f, int set, const float* values, void* packed) {
    const int width = factor_width(f);
    if (!f.integer) {
        std::memcpy(packed, values, width * sizeof(float));
        return false;
    }
    if (size_t(width) == packed_width(f)) return quantize(f.grid[set], values, width, (Code*)packed);
    Scratch scratch;
    Code* flat = scratch.take<Code>(width);
    bool bad = quantize(f.grid[set], values, width, flat);
    spread_groups(f, flat, (Code*)packed);
    return bad;
}

// As pack_row, for values that lie [in, blocks].
static bool pack_transposed(const Factor& f, int set, const float* values, void* packed) {
    const int width = factor_width(f), blocks = f.blocks, in = f.in;
    if (!f.integer) {
        float* target = (float*)packed;
        for (int block = 0; block < blocks; block++)
            for (int i = 0; i < in; i++) target[block * in + i] = values[i * blocks + block];
        return false;
    }
    Scratch scratch;
    Code* flat = scratch.take<Code>(width);
    bool bad = quantize(f.grid[set], values, width, flat);
    bool whole = size_t(width) == packed_width(f);
    Code* turned = whole ? (Code*)packed : scratch.take<Code>(width);
    for (int block = 0; block < blocks; block++)
        for (int i = 0; i < in; i++) turned[block * in + i] = flat[i * blocks + block];
    if (!whole) spread_groups(f, turned, (Code*)packed);
    return bad;
}

static inline size_t element_size(const Factor& f) { return f.integer ? sizeof(Code) : sizeof(float); }

// y[row][gate * pitch + out] for tiles [first, last); y rows are 3 * pitch apart.
static void block_rows(
    const Operand& op, const Rows& x, int rows, float* y, int pitch, const float* bias, int first, int last
) {
    const Factor& f = op.first;
    Scratch scratch;
    const size_t stride = packed_width(f), bytes = stride * element_size(f);
    char* packed = scratch.take<char>(rows * bytes + 64);
    int* bad = scratch.take<int>(rows);
    int bad_rows = 0;
    for (int row = 0; row < rows; row++)
        if (pack_row(f, 0, x[row], packed + row * bytes)) bad[bad_rows++] = row;
    factor_rows(f, 0, packed, stride, rows, {y, size_t(3) * pitch, size_t(pitch), bias, 0}, f.out, first, last);
    for (int i = 0; i < bad_rows; i++)
        for (int index = first; index < last; index++) {
            int block = index / f.tiles, at = index % f.tiles * TILE;
            if (!has_nan(f.grid[0], x[bad[i]] + block * f.in, f.in)) continue;
            for (int gate = 0; gate < 3; gate++)
                fill_nan(y + (size_t(bad[i]) * 3 + gate) * pitch + block * f.out + at, f.out - at < TILE ? f.out - at : TILE);
        }
}

// Codes stay in float here: nothing is summed, and the zeros keep their signs.
static void diagonal_rows(const Operand& op, const Rows& x, int rows, float* y, int pitch, const float* bias) {
    const Factor& f = op.first;
    const float *weights = (const float*)f.weights, *scales = f.scales;
    const Grid& grid = f.grid[0];
    const Floats inverse = spread(grid.inverse), low = spread(grid.low), high = spread(grid.high);
    for (int row = 0; row < rows; row++) {
        const float* source = x[row];
        float* target = y + size_t(row) * 3 * pitch;
        for (int i = 0; i < op.out; i += LANES) {
            Floats value = load_part(source + i, op.out - i);
            if (f.integer) value = grid_codes(value, inverse, low, high);
            for (int gate = 0; gate < 3; gate++) {
                Floats product = value * load(weights + gate * pitch + i);
                if (f.integer) product = product * load(scales + gate * pitch + i);
                if (bias) product = product + load(bias + gate * pitch + i);
                store(target + gate * pitch + i, product);
            }
        }
    }
}

static void monarch_rows(const Operand& op, const Rows& x, int rows, float* y, int pitch, const float* bias) {
    constexpr int MOST = 8;
    const Factor &f = op.first, &g = op.second;
    const int middle = f.blocks * f.out, sets = g.sets, width = g.blocks * g.out;
    const size_t mid_pitch = middle + TILE, out_pitch = width + TILE;
    const size_t first_bytes = packed_width(f) * element_size(f), second_bytes = packed_width(g) * element_size(g);
    Scratch scratch;
    char* packed = scratch.take<char>(MOST * (first_bytes > second_bytes ? first_bytes : second_bytes) + 64);
    float* mid = scratch.take<float>(MOST * sets * mid_pitch);
    float* out = scratch.take<float>(MOST * 3 * out_pitch);
    for (int start = 0; start < rows; start += MOST) {
        const int count = rows - start < MOST ? rows - start : MOST;
        bool bad = false;
        for (int row = 0; row < count; row++) bad |= pack_row(f, 0, x[start + row], packed + row * first_bytes);
        const Target middles = {mid, sets * mid_pitch, mid_pitch, nullptr, 0};
        factor_rows(f, 0, packed, packed_width(f), count, middles, f.out, 0, f.blocks * f.tiles);
        for (int row = 0; bad && row < count; row++)
            for (int block = 0; block < f.blocks; block++)
                if (has_nan(f.grid[0], x[start + row] + block * f.in, f.in))
                    for (int set = 0; set < sets; set++) fill_nan(mid + (row * sets + set) * mid_pitch + block * f.out, f.out);
        for (int set = 0; set < sets; set++) {
            bad = false;
            for (int row = 0; row < count; row++)
                bad |= pack_transposed(g, set, mid + (row * sets + set) * mid_pitch, packed + row * second_bytes);
            Target target = {out + set * out_pitch, 3 * out_pitch, out_pitch, nullptr, 0};
            factor_rows(g, set, packed, packed_width(g), count, target, g.out, 0, g.blocks * g.tiles);
            for (int row = 0; bad && row < count; row++)
                for (int i = 0; i < middle; i++)
                    if (has_nan(g.grid[set], mid + (row * sets + set) * mid_pitch + i, 1))
                        for (int column = 0; column < g.columns; column++)
                            fill_nan(out + (row * 3 + set + column) * out_pitch + i % g.blocks * g.out, g.out);
        }
        for (int row = 0; row < count; row++)
            for (int gate = 0; gate < 3; gate++) {
                const float* source = out + (row * 3 + gate) * out_pitch;
                float* target = y + (size_t(start + row) * 3 + gate) * pitch;
                for (int i = 0; i < g.out; i++)
                    for (int block = 0; block < g.blocks; block++) target[i * g.blocks + block] = source[block * g.out + i];
                for (int i = 0; bias && i < width; i += LANES)
                    store(target + i, load(target + i) + load(bias + gate * pitch + i));
            }
    }
}

// How many parts the product of an operand can be split into over its outputs.
static inline int operand_tiles(const Operand& op) { return op.kind == BLOCKS ? op.first.blocks * op.first.tiles : 1; }

// y [rows, 3, pitch] = product with `x` (plus bias [3, pitch]); only tiles [first, last), of operand_tiles.
static void operand_rows(
    const Operand& op, const Rows& x, int rows, float* y, int pitch, const float* bias, int first, int last
) {
    if (op.kind == BLOCKS) {
        block_rows(op, x, rows, y, pitch, bias, first, last);
    } else if (op.kind == DIAGONAL) {
        diagonal_rows(op, x, rows, y, pitch, bias);
    } else {
        monarch_rows(op, x, rows, y, pitch, bias);
    }
}

// Multiplications of one row.
static inline double operand_work(const Operand& op) {
    auto work = [](const Factor& f) { return double(f.sets) * f.columns * f.blocks * f.out * f.in; };
    return op.kind == DIAGONAL ? 3.0 * op.out : work(op.first) + (op.kind == MONARCH ? work(op.second) : 0.0);
}
