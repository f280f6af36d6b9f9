// A block of 64 outputs of a bf16 matrix times rows of bf16 activations, by the dot products of AVX-512 BF16
// (vdpbf16ps) or Armv8.6 (bfdot): two inputs a lane, as they lie.
//
// A product of two bf16 numbers is exact in float, and every product is one rounding of the sum. The instruction takes
// subnormal inputs and sums for zeros. Sums have one order whatever the rows beside it: stretches of kDepth inputs are
// summed pair after pair, and the stretches are added one after the other, as in float_products.h.
#pragma once

#include "float_products.h"

#if !defined(HALVE_BASELINE) && !defined(__AMX_BF16__) && \
    (defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define HALVE_BF16_PRODUCTS 1

namespace halve {
namespace {

constexpr int kBf16Rows = 6, kBf16Vecs = 4;
constexpr int64_t kPairBytes = kBlock * 4;  // of the weights, for one pair of inputs

// Pairs of bf16 for each lane, and sum + a[0] * b[0] + a[1] * b[1] of every lane.
#if defined(__AVX512BF16__)

typedef __m512bh Pairs;
inline Lanes dot(Lanes sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

#else

typedef bfloat16x8_t Pairs;
inline Lanes dot(Lanes sum, Pairs a, Pairs b) { return (Lanes)vbfdotq_f32((float32x4_t)sum, a, b); }

#endif

inline Pairs pairs_at(const void* p) {
    Pairs pairs;
    memcpy(&pairs, p, sizeof pairs);
    return pairs;
}

inline Pairs broadcast_pairs(const void* p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof pair);
    const Bits all = Bits{} + pair;
    return pairs_at(&all);
}

// sums [rows][64] += x [rows, stride] times `pairs` pairs of inputs of the weights, kBf16Vecs vectors of outputs.
template <int rows>
__attribute__((noinline)) void hot_bf16(const uint8_t* weights, const uint16_t* x, int64_t stride, int64_t pairs,
                                        float* sums) {
    Lanes total[rows][kBf16Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kBf16Vecs; ++c) total[r][c] = Lanes{};
    }
    for (int64_t pair = 0; pair < pairs; ++pair, weights += kPairBytes, x += 2) {
        Pairs w[kBf16Vecs];
#pragma GCC unroll 4
        for (int c = 0; c < kBf16Vecs; ++c) w[c] = pairs_at(weights + c * sizeof(Pairs));
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Pairs input = broadcast_pairs(x + r * stride);
#pragma GCC unroll 4
            for (int c = 0; c < kBf16Vecs; ++c) total[r][c] = dot(total[r][c], w[c], input);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kBf16Vecs; ++c) {
            float* at = sums + r * kBlock + c * kLanes;
            store(at, load(at) + total[r][c]);
        }
    }
}

// sums [rows][64]: the products of one block with rows [first, first + rows) of bf16 activations.
void bf16_block(const Packed& w, int64_t index, const Activations& x, int64_t first, int64_t rows, float* sums) {
    typedef void (*Tile)(const uint8_t*, const uint16_t*, int64_t, int64_t, float*);
    static constexpr Tile tiles[kBf16Rows] = {hot_bf16<1>, hot_bf16<2>, hot_bf16<3>,
                                              hot_bf16<4>, hot_bf16<5>, hot_bf16<6>};
    const uint8_t* block = w.data + index * w.block_bytes;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(x.wide) + first * x.code_stride;
    memset(sums, 0, static_cast<size_t>(rows * kBlock) * sizeof(float));
    const int64_t strips = ceil_div(rows, kBf16Rows), all = ceil_div(w.in_features, 2);
    for (int64_t pair = 0; pair < all; pair += kDepth / 2) {
        const uint8_t* weights = block + head_bytes(w) + pair * kPairBytes;
        for (int64_t strip = 0, row = 0; strip < strips; ++strip) {
            const int64_t now = ceil_div(rows - row, strips - strip);
            for (int64_t output = 0; output < kBlock; output += kBf16Vecs * kLanes) {
                tiles[now - 1](weights + output * 4, halves + row * x.code_stride + 2 * pair, x.code_stride,
                               least(kDepth / 2, all - pair), sums + row * kBlock + output);
            }
            row += now;
        }
    }
    scale_rows(w, block, rows, sums);
}

}  // namespace
}  // namespace halve

#endif
