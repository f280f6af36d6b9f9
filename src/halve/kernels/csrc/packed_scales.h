// The scales of packed weights as floats.
#pragma once

#include "packing.h"
#include "simd.h"

namespace halve {
namespace {

// Of the kLanes outputs from `output` on, of the 64 at the head of a group or block.
inline Lanes scales_of(const Packed& w, const uint8_t* head, int64_t output) {
    if (w.scale_bytes == 4) return load(reinterpret_cast<const float*>(head) + output);
    return widened_halves(head + 2 * output);
}

inline void read_scales(const Packed& w, const uint8_t* head, float* scales) {
    for (int64_t n = 0; n < kBlock; n += kLanes) store(scales + n, scales_of(w, head, n));
}

// Of one output.
inline float scale_of(const Packed& w, const uint8_t* head, int64_t output) {
    return scales_of(w, head, output / kLanes * kLanes)[output % kLanes];
}

}  // namespace
}  // namespace halve
