// A block of 64 outputs of a bf16 matrix times rows of bf16 activations, by vdpbf16ps: two inputs a lane, as they lie.
//
// A product of two bf16 numbers is exact in float, and every product is one rounding of the sum. The instruction takes
// subnormal inputs and sums for zeros. Sums have one order whatever the rows beside it: stretches of kDepth inputs are
// summed pair after pair, and the stretches are added one after the other, as in float_products.h.
#pragma once

#include "float_products.h"

#if defined(__AVX512BF16__)

#include <immintrin.h>

namespace halve {
namespace {

constexpr int kBf16Rows = 6, kBf16Vecs = 4;  // a block's outputs in four vectors
constexpr int64_t kPairBytes = kBlock * 4;   // of the weights, for one pair of inputs

// sums [rows][64] += x [rows, stride] times `pairs` pairs of inputs of the weights.
template <int rows>
__attribute__((noinline)) void hot_bf16(const uint8_t* weights, const uint16_t* x, int64_t stride, int64_t pairs,
                                        float* sums) {
    __m512 total[rows][kBf16Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kBf16Vecs; ++c) total[r][c] = __m512{};
    }
    for (int64_t pair = 0; pair < pairs; ++pair, weights += kPairBytes, x += 2) {
        __m512bh w[kBf16Vecs];
#pragma GCC unroll 4
        for (int c = 0; c < kBf16Vecs; ++c) memcpy(&w[c], weights + c * 64, sizeof w[c]);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            int32_t two;
            memcpy(&two, x + r * stride, sizeof two);
            const __m512i asked = _mm512_set1_epi32(two);
            __m512bh input;
            memcpy(&input, &asked, sizeof input);
#pragma GCC unroll 4
            for (int c = 0; c < kBf16Vecs; ++c) total[r][c] = _mm512_dpbf16_ps(total[r][c], w[c], input);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kBf16Vecs; ++c) {
            float* at = sums + r * kBlock + c * 16;
            _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), total[r][c]));
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
            tiles[now - 1](weights, halves + row * x.code_stride + 2 * pair, x.code_stride,
                           least(kDepth / 2, all - pair), sums + row * kBlock);
            row += now;
        }
    }
    scale_rows(w, block, rows, sums);
}

}  // namespace
}  // namespace halve

#endif
