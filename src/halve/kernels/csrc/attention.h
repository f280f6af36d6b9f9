// Causal softmax attention over the paged cache. Source: online softmax, arXiv:1805.02867; tiles, arXiv:2205.14135.
//
// A row is one query head of one token. Its positions are taken in segments of kSegment that start at multiples of
// kSegment; sums over segments are added up within splits of kSplit positions, and those in order. Every sum has a
// score that it is relative to (the highest of its positions), so that two of them can be added at any time. Whether
// a row stands alone or in a tile of 64, and whether one thread takes all splits or many threads one each, the row
// goes through the same operations in the same order: its bits depend on its own query, position, keys and values.
//
// Scores are in powers of two: the query is scaled by log2(e) / sqrt(D) before anything else.
#pragma once

#include "attention_exact.h"
#include "attention_float.h"
#include "attention_int4.h"
#include "attention_int8.h"
#include "attention_sums.h"
#include "attention_units.h"
#include "kv_cache.h"

namespace halve {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

// The first position that the token at `own` sees.
inline int64_t oldest_seen(const Attention& a, int64_t own) {
    const int64_t of_window = a.window && own >= a.window ? own - a.window + 1 : 0;
    const int64_t of_chunk = a.chunk ? own / a.chunk * a.chunk : 0;
    return of_window > of_chunk ? of_window : of_chunk;
}

// The queries of one unit: tokens of one sequence, query heads of one key-value head, and the splits it sums.
struct Tile {
    const Attention& a;
    Shares shares;
    int64_t sequence, token, tokens;     // the first token in the batch, and how many
    int64_t kv_head, first_head, heads;  //
    int64_t first, last;                 // positions of the first and the last token
    int64_t split, end_split;

    // The first position that a token at `own` sees.
    int64_t oldest(int64_t own) const { return oldest_seen(a, own); }
    // How many splits it sees.
    int64_t num_splits(int64_t own) const { return own / kSplit - oldest(own) / kSplit + 1; }
};

// The last sequence whose tiles start at or before a tile.
inline int64_t sequence_of(const StepBatch& b, int64_t tokens, int64_t tile) {
    int64_t low = 0, high = b.num_sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (b.cu_seqlens[middle] / tokens + middle <= tile ? low : high) = middle;
    }
    return low;
}

// Later tokens first, since they see most; kv heads next to each other, since they lie so in a block.
inline Tile tile_of(const Attention& a, int64_t unit) {
    const StepBatch& b = *a.batch;
    const Shares s = shares_of(a);
    const int64_t group = a.num_heads / a.cache->num_kv_heads;
    const int64_t head_block = unit % s.head_blocks, above = unit / s.head_blocks;
    Tile t = {a, s, 0, 0, 0, above % a.cache->num_kv_heads, 0, 0, 0, -1, 0, 0};
    t.first_head = t.kv_head * group + head_block * s.heads;
    t.heads = smaller(s.heads, group - head_block * s.heads);
    const int64_t split = above / a.cache->num_kv_heads % s.splits;
    const int64_t tile = s.tiles - 1 - above / a.cache->num_kv_heads / s.splits;
    t.sequence = sequence_of(b, s.tokens, tile);
    const int64_t begin = b.cu_seqlens[t.sequence], end = b.cu_seqlens[t.sequence + 1];
    t.token = begin + (tile - begin / s.tokens - t.sequence) * s.tokens;
    t.tokens = smaller(s.tokens, end - t.token);
    if (t.tokens <= 0) return t;
    t.first = b.positions[t.token];
    t.last = t.first + t.tokens - 1;
    t.split = s.splits > 1 ? split : t.oldest(t.first) / kSplit;
    t.end_split = s.splits > 1 ? split + 1 : t.last / kSplit + 1;
    return t;
}

// Where the sums of (token, head, split) go between attention and attention_combine.
inline float* partial_of(const Attention& a, int64_t splits, int64_t token, int64_t head, int64_t split) {
    return a.scratch + ((token * a.num_heads + head) * splits + split) * partial_floats(a.cache->head_dim);
}

// What a row starts from: a sink is a score whose value is zero.
inline Sums start(const Attention& a, int64_t head, float* values) {
    memset(values, 0, static_cast<size_t>(row_width(a.cache->head_dim)) * sizeof(float));
    return a.sinks ? Sums{a.sinks[head] * kLog2e, 1.0f} : Sums{kLowest, 0.0f};
}

inline void finish(const Attention& a, int64_t token, int64_t head, const Sums& sums, const float* values) {
    float* out = a.out + token * a.out_stride + head * a.cache->head_dim;
    for (int64_t i = 0; i < a.cache->head_dim; ++i) out[i] = values[i] / sums.weights;
}

// Sums of the rows of a tile, token by token and in it head by head.
struct Rows64 {
    Sums sums[kQueryRows];
    alignas(64) float values[kQueryValues];
};

template <class Kernel>
void ask(const Tile& t, Kernel& kernel) {
    const Attention& a = t.a;
    const int64_t dim = a.cache->head_dim;
    const float scale = kLog2e / __builtin_sqrtf(static_cast<float>(dim));
    alignas(64) float query[kMaxHeadDim + 16];
    for (int64_t row = 0; row < t.tokens * t.heads; ++row) {
        const int64_t token = t.token + row / t.heads, head = t.first_head + row % t.heads, angles = token * (dim / 2);
        rotate(a.q + token * a.q_stride + head * dim, a.cos ? a.cos + angles : nullptr,
               a.cos ? a.sin + angles : nullptr, dim, query);
        if (a.cache->format == static_cast<int32_t>(KvFormat::kInt4)) hadamard(query, dim);
        for (int64_t i = 0; i < dim; ++i) query[i] *= scale;
        kernel.ask(row, query);
    }
}

