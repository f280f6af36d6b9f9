// A block of 64 outputs of an integer matrix times rows of int8 activations, from one packed form for any row count.
#pragma once

#include "integer_panels.h"
#include "integer_stream.h"

#if defined(HALVE_INTEGER_VECTORS)

namespace halve {
namespace {

// sums [rows][64]: the products of one block with rows [first, first + rows) of int8 activations.
void integer_block(const Packed& w, int64_t index, const Activations& x, int64_t first, int64_t rows, float* sums) {
    const uint8_t* block = w.data + index * w.block_bytes;
    for (int64_t r = 0; r < rows; ++r) {  // 0, or as integers all that the row's sums begin at
        const Vec start = broadcast_vec(w.group || kSignedBytes ? 0 : x.starts[(first + r) * x.start_stride]);
        for (int c = 0; c < kVecs; ++c) store_vec(sums + r * kBlock + c * kVecOutputs, start);
    }
    switch (w.bits) {
        case 2:
            integer_sums<2, false>(w, block, x, first, rows, sums);
            break;
        case 3:
            integer_sums<3, false>(w, block, x, first, rows, sums);
            break;
        case 4:
            integer_sums<4, false>(w, block, x, first, rows, sums);
            break;
        case 5:
            integer_sums<5, false>(w, block, x, first, rows, sums);
            break;
        case 6:
            integer_sums<6, false>(w, block, x, first, rows, sums);
            break;
        default:
            w.group ? integer_sums<8, false>(w, block, x, first, rows, sums)
                    : integer_sums<8, true>(w, block, x, first, rows, sums);
    }
    alignas(64) float scales[kBlock];
    if (!w.group) read_scales(w, block, scales);
    for (int64_t r = 0; r < rows; ++r) {
        const float scale = x.scale[first + r];
        for (int n = 0; n < kBlock; ++n) {
            float* at = sums + r * kBlock + n;
            *at = (w.group ? *at : static_cast<float>(static_cast<int32_t>(bits_of(*at))) * scales[n]) * scale;
        }
    }
}

}  // namespace
}  // namespace halve

#endif
