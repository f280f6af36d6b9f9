// The few operations on vectors that lanes.h cannot say: fused products, integer products of pairs, conversions. Each
// is one or two instructions where the instruction set has them; what is written on top reads the same everywhere.
#pragma once

#include "lanes.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX2__) && defined(__FMA__)
// gcc 12 takes the undefined registers of its own header for a mistake (gcc.gnu.org/PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#define HALVE_PAIR_PRODUCTS 1  // Words and everything on them exist
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(HALVE_BASELINE)
#define HALVE_PAIR_PRODUCTS 1
#include "simd_neon.h"
#endif

namespace halve {
namespace {

// The larger of each lane; where one is not a number, b.
inline Lanes maximum(Lanes a, Lanes b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// a * b + c, rounded once where the processor can; the same for every caller, which contraction does not promise.
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return (Lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// kLanes values in bf16, as floats.
inline Lanes widened_halves(const void* p) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i_u*>(p))), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
    Halves halves;
    memcpy(&halves, p, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

// 2^x for x up to 127, within 2e-7 of its size (polynomial: relative minimax of degree 5, 9.2e-8); 2^-126 below, and
// NaN stays NaN.
inline Lanes exp2(Lanes x) {
    const float shift = 12583039.0f;  // 1.5 * 2^23 + 127: adding it leaves round(x) + 127 in the low bits
    const Lanes c = maximum(broadcast(-126.0f), x);
    const Lanes shifted = c + shift;
    const Lanes r = c - (shifted - shift);
    Lanes p = broadcast(1.3264727313e-3f);
    p = fma(p, r, broadcast(9.6715129912e-3f));
    p = fma(p, r, broadcast(5.5507335812e-2f));
    p = fma(p, r, broadcast(2.4022242427e-1f));
    p = fma(p, r, broadcast(6.9314700365e-1f));
    p = fma(p, r, broadcast(1.0f));
    return p * (Lanes)((Bits)shifted << 23);
}

#if defined(__AVX2__) && defined(__FMA__)

constexpr int kWords = 2 * kLanes;
typedef int16_t Words __attribute__((vector_size(kLanes * 4)));

#if defined(__AVX512F__)

inline Words load_words(const int16_t* p) { return (Words)_mm512_loadu_si512(p); }

inline Words load_words(const int8_t* p) {
    return (Words)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Words load_words(const uint8_t* p) {
    return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store_words(int16_t* p, Words v) { _mm512_storeu_si512(p, (__m512i)v); }

inline Words broadcast_pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return (Words)_mm512_set1_epi32(both);
}

// sums + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1], exact while it fits 32 bits.
inline Ints add_products(Ints sums, Words a, Words b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    Ints products;  // in assembly, since gcc computes many products before it adds the first, and spills them
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sums), "=&v"(products) : "v"(a), "v"(b));
    return sums;
#endif
}

inline Lanes to_floats(Ints v) { return _mm512_cvtepi32_ps((__m512i)v); }

// Rounded to nearest even, each within 16 bits.
inline Words to_words(Lanes low, Lanes high) {
    const __m512i mixed = _mm512_packs_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
    return (Words)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed);
}

// The larger of lanes that are not negative, NaN above all.
inline Lanes maximum_positive(Lanes a, Lanes b) { return (Lanes)_mm512_max_epi32((__m512i)a, (__m512i)b); }

#else

inline Words load_words(const int16_t* p) { return (Words)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline Words load_words(const int8_t* p) {
    return (Words)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Words load_words(const uint8_t* p) {
    return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void store_words(int16_t* p, Words v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)v); }

inline Words broadcast_pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return (Words)_mm256_set1_epi32(both);
}

// sums + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1], exact while it fits 32 bits.
inline Ints add_products(Ints sums, Words a, Words b) {
#if defined(__AVXVNNI__)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    Ints products;  // as above
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "x"(b));
    return sums;
#endif
}

inline Lanes to_floats(Ints v) { return _mm256_cvtepi32_ps((__m256i)v); }

// Rounded to nearest even, each within 16 bits.
inline Words to_words(Lanes low, Lanes high) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
    return (Words)_mm256_permute4x64_epi64(mixed, 0xd8);
}

// The larger of lanes that are not negative, NaN above all.
inline Lanes maximum_positive(Lanes a, Lanes b) { return (Lanes)_mm256_max_epi32((__m256i)a, (__m256i)b); }

#endif
#endif

#if defined(HALVE_PAIR_PRODUCTS)

inline float largest_positive(Lanes v) {
    FourInts quarters[kLanes / 4];
    memcpy(quarters, &v, sizeof v);
    FourInts f = quarters[0];
    for (int i = 1; i < kLanes / 4; ++i) f = f > quarters[i] ? f : quarters[i];
    const int a = f[0] > f[2] ? f[0] : f[2], b = f[1] > f[3] ? f[1] : f[3];
    return float_of(static_cast<uint32_t>(a > b ? a : b));
}

// Pairs of bf16 as floats: the first of each pair, and the second.
inline void load_pairs(const uint16_t* p, Lanes* first, Lanes* second) {
    Bits both;
    memcpy(&both, p, sizeof both);
    *first = (Lanes)(both << 16);
    *second = (Lanes)(both & 0xffff0000u);
}

#endif

}  // namespace
}  // namespace halve
