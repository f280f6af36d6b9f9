// Vectors of integer codes: dot products of unsigned weight codes with int8 activations, and weights on their way
// there.
//
// Outputs lie in lanes and every lane holds a quad of inputs, so that one broadcast of 4 activation codes meets
// kVecOutputs outputs and no sum crosses lanes. A run of quads is summed in integers, exactly, beginning at minus the
// zero point times the sum of its activations; then it is scaled and added to float sums, one rounding a run:
//
//   sum[r][n] = fma(float(run), scale[n], sum[r][n])
//
// Runs have the same length and order for every number of rows, so that a row's sums have the same bits whatever the
// rows beside it. VNNI (of AVX-512: integer_stream.h, of AVX: integer_panels.h) adds 4 products into 32 bits, and a run
// is a group of weights, as it is on 64-bit ARM (neon_tiles.h). AVX2 multiplies pairs into 16 bits (vpmaddubsw) and
// adds there, wrapping: the final sum fits, since a run holds at most 2^15 / (127 * 2^(bits-1)) products a half-lane
// (integer_panels.h). 8-bit codes are multiplied as 16 bits instead (vpmaddwd).
#pragma once

// Not in the baseline rows, whatever the compiler was told of the processor: their callers give them floats.
#if !defined(HALVE_BASELINE) && (defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD))
#define HALVE_INTEGER_VECTORS 1

#include "packing.h"
#include "products.h"
#include "simd.h"

namespace halve {
namespace {

// Hot loops keep a name of their own in the library: a test disassembles them and looks for spilled registers.
#define HALVE_HOT __attribute__((noinline))

#if defined(__AVX512VNNI__)

typedef __m512i Vec;
constexpr bool kSixteenBit = false, kSignedBytes = false;

// One quad a lane.
inline Vec dot(Vec sum, Vec weights, Vec activations) { return _mm512_dpbusd_epi32(sum, weights, activations); }

#elif defined(__AVXVNNI__)

typedef __m256i Vec;
constexpr bool kSixteenBit = false, kSignedBytes = false;

// One quad a lane.
inline Vec dot(Vec sum, Vec weights, Vec activations) { return _mm256_dpbusd_avx_epi32(sum, weights, activations); }
inline Vec finished(Vec sum) { return sum; }

#elif defined(__AVX2__)

typedef __m256i Vec;
constexpr bool kSixteenBit = true, kSignedBytes = false;

// One quad a lane, as two sums of 16 bits.
inline Vec dot(Vec sum, Vec weights, Vec activations) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, activations));
}
inline Vec finished(Vec sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
// One pair of 16-bit numbers a lane.
inline Vec dot_pair(Vec sum, Vec weights, Vec activations) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, activations));
}

#else

typedef int32x4_t Vec;
// Dot products take signed bytes only. Codes of up to 6 bits are below 64 and go as they are; those of 8 bits lose
// their zero point when they are unpacked, and their sums begin at zero.
constexpr bool kSixteenBit = false, kSignedBytes = true;

// One quad a lane.
inline Vec dot(Vec sum, Vec weights, Vec activations) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(activations));
}
inline Vec finished(Vec sum) { return sum; }

#endif

static_assert(sizeof(Vec) == sizeof(Lanes), "a vector of codes has a lane for each output of a vector of floats");

inline Vec load_vec(const void* p) { return *static_cast<const Vec*>(p); }
inline void store_vec(void* p, Vec v) { *static_cast<Vec*>(p) = v; }
inline Vec broadcast_vec(int32_t x) { return (Vec)(Ints{} + x); }
inline Vec add32(Vec a, Vec b) { return (Vec)((Ints)a + (Ints)b); }
inline Lanes to_floats(Vec v) { return __builtin_convertvector((Ints)v, Lanes); }

// Every 16 bits to the right, or to the left where n is below 0.
template <int n>
inline Vec shifted_right(Vec v) {
    typedef uint16_t Halves __attribute__((vector_size(sizeof(Vec))));
    if constexpr (n < 0) return (Vec)((Halves)v << -n);
    return (Vec)((Halves)v >> (n < 0 ? 0 : n));
}

constexpr int kVecOutputs = sizeof(Vec) / 4;
constexpr int kVecs = static_cast<int>(kBlock) / kVecOutputs;  // of a block

inline int32_t int_at(const void* p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

// Quad q of a chunk for the outputs of one vector; `at` is the chunk's first step there.
template <int bits, int q>
inline Vec quad_of(const uint8_t* at) {
    if constexpr (bits == 8) {
        const Vec codes = load_vec(at + q * kStep);
        if constexpr (kSignedBytes) return codes ^ broadcast_vec(static_cast<int32_t>(0x80808080));
        return codes;
    }
    Vec quad = broadcast_vec(0);
    if constexpr (bits & 4) {
        quad = shifted_right<q % 2 * 4>(load_vec(at + q / 2 * kStep)) & broadcast_vec(0x0f0f0f0f);
        at += 4 * kStep;
    }
    if constexpr (bits & 2) {
        constexpr int low = bits & 4;
        const Vec mask = broadcast_vec(low ? 0x30303030 : 0x03030303);
        quad |= shifted_right<q % 4 * 2 - low>(load_vec(at + q / 4 * kStep)) & mask;
        at += 2 * kStep;
    }
    if constexpr (bits & 1) {
        constexpr int low = bits & 6;
        quad |= shifted_right<q - low>(load_vec(at)) & broadcast_vec(0x01010101 << low);
    }
    return quad;
}

// Codes of one row at an input, as the tiles read them.
inline const uint8_t* codes_at(const Activations& x, bool wide, int64_t row, int64_t input) {
    const int64_t at = row * x.code_stride + input;
    return wide ? reinterpret_cast<const uint8_t*>(x.wide + at) : reinterpret_cast<const uint8_t*>(x.codes + at);
}

}  // namespace
}  // namespace halve

#endif
