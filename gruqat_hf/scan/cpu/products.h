// Products of packed block-diagonal factors with rows of activations: integer codes, exact whatever the order, or floats.
#pragma once

#include "vectors.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Activations are unsigned bytes, four to an instruction.
typedef uint8_t Code;
typedef int8_t Weight;
constexpr int PACK = 4;
#else
typedef int16_t Code;
typedef int16_t Weight;
constexpr int PACK = 2;
#endif

constexpr int VECTORS = TILE / LANES;

// A factor [gates, blocks, out, in], whose gates = sets * columns: each set has an input of its own, which its columns share.
// Outputs of a block lie in tiles of TILE lanes. An activation's code c is handled as c - low, which is not negative; `offsets`
// hold low * (sum of the weights), so that their sum with the product is the exact one.
struct Factor {
    // integer: Weight [sets, blocks, tiles, groups, steps, columns, TILE, PACK]; float: the same with one group and PACK 1
    const void* weights;
    const int32_t* offsets;  // [sets, blocks, tiles, groups, columns, TILE]
    const float* scales;     // [sets, blocks, tiles, groups, columns, TILE]: scale of the activation times that of the weight
    int32_t integer, sets, columns, blocks, tiles, groups, steps, in, out;
    Grid grid[3];  // of the input, by set
};

static inline int factor_width(const Factor& f) { return f.blocks * f.in; }

// Elements of one packed row of one set's input.
static inline size_t packed_width(const Factor& f) {
    return f.integer ? size_t(f.blocks) * f.groups * f.steps * PACK : size_t(f.blocks) * f.in;
}

static inline Ints dot(Ints sum, Ints codes, const Weight* weights) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_loadu_si512(weights));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_loadu_si256((const __m256i*)weights));
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)codes, _mm256_loadu_si256((const __m256i*)weights));
#elif defined(__SSE2__)
    return sum + (Ints)_mm_madd_epi16((__m128i)codes, _mm_loadu_si128((const __m128i*)weights));
#else
    Code pair[PACK * LANES];
    std::memcpy(pair, &codes, sizeof pair);
    for (int i = 0; i < LANES; i++) sum[i] += int(pair[2 * i]) * weights[2 * i] + int(pair[2 * i + 1]) * weights[2 * i + 1];
    return sum;
#endif
}

static inline Ints spread_pack(const Code* codes) {
    int32_t bits;
    std::memcpy(&bits, codes, sizeof bits);
    return bits - Ints{};
}

// Where a tile's results go: y[row * row_stride + column * column_stride + lane], for the first `lanes` lanes, plus bias if any.
struct Target {
    float* y;
    size_t row_stride, column_stride;
    const float* bias;  // [column, ...] with column_stride
    int lanes;
};

static inline void put(const Target& target, int row, int column, int vector, Floats value) {
    size_t at = column * target.column_stride + vector * LANES;
    if (target.bias) value = value + load(target.bias + at);
    store_part(target.y + row * target.row_stride + at, value, target.lanes - vector * LANES);
}

// Partial sums that are kept apart, so that short rows are not bound by the latency of one chain.
constexpr int splits(int accumulators) { return accumulators <= 3 ? 4 : accumulators <= 6 ? 2 : 1; }

// Few rows read weights faster than the hardware guesses ahead.
static inline void prefetch(const void* weights, size_t bytes) {
    constexpr size_t AHEAD = 2048, LINE = 64;
    for (size_t at = 0; at < bytes; at += LINE) __builtin_prefetch((const char*)weights + AHEAD + at);
}

template <int COLUMNS, int ROWS>
static void integer_tile(const Factor& f, size_t tile, const Code* x, size_t stride, const Target& target) {
    constexpr int SPLITS = splits(COLUMNS * ROWS * VECTORS);
    const size_t lanes = size_t(COLUMNS) * TILE;
    const Weight* w = (const Weight*)f.weights + tile * f.groups * f.steps * lanes * PACK;
    Floats total[ROWS][COLUMNS][VECTORS];
    for (int group = 0; group < f.groups; group++) {
        const size_t at = (tile * f.groups + group) * lanes;
        Ints sum[SPLITS][ROWS][COLUMNS][VECTORS] = {};
        for (int column = 0; column < COLUMNS; column++)
            for (int v = 0; v < VECTORS; v++)
                for (int row = 0; row < ROWS; row++)
                    std::memcpy(&sum[0][row][column][v], f.offsets + at + column * TILE + v * LANES, sizeof(Ints));
        auto advance = [&](auto& sums) {
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++) {
                Ints codes = spread_pack(x + row * stride);
#pragma GCC unroll 3
                for (int column = 0; column < COLUMNS; column++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++)
                        sums[row][column][v] = dot(sums[row][column][v], codes, w + (column * TILE + v * LANES) * PACK);
            }
            if constexpr (ROWS <= 2) prefetch(w, lanes * PACK * sizeof(Weight));
            x += PACK;
            w += lanes * PACK;
        };
        int step = 0;
        for (; step + SPLITS <= f.steps; step += SPLITS) {
#pragma GCC unroll 4
            for (int split = 0; split < SPLITS; split++) advance(sum[split]);
        }
        for (; step < f.steps; step++) advance(sum[0]);
        for (int row = 0; row < ROWS; row++)
            for (int column = 0; column < COLUMNS; column++)
                for (int v = 0; v < VECTORS; v++) {
                    Ints exact = sum[0][row][column][v];
                    for (int split = 1; split < SPLITS; split++) exact += sum[split][row][column][v];
                    Floats term = __builtin_convertvector(exact, Floats) * load(f.scales + at + column * TILE + v * LANES);
                    total[row][column][v] = group == 0 ? term : total[row][column][v] + term;
                }
    }
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++)
            for (int v = 0; v < VECTORS; v++) put(target, row, column, v, total[row][column][v]);
}

