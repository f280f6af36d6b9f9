// Tiles of integer products on 64-bit ARM, for integer_panels.h alone: dot products of signed bytes (sdot, Armv8.2),
// and with i8mm products of 2 x 8 by 8 x 2 bytes (smmla, Armv8.6). Sums are exact: a row has the same bits by either.
#pragma once

namespace halve {
namespace {

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Two quads of four outputs as a panel holds them: eight inputs of the first two outputs, and of the second two.
inline void store_quads(uint8_t* to, Vec even, Vec odd) {
    vst1q_s32(reinterpret_cast<int32_t*>(to), vzip1q_s32(even, odd));
    vst1q_s32(reinterpret_cast<int32_t*>(to + kPanelStep), vzip2q_s32(even, odd));
}

// Sums of one run for `rows` rows, two together (a last one beside itself), and kTileVecs vectors of four outputs, two
// together.
template <int rows, bool raw>
struct RunSums {
    static constexpr int kPairs = (rows + 1) / 2;
    Vec sum[kPairs][kTileVecs][2];  // [outputs 0, 1 or 2, 3][of output 0: rows 0, 1; of output 1: rows 0, 1]
    const int32_t* starts;
    int64_t stride;

    inline void begin(const int32_t* at, int64_t apart) {
        starts = at;
        stride = apart;
#pragma GCC unroll 8
        for (int r = 0; r < kPairs; ++r) {
#pragma GCC unroll 8
            for (int c = 0; c < kTileVecs; ++c) sum[r][c][0] = sum[r][c][1] = vdupq_n_s32(0);
        }
    }

    // Four quads of weights, from `codes` on, times 16 inputs of each row.
    inline void add(const uint8_t* codes, const uint8_t* activations, int64_t row_bytes) {
        int8x16_t both[kPairs][2];
#pragma GCC unroll 8
        for (int r = 0; r < kPairs; ++r) {
            const uint8_t* at = activations + 2 * r * row_bytes;
            const int64x2_t first = vreinterpretq_s64_u8(vld1q_u8(at));
            const int64x2_t second = vreinterpretq_s64_u8(vld1q_u8(2 * r + 1 < rows ? at + row_bytes : at));
            both[r][0] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
            both[r][1] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
            for (int c = 0; c < kTileVecs; ++c) {
#pragma GCC unroll 2
                for (int pair = 0; pair < 2; ++pair) {
                    int8x16_t weights =
                        vreinterpretq_s8_u8(vld1q_u8(codes + (2 * half + pair) * kPanelStep + c * sizeof(Vec)));
                    asm volatile("" : "+w"(weights));  // else gcc loads all of them first, and spills sums
#pragma GCC unroll 8
                    for (int r = 0; r < kPairs; ++r)
                        sum[r][c][pair] = vmmlaq_s32(sum[r][c][pair], weights, both[r][half]);
                }
            }
        }
    }

    inline void end(bool, const float* scales, float* sums) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec start = vdupq_n_s32(raw ? 0 : starts[r * stride]);
#pragma GCC unroll 8
            for (int c = 0; c < kTileVecs; ++c) {
                const Vec first = sum[r / 2][c][0], second = sum[r / 2][c][1];
                const Vec run = vaddq_s32(start, r % 2 ? vuzp2q_s32(first, second) : vuzp1q_s32(first, second));
                float* at = sums + r * kBlock + 4 * c;
                if (raw) {
                    int32_t* whole = reinterpret_cast<int32_t*>(at);
                    vst1q_s32(whole, vaddq_s32(vld1q_s32(whole), run));
                } else {
                    vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(run), vld1q_f32(scales + 4 * c)));
                }
            }
        }
    }
};

#else

inline void store_quads(uint8_t* to, Vec even, Vec odd) {
    vst1q_s32(reinterpret_cast<int32_t*>(to), even);
    vst1q_s32(reinterpret_cast<int32_t*>(to + kPanelStep), odd);
}

// Sums of one run for `rows` rows and kTileVecs vectors of four outputs.
template <int rows, bool raw>
struct RunSums {
    Vec sum[rows][kTileVecs];

    inline void begin(const int32_t* starts, int64_t stride) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec start = vdupq_n_s32(raw ? 0 : starts[r * stride]);
#pragma GCC unroll 8
            for (int c = 0; c < kTileVecs; ++c) sum[r][c] = start;
        }
    }

    template <int quad>
    inline void add_quad(const uint8_t* codes, const int8x16_t (&inputs)[rows]) {
#pragma GCC unroll 8
        for (int c = 0; c < kTileVecs; ++c) {
            int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(codes + c * sizeof(Vec)));
            asm volatile("" : "+w"(weights));  // else gcc loads all of them first, and spills sums
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) sum[r][c] = vdotq_laneq_s32(sum[r][c], weights, inputs[r], quad);
        }
    }

    // Four quads of weights, from `codes` on, times 16 inputs of each row.
    inline void add(const uint8_t* codes, const uint8_t* activations, int64_t row_bytes) {
        int8x16_t inputs[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) inputs[r] = vreinterpretq_s8_u8(vld1q_u8(activations + r * row_bytes));
        add_quad<0>(codes, inputs);
        add_quad<1>(codes + kPanelStep, inputs);
        add_quad<2>(codes + 2 * kPanelStep, inputs);
        add_quad<3>(codes + 3 * kPanelStep, inputs);
    }

    inline void end(bool, const float* scales, float* sums) {
#pragma GCC unroll 8
        for (int c = 0; c < kTileVecs; ++c) {
            const float32x4_t scale = raw ? vdupq_n_f32(0.0f) : vld1q_f32(scales + 4 * c);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                float* at = sums + r * kBlock + 4 * c;
                if (raw) {
                    int32_t* whole = reinterpret_cast<int32_t*>(at);
                    vst1q_s32(whole, vaddq_s32(vld1q_s32(whole), sum[r][c]));
                } else {
                    vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(sum[r][c]), scale));
                }
            }
        }
    }
};

#endif

}  // namespace
}  // namespace halve
