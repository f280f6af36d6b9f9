// Vectors of floats as wide as the instruction set that this translation unit is compiled for, and what is computed
// on them. Everything lies in an anonymous namespace, and nothing comes from the standard library: an inline function
// shared between translation units could reach a processor that lacks the instructions of the one that was kept.
#pragma once

#include <stdint.h>
#include <string.h>

namespace halve {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileOutputs = 4;  // 6 x 4 accumulators in 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kTileOutputs = 2;  // 6 x 2 accumulators in 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileOutputs = 2;
#endif

typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

constexpr int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline Lanes load(const float* p) {
    Lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The first n lanes from memory, zero beyond; never reads past p + n.
inline Lanes load(const float* p, int64_t n) {
    Lanes v = {};
    memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
}

inline void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }

inline void store(float* p, Lanes v, int64_t n) { memcpy(p, &v, static_cast<size_t>(n) * sizeof(float)); }

inline Lanes broadcast(float x) { return Lanes{} + x; }

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

#if defined(__clang__)
#define HALVE_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define HALVE_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, FourInts{i, j, k, l})
#endif

// Halves added until four lanes are left.
inline Four fold(Lanes v) {
#if defined(__AVX512F__)
    typedef float Eight __attribute__((vector_size(32)));
    Eight halves[2];
    memcpy(halves, &v, sizeof v);
    const Eight half = halves[0] + halves[1];
    Four quarters[2];
    memcpy(quarters, &half, sizeof half);
    return quarters[0] + quarters[1];
#elif defined(__AVX__)
    Four halves[2];
    memcpy(halves, &v, sizeof v);
    return halves[0] + halves[1];
#else
    return v;
#endif
}

// All lanes added as a tree. `sums` does four vectors at once, each in the same order as `sum`.
inline float sum(Lanes v) {
    const Four f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

inline Four sums(const Lanes* v) {
    const Four a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const Four ab = HALVE_SHUFFLE(a, b, 0, 4, 1, 5) + HALVE_SHUFFLE(a, b, 2, 6, 3, 7);
    const Four cd = HALVE_SHUFFLE(c, d, 0, 4, 1, 5) + HALVE_SHUFFLE(c, d, 2, 6, 3, 7);
    return HALVE_SHUFFLE(ab, cd, 0, 1, 4, 5) + HALVE_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The largest magnitude of n numbers; NaN where any of them is.
inline float absmax(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    return float_of(most);
}

inline float from_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
}

// A half's exponent and mantissa, moved into a float's fields, are the value times 2^-112; exact, subnormals too.
inline float from_half(uint16_t half) {
    const uint32_t magnitude = bits_of(float_of(static_cast<uint32_t>(half & 0x7fff) << 13) * 0x1p112f);
    const uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity and NaN
    return float_of(magnitude | infinite | static_cast<uint32_t>(half & 0x8000) << 16);
}

// e^x within 2 ulp from -87.3 to 88.3; 0 below (no subnormals), e^88.3 above; NaN stays NaN. Reduction by ln 2 in two
// parts and the polynomial of Cephes' expf.
inline Lanes exp(Lanes x) {
    const Lanes lowest = broadcast(-87.33654f), highest = broadcast(88.37626f);
    Lanes c = x < lowest ? lowest : x;
    c = c > highest ? highest : c;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, left in the low bits
    const Lanes shifted = c * 1.44269504088896341f + shift;
    const Lanes n = shifted - shift;
    const Lanes r = c - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Bits power;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + (127u << 23);
    Lanes scale;
    memcpy(&scale, &power, sizeof scale);
    return x < lowest ? Lanes{} : p * scale;
}

}  // namespace
}  // namespace halve
