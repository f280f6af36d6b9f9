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

// By what two sums are scaled when they are added: one of the two is 1.
struct Fades {
    float mine, theirs;
};

inline Fades fade(Sums& mine, float highest, float weights) {
    const float top = highest > mine.highest ? highest : mine.highest;
    Lanes apart = {};
    apart[0] = mine.highest - top;
    apart[1] = highest - top;
    const Lanes faded = exp2(apart);
    mine.highest = top;
    mine.weights = mine.weights * faded[0] + weights * faded[1];
    return {faded[0], faded[1]};
}

inline void add_sums(Sums& mine, float* values, const Sums& theirs, const float* theirs_values, int64_t width) {
    const Fades f = fade(mine, theirs.highest, theirs.weights);
    for (int64_t i = 0; i < width; i += kLanes) {
        store(values + i, fma(load(values + i), broadcast(f.mine), load(theirs_values + i) * f.theirs));
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
