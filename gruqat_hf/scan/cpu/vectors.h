// Vectors of LANES floats, rounding, and the portable gates of gruqat_hf/arithmetic/gates.py.
// Every operation is rounded on its own: this is compiled with -ffp-contract=off, and fma() is called by float products only.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Arrays over features are padded to a multiple of TILE, at every instruction set.
constexpr int TILE = 16;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

static inline Floats load(const float* source) {
    Floats value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

static inline void store(float* target, Floats value) { std::memcpy(target, &value, sizeof value); }

// The first `left` lanes, the rest zero; all of them if there are as many.
static inline Floats load_part(const float* source, ptrdiff_t left) {
    if (left >= LANES) return load(source);
    Floats value = {};
    if (left > 0) std::memcpy(&value, source, left * sizeof(float));
    return value;
}

static inline void store_part(float* target, Floats value, ptrdiff_t left) {
    if (left >= LANES) {
        store(target, value);
    } else if (left > 0) {
        std::memcpy(target, &value, left * sizeof(float));
    }
}

static inline Floats spread(float value) { return value - Floats{}; }

static inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Half to even. The sign of a zero is kept, as torch.round does.
static inline Floats round_even(Floats value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Floats)_mm256_round_ps((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Floats rounded;
    for (int i = 0; i < LANES; i++) rounded[i] = std::nearbyint(value[i]);
    return rounded;
#endif
}

// NaN stays NaN: a comparison with it is false.
static inline Floats clamp(Floats value, Floats low, Floats high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// An integer grid, as gruqat_hf.quantization.Grid: bounds are integers, so that clamping may come before rounding.
struct Grid {
    float scale, inverse, low, high;
};

static inline Floats grid_codes(Floats value, Floats inverse, Floats low, Floats high) {
    return round_even(clamp(value * inverse, low, high));
}

// The constants come from gates.py through the compiler's command line.
static inline Floats rational(
    Floats x, float bound, float p3, float p2, float p1, float p0, float a, float b, float c, float e
) {
    x = clamp(x, spread(-bound), spread(bound));
    Floats s = x * x;
    Floats n = (((s * p3 + p2) * s + p1) * s + p0) * x;
    Floats d = ((s + a) * s + b) * ((s + c) * s + e);
    Floats y = (Floats)(RECIPROCAL_SEED - (Ints)d);
    Floats z = RECIPROCAL_CENTRE - d * y;
    Floats r = n * y;
    Floats w = z * z;
    return r + ((z + w) * r) * (w + 1.0f);
}

static inline Floats portable_tanh(Floats x) { return rational(x, TANH_CONSTANTS); }

static inline Floats portable_sigmoid(Floats x) { return rational(x, SIGMOID_CONSTANTS) + 0.5f; }