template <int COLUMNS, int ROWS>
static void float_tile(const Factor& f, size_t tile, const float* x, size_t stride, const Target& target) {
    constexpr int SPLITS = splits(COLUMNS * ROWS * VECTORS);
    const float* w = (const float*)f.weights + tile * f.in * COLUMNS * TILE;
    Floats sum[SPLITS][ROWS][COLUMNS][VECTORS] = {};
    auto advance = [&](auto& sums) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            Floats value = spread(x[row * stride]);
#pragma GCC unroll 3
            for (int column = 0; column < COLUMNS; column++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sums[row][column][v] = fma(value, load(w + column * TILE + v * LANES), sums[row][column][v]);
        }
        if constexpr (ROWS <= 2) prefetch(w, COLUMNS * TILE * sizeof(float));
        x++;
        w += COLUMNS * TILE;
    };
    int step = 0;
    for (; step + SPLITS <= f.in; step += SPLITS) {
#pragma GCC unroll 4
        for (int split = 0; split < SPLITS; split++) advance(sum[split]);
    }
    for (; step < f.in; step++) advance(sum[0]);
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++)
            for (int v = 0; v < VECTORS; v++) {
                Floats total = sum[0][row][column][v];
                for (int split = 1; split < SPLITS; split++) total = total + sum[split][row][column][v];
                put(target, row, column, v, total);
            }
}

template <int COLUMNS, int ROWS>
static inline void some_rows(const Factor& f, size_t tile, const void* x, size_t stride, const Target& target) {
    if (f.integer) {
        integer_tile<COLUMNS, ROWS>(f, tile, (const Code*)x, stride, target);
    } else {
        float_tile<COLUMNS, ROWS>(f, tile, (const float*)x, stride, target);
    }
}

// One tile for any number of rows; as many at a time as there are registers for.
template <int COLUMNS>
static void tile_rows(const Factor& f, size_t tile, const void* x, size_t stride, int rows, Target target) {
    constexpr int MOST = LANES == 16 ? 8 : LANES == 8 ? (COLUMNS == 1 ? 4 : 2) : 1;
    const size_t element = f.integer ? sizeof(Code) : sizeof(float);
    auto next = [&](int done) {
        rows -= done;
        x = (const char*)x + done * stride * element;
        target.y += done * target.row_stride;
    };
    for (; rows >= MOST; next(MOST)) some_rows<COLUMNS, MOST>(f, tile, x, stride, target);
    if constexpr (MOST > 4)
        for (; rows >= 4; next(4)) some_rows<COLUMNS, 4>(f, tile, x, stride, target);
    if constexpr (MOST > 2)
        for (; rows >= 2; next(2)) some_rows<COLUMNS, 2>(f, tile, x, stride, target);
    for (; rows > 0; next(1)) some_rows<COLUMNS, 1>(f, tile, x, stride, target);
}

// Tiles [first, last) of all tiles of one set. `x` are packed rows, `stride` elements apart; a block's outputs begin `pitch`
// after those of the block before.
static void factor_rows(
    const Factor& f, int set, const void* x, size_t stride, int rows, Target target, int pitch, int first, int last
) {
    const size_t element = f.integer ? sizeof(Code) : sizeof(float);
    const size_t block_width = packed_width(f) / f.blocks;
    float* y = target.y;
    const float* bias = target.bias;
    for (int index = first; index < last; index++) {
        int block = index / f.tiles, tile = index % f.tiles;
        int at = block * pitch + tile * TILE;
        target.y = y + at;
        target.bias = bias ? bias + at : nullptr;
        target.lanes = f.out - tile * TILE < TILE ? f.out - tile * TILE : TILE;
        const void* part = (const char*)x + block * block_width * element;
        size_t place = size_t(set) * f.blocks * f.tiles + index;
        if (f.columns == 3) {
            tile_rows<3>(f, place, part, stride, rows, target);
        } else {
            tile_rows<1>(f, place, part, stride, rows, target);
        }
    }
}

// Codes of `count` values. Returns whether one of them has none, as NaN.
static bool quantize(const Grid& grid, const float* values, int count, Code* codes) {
    typedef Code Narrow __attribute__((vector_size(LANES * sizeof(Code))));
    const Floats inverse = spread(grid.inverse), low = spread(grid.low), high = spread(grid.high);
    Ints bad = {};
    auto convert = [&](Floats value) {
        Floats code = grid_codes(value, inverse, low, high) - low;
        bad |= (Ints)(code != code);
        return __builtin_convertvector(__builtin_convertvector(code, Ints), Narrow);
    };
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        Narrow narrow = convert(load(values + i));
        std::memcpy(codes + i, &narrow, sizeof narrow);
    }
    if (i < count) {
        Narrow narrow = convert(load_part(values + i, count - i));
        std::memcpy(codes + i, &narrow, (count - i) * sizeof(Code));
    }
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= bad[lane];
    return any != 0;
}
