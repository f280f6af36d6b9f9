// Causal softmax attention of one token and a few query heads of one key-value head.
//
// Online softmax (arXiv:1805.02867): positions come kPositions at a time; when the highest score so far rises, what
// was summed before is scaled down. A token's result depends on its own position and window alone.
#pragma once

#include "lanes.h"
#include "rows.h"

namespace halve {
namespace {

constexpr int64_t kPositions = 64;                 // whose scores are held at once
constexpr int64_t kHeadStride = kMaxHeadDim + 16;  // rows apart on different cache lines
constexpr int64_t kRead = 4;                       // whose keys or values are

// Where the keys and values of one sequence lie.
struct Places {
    const Attention* a;
    const int32_t* blocks;  // of this sequence, or null
    int64_t first;          // row of position 0 where there are no blocks
    int64_t head;           // key-value head

    int64_t element(int64_t position) const {
        const int64_t size = a->block_size;
        const int64_t row = blocks ? blocks[position / size] * size + position % size : first + position;
        return (row * a->num_kv_heads + head) * a->head_dim;
    }

    // The rows of n positions as floats, and zeros up to kRead.
    void read(const void* stored, int64_t position, int64_t n, float (*out)[kHeadStride]) const {
        for (int64_t j = 0; j < n; ++j) read_one(stored, position + j, out[j]);
        for (int64_t j = n; j < kRead; ++j) memset(out[j], 0, static_cast<size_t>(a->head_dim) * sizeof(float));
    }

    void read_one(const void* stored, int64_t position, float* __restrict out) const {
        const int64_t at = element(position);
        if (a->bf16) {
            const uint16_t* p = static_cast<const uint16_t*>(stored) + at;
            for (int64_t i = 0; i < a->head_dim; ++i) out[i] = from_bf16(p[i]);
        } else {
            memcpy(out, static_cast<const float*>(stored) + at, static_cast<size_t>(a->head_dim) * sizeof(float));
        }
    }
};

// The last sequence that starts at or before the token; empty ones before it own nothing.
inline int64_t sequence_of(const Attention& a, int64_t token) {
    int64_t low = 0, high = a.num_sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (a.cu_seqlens[middle] <= token ? low : high) = middle;
    }
    return low;
}

// Sums of one query head over the positions so far: values [width] weighted by e^(score - highest), and the weights.
struct Running {
    float highest;
    float weights;
};

// Turn n scores into weights relative to the highest so far, and scale down what was summed before.
inline void take(Running& r, float* scores, int64_t n, float* values, int64_t width) {
    float highest = r.highest;
    for (int64_t j = 0; j < n; ++j) highest = scores[j] > highest ? scores[j] : highest;
    for (int64_t j = n; j < round_up(n); ++j) scores[j] = -__builtin_inff();
    const float fade = exp(broadcast(r.highest - highest))[0];
    Lanes added = {};
    for (int64_t j = 0; j < n; j += kLanes) {
        const Lanes weights = exp(load(scores + j) - highest);
        store(scores + j, weights);
        added += weights;
    }
    for (int64_t i = 0; i < width; i += kLanes) store(values + i, load(values + i) * fade);
    r.weights = r.weights * fade + sum(added);
    r.highest = highest;
}

inline void score(const float* q, const float (*rows)[kHeadStride], int64_t width, float* scores) {
    Lanes products[kRead] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        const Lanes asked = load(q + i);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kRead; ++j) products[j] += asked * load(rows[j] + i);
    }
    const Four four = sums(products);
    memcpy(scores, &four, sizeof four);
}

inline void gather(float* values, const float (*rows)[kHeadStride], int64_t width, const float* weights) {
    for (int64_t i = 0; i < width; i += kLanes) {
        Lanes total = load(values + i);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kRead; ++j) total += load(rows[j] + i) * weights[j];
        store(values + i, total);
    }
}

void attention(const Attention& a, int64_t block) {
    const int64_t per_token = head_blocks(a), token = block / per_token, part = block % per_token;
    const int64_t group = a.num_heads / a.num_kv_heads, parts = per_token / a.num_kv_heads;
    const int64_t in_group = part % parts * kHeadsTogether, kv_head = part / parts;
    const int64_t first_head = kv_head * group + in_group, heads = least(kHeadsTogether, group - in_group);
    const int64_t sequence = sequence_of(a, token), dim = a.head_dim, width = round_up(dim);
    const Places places = {&a, a.block_tables ? a.block_tables + sequence * a.widest : nullptr, a.cu_seqlens[sequence],
                           kv_head};

    alignas(64) float q[kHeadsTogether][kHeadStride], values[kHeadsTogether][kHeadStride], rows[kRead][kHeadStride];
    alignas(64) float scores[kHeadsTogether][kPositions];
    Running running[kHeadsTogether];
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
    for (float* row : rows) memset(row, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t h = 0; h < heads; ++h) {
        const float* asked = a.q + (token * a.num_heads + first_head + h) * dim;
        for (int64_t i = 0; i < width; ++i) q[h][i] = i < dim ? asked[i] * scale : 0.0f;
        memset(values[h], 0, static_cast<size_t>(width) * sizeof(float));
        // A sink is a score whose value is zero.
        running[h] = a.sinks ? Running{a.sinks[first_head + h], 1.0f} : Running{-__builtin_inff(), 0.0f};
    }

    const int64_t own = a.positions[token];
    const int64_t oldest = a.window && own >= a.window ? own - a.window + 1 : 0;
    for (int64_t at = oldest; at <= own; at += kPositions) {
        const int64_t n = least(kPositions, own + 1 - at);
        for (int64_t j = 0; j < n; j += kRead) {
            places.read(a.k, at + j, least(kRead, n - j), rows);
            for (int64_t h = 0; h < heads; ++h) score(q[h], rows, width, scores[h] + j);
        }
        for (int64_t h = 0; h < heads; ++h) take(running[h], scores[h], n, values[h], width);
        for (int64_t j = 0; j < n; j += kRead) {
            places.read(a.v, at + j, least(kRead, n - j), rows);
            for (int64_t h = 0; h < heads; ++h) gather(values[h], rows, width, scores[h] + j);
        }
    }
    for (int64_t h = 0; h < heads; ++h) {
        float* out = a.out + (token * a.num_heads + first_head + h) * dim;
        for (int64_t i = 0; i < dim; ++i) out[i] = values[h][i] / running[h].weights;
    }
}

}  // namespace
}  // namespace halve
