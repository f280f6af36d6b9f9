// What kernels of attention share: sums relative to a score, and where the blocks of a sequence lie.
#pragma once

#include "attention_units.h"
#include "kv_cache.h"
#include "simd.h"

namespace halve {
namespace {

constexpr float kLowest = -3.402823466e38f;  // below every score; finite, so that differences are numbers

// Sums of one row over some positions: weights 2^(score - highest); values weighted by them lie elsewhere.
struct Sums {
    float highest;
    float weights;
};

inline void add_sums(Sums& mine, float* values, const Sums& theirs, const float* theirs_values, int64_t width) {
    const float top = theirs.highest > mine.highest ? theirs.highest : mine.highest;
    const Lanes fade = exp2(broadcast(mine.highest - top)), theirs_fade = exp2(broadcast(theirs.highest - top));
    mine.highest = top;
    mine.weights = fma(broadcast(mine.weights), fade, theirs.weights * theirs_fade)[0];
    for (int64_t i = 0; i < width; i += kLanes) {
        store(values + i, fma(load(values + i), fade, load(theirs_values + i) * theirs_fade));
    }
}

// Where the keys and values of one head of one sequence lie.
struct Places {
    const Attention& a;
    KvLayout layout;
    const int32_t* blocks;
    int64_t kv_head;

    // The head's part of the block of a position.
    const char* block(int64_t position) const {
        return head_at(*a.cache, layout, blocks[position / a.cache->block_size], kv_head);
    }
};

}  // namespace
}  // namespace halve
