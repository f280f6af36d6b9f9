// The operations of simd.h on the vectors of 64-bit ARM: four floats, and eight words of 16 bits. For simd.h alone.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace halve {
namespace {

constexpr int kWords = 2 * kLanes;
typedef int16_t Words __attribute__((vector_size(kLanes * 4)));

inline Words load_words(const int16_t* p) { return (Words)vld1q_s16(p); }

inline Words load_words(const int8_t* p) { return (Words)vmovl_s8(vld1_s8(p)); }

inline Words load_words(const uint8_t* p) { return (Words)vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))); }

inline void store_words(int16_t* p, Words v) { vst1q_s16(p, (int16x8_t)v); }

inline Words broadcast_pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return (Words)vdupq_n_s32(both);
}

// sums + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1], exact while it fits 32 bits.
inline Ints add_products(Ints sums, Words a, Words b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return sums + (Ints)vpaddq_s32(low, high);
}

inline Lanes to_floats(Ints v) { return (Lanes)vcvtq_f32_s32((int32x4_t)v); }

// Rounded to nearest even, each within 16 bits.
inline Words to_words(Lanes low, Lanes high) {
    const int16x4_t first = vqmovn_s32(vcvtnq_s32_f32((float32x4_t)low));
    return (Words)vqmovn_high_s32(first, vcvtnq_s32_f32((float32x4_t)high));
}

// The larger of lanes that are not negative, NaN above all.
inline Lanes maximum_positive(Lanes a, Lanes b) { return (Lanes)vmaxq_s32((int32x4_t)(Ints)a, (int32x4_t)(Ints)b); }

}  // namespace
}  // namespace halve
