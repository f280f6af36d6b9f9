// How attention falls into units that any thread may do in any order: tiles of queries, times key-value heads, times
// splits of a long context. What a unit computes does not depend on how the batch was cut: sums are taken over
// segments and splits that lie at fixed positions of the sequence. In an anonymous namespace, since it is compiled for
// several instruction sets (see lanes.h).
#pragma once

#include "kv_layout.h"

namespace halve {
namespace {

constexpr int64_t kSegment = 128;           // positions whose scores are held at once
constexpr int64_t kSplit = 2048;            // positions that are summed by themselves
constexpr int64_t kSplitTokens = 64;        // a step of up to so many tokens may share a context among threads
constexpr int64_t kEnoughUnits = 64;        // for any number of threads that a context need not be shared by
constexpr int64_t kQueryRows = 64;          // queries that share one pass over keys and values, at most
constexpr int64_t kQueryValues = 64 * 256;  // floats of their sums, at most
constexpr int64_t kWriteTokens = 16;        // tokens of one head that are written together

// Floats of one row of sums in memory.
constexpr int64_t row_width(int64_t head_dim) { return parts(head_dim, 16) * 16; }

// Sums over one split: highest score, weights, then at 16 the values.
constexpr int64_t partial_floats(int64_t head_dim) { return 16 + row_width(head_dim); }

struct Shares {
    int64_t heads;        // query heads of a key-value head that go together
    int64_t head_blocks;  // of these in the query heads of a key-value head
    int64_t tokens;       // of a tile
    int64_t tiles;        // some of them empty: sequence s starts at tile cu_seqlens[s] / tokens + s
    int64_t splits;       // of the longest context, 1 where units take contexts whole
};

inline Shares shares_of(const Attention& a) {
    const int64_t group = a.num_heads / a.cache->num_kv_heads;
    const int64_t rows = smaller(kQueryRows, kQueryValues / row_width(a.cache->head_dim));
    Shares s;
    s.heads = smaller(group, rows);
    s.head_blocks = parts(group, s.heads);
    s.tokens = rows / s.heads;
    s.tiles = a.batch->num_tokens ? a.batch->num_tokens / s.tokens + a.batch->num_sequences : 0;
    s.splits = 1;
    const int64_t whole = s.tiles * a.cache->num_kv_heads * s.head_blocks;
    if (a.batch->num_tokens <= kSplitTokens && whole < kEnoughUnits) {
        for (int64_t t = 0; t < a.batch->num_tokens; ++t) {
            const int64_t splits = a.batch->positions[t] / kSplit + 1;
            s.splits = splits > s.splits ? splits : s.splits;
        }
    }
    return s;
}

inline int64_t kv_write_units(const KvWrite& w) {
    return parts(w.batch->num_tokens, kWriteTokens) * w.cache->num_kv_heads;
}

inline int64_t attention_units(const Attention& a) {
    const Shares s = shares_of(a);
    return s.tiles * s.splits * a.cache->num_kv_heads * s.head_blocks;
}

// Bytes at Attention.scratch; where it is 0, nothing is to be combined.
inline int64_t attention_scratch_bytes(const Attention& a) {
    const Shares s = shares_of(a);
    if (s.splits == 1) return 0;
    return a.batch->num_tokens * a.num_heads * s.splits * partial_floats(a.cache->head_dim) *
           static_cast<int64_t>(sizeof(float));
}

// Units of attention_combine, which runs after every unit of attention is done.
inline int64_t attention_combine_units(const Attention& a) {
    return shares_of(a).splits == 1 ? 0 : a.batch->num_tokens * a.cache->num_kv_heads;
}

}  // namespace
}  // namespace halve