// Add the positions [begin, end) of one split to the rows that see them; the unit goes on to `limit`.
template <class Kernel>
void add_split(const Tile& t, Kernel& kernel, int64_t begin, int64_t end, int64_t limit, Rows64& part) {
    const int64_t width = row_width(t.a.cache->head_dim), rows = t.tokens * t.heads;
    for (int64_t row = 0; row < rows; ++row) part.sums[row] = {kLowest, 0.0f};
    memset(part.values, 0, static_cast<size_t>(rows * width) * sizeof(float));
    for (int64_t at = begin / kSegment * kSegment; at < end; at += kSegment) {
        kernel.open(at, at > begin ? at : begin, smaller(at + kSegment, end), limit);
        const bool whole = at + kSegment <= t.first + 1 && at >= t.oldest(t.last);
        for (int64_t row = 0; row < rows;) {
            const int64_t own = t.first + row / t.heads, left = whole ? rows - row : t.heads - row % t.heads;
            const int64_t n = smaller(Kernel::kRowsTogether, left);
            const int64_t oldest = t.oldest(own);
            const int64_t low = whole || oldest < at ? 0 : oldest - at;
            const int64_t high = whole ? kSegment : smaller(kSegment, own + 1 - at);
            if (low < high) kernel.add(row, n, low, high, part.sums + row, part.values + row * width);
            row += n;
        }
    }
}

template <class Kernel>
void attend(const Tile& t) {
    const Attention& a = t.a;
    const int64_t width = row_width(a.cache->head_dim), rows = t.tokens * t.heads;
    const Places places = {a, layout_of(*a.cache), a.batch->block_tables + t.sequence * a.batch->widest, t.kv_head};
    Kernel kernel(places, rows);
    Rows64 total, part;
    ask(t, kernel);
    for (int64_t row = 0; row < rows; ++row) {
        total.sums[row] = start(a, t.first_head + row % t.heads, total.values + row * width);
    }
    for (int64_t split = t.split; split < t.end_split; ++split) {
        const int64_t oldest = t.oldest(t.first);
        const int64_t begin = split * kSplit > oldest ? split * kSplit : oldest;
        const int64_t end = smaller((split + 1) * kSplit, t.last + 1);
        if (begin >= end) continue;
        add_split(t, kernel, begin, end, smaller(t.end_split * kSplit, t.last + 1), part);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t token = t.token + row / t.heads, head = t.first_head + row % t.heads;
            const int64_t own = t.first + row / t.heads;
            const float* values = part.values + row * width;
            if (own / kSplit < split || t.oldest(own) / kSplit > split) continue;
            if (t.shares.splits > 1 && t.num_splits(own) > 1) {
                float* partial = partial_of(a, t.shares.splits, token, head, split);
                memcpy(partial, &part.sums[row], sizeof(Sums));
                memcpy(partial + 16, values, static_cast<size_t>(width) * sizeof(float));
            } else {
                add_sums(total.sums[row], total.values + row * width, part.sums[row], values, width);
            }
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t own = t.first + row / t.heads;
        const bool here = t.shares.splits == 1 || (t.num_splits(own) == 1 && own / kSplit == t.split);
        if (!here) continue;
        finish(a, t.token + row / t.heads, t.first_head + row % t.heads, total.sums[row], total.values + row * width);
    }
}

void attention(const Attention& a, int64_t unit) {
    const Tile t = tile_of(a, unit);
    if (t.tokens <= 0 || t.split * kSplit > t.last || t.end_split * kSplit <= t.oldest(t.first)) return;
#if defined(HALVE_PAIR_PRODUCTS)
    const KvCache& c = *a.cache;
    if (c.block_size == kFastBlock && c.head_dim % 16 == 0 && c.head_dim <= kFastHeadDim) {
        switch (static_cast<KvFormat>(c.format)) {
            case KvFormat::kFloat32:
                return attend<FloatKernel<float>>(t);
            case KvFormat::kBfloat16:
                return attend<FloatKernel<uint16_t>>(t);
            case KvFormat::kInt8:
                return attend<IntKernel>(t);
            case KvFormat::kInt4:
                if (c.head_dim % kKvGroup == 0) return attend<Int4Kernel>(t);
                break;
        }
    }
#endif
    attend<ExactKernel>(t);
}

void attention_combine(const Attention& a, int64_t unit) {
    const int64_t dim = a.cache->head_dim, width = row_width(dim), group = a.num_heads / a.cache->num_kv_heads;
    const int64_t token = unit / a.cache->num_kv_heads, own = a.batch->positions[token];
    const int64_t oldest = oldest_seen(a, own);
    const int64_t splits = shares_of(a).splits;
    if (own / kSplit == oldest / kSplit) return;
    alignas(64) float values[kMaxHeadDim];
    for (int64_t h = 0; h < group; ++h) {
        const int64_t head = unit % a.cache->num_kv_heads * group + h;
        Sums total = start(a, head, values);
        for (int64_t split = oldest / kSplit; split <= own / kSplit; ++split) {
            const float* partial = partial_of(a, splits, token, head, split);
            Sums sums;
            memcpy(&sums, partial, sizeof sums);
            add_sums(total, values, sums, partial + 16, width);
        }
        finish(a, token, head, total, values);
    }
}

}  // namespace
}  // namespace halve
