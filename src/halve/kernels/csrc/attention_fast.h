// Attention over whole vectors of tokens and dims, where the processor has the operations of simd.h: blocks of
// kFastBlock tokens, head sizes that 16 divides. A tile of rows and vectors stays in registers while it runs along the
// dims (scores) or the tokens (values), so that every number that was loaded serves all rows.
//
// int8 is taken as whole numbers: a query is rounded to 16 bits (scale absmax / 32767), as are the weights times the
// scales of the values, once for each row and segment; products of pairs are added in 32 bits exactly, since
// kFastHeadDim * 32767 * 127 and kSegment * 32767 * 127 fit. That is twice the speed of floats, and the rounding is
// 2^-8 of what int8 has cost already. fp32 and bf16 are multiplied as floats.
//
// Error of a score of int8, beside float rounding: at most absmax(q) / 65534 * sum |k|, or 2^-100 * sum |k| where a
// query has nothing above 2^-100. Of a segment's values: at most kSegment / 65534 * max(weight * |v|), or
// kSegment * 127 * 2^-100 where that is below.
#pragma once

#include "attention_sums.h"

#if defined(HALVE_PAIR_PRODUCTS)

namespace halve {
namespace {

constexpr int64_t kFastBlock = 16;
constexpr int64_t kFastHeadDim = 256;
constexpr int64_t kSegmentBlocks = kSegment / kFastBlock;
constexpr int64_t kSegmentVectors = kSegment / kLanes;
constexpr int64_t kBlockVectors = kFastBlock / kLanes;
constexpr int kFastRows = 4;
constexpr int kKeyVectors = kLanes == 16 ? 4 : 2;    // of a tile of scores
constexpr int kValueVectors = kLanes == 16 ? 4 : 2;  // of a tile of values
constexpr float kTiny = 0x1p-100f;                   // taken for zero where a scale is made from it

inline void prefetch(const char* begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kAlign) __builtin_prefetch(begin + i);
}

// Lanes [low, high) of the segment among those of vector i.
inline Bits within(int64_t i, int64_t low, int64_t high) {
    Ints lane;
    for (int j = 0; j < kLanes; ++j) lane[j] = j;
    lane += static_cast<int32_t>(i * kLanes);
    return (Bits)((lane >= static_cast<int32_t>(low)) & (lane < static_cast<int32_t>(high)));
}

inline Lanes select(Bits mask, Lanes a, Lanes b) { return (Lanes)((mask & (Bits)a) | (~mask & (Bits)b)); }

// The blocks of one segment, and of the next one to be fetched while this one is computed: hardware does not foresee
// a jump to the next block.
class Blocks {
   public:
    explicit Blocks(const Places& places) : places_(places) {}

    void open(int64_t at, int64_t begin, int64_t end, int64_t limit) {
        for (int64_t b = 0; b < kSegmentBlocks; ++b) {
            const int64_t first = at + b * kFastBlock, ahead = first + kSegment;
            const int64_t visible = first < end ? first + kFastBlock > begin ? first : begin : end - 1;
            now_[b] = places_.block(visible);
            next_[b] = ahead < limit ? places_.block(ahead) : nullptr;
        }
        fresh_ = true;
    }

    const char* at(int64_t block) const { return now_[block]; }

    void fetch_keys(int64_t block) const {
        if (!next_[block]) return;
        prefetch(next_[block], places_.layout.values);
        prefetch(next_[block] + places_.layout.scales, places_.layout.head - places_.layout.scales);
    }

    void fetch_values(int64_t block) const {
        if (next_[block]) prefetch(next_[block] + places_.layout.values, places_.layout.scales - places_.layout.values);
    }

    // Once for each segment true: the first rows fetch what comes next.
    bool fetching() {
        const bool fresh = fresh_;
        fresh_ = false;
        return fresh;
    }

   private:
    const Places places_;
    const char* now_[kSegmentBlocks];
    const char* next_[kSegmentBlocks];
    bool fresh_ = false;
};

// sums[r][c] += pairs of a's row r times vectors c of b, over `steps` pairs.
template <int R, int C, class Stored>
inline __attribute__((always_inline)) void add_tile(const int16_t* a, int64_t a_stride, const Stored* const (&b)[C],
                                                    int64_t step, int64_t steps, Ints (&sums)[R][C]) {
    for (int64_t i = 0; i < steps; ++i) {
        Words columns[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c] = load_words(b[c] + i * step);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Words row = broadcast_pair(a + r * a_stride + 2 * i);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = add_products(sums[r][c], row, columns[c]);
        }
    }
}

class IntKernel {
   public:
    static constexpr int64_t kRowsTogether = kFastRows;

    IntKernel(const Places& places, int64_t rows)
        : blocks_(places), layout_(places.layout), dim_(places.a.cache->head_dim), widened_(rows >= kWorthWidening) {}

    void ask(int64_t row, const float* query) {
        const float most = absmax(query, dim_);
        const bool tiny = most < kTiny;
        scale_[row] = tiny ? 0.0f : most / 32767.0f;
        const Lanes inverse = broadcast(tiny ? 0.0f : 32767.0f / most);
        for (int64_t i = 0; i < dim_; i += kWords > 16 ? 16 : kWords) {
            alignas(64) float lanes[kWords] = {};
            memcpy(lanes, query + i, 16 * sizeof(float));
            int16_t words[kWords];
            store_words(words, to_words(load(lanes) * inverse, load(lanes + kLanes) * inverse));
            memcpy(queries_ + row * dim_ + i, words, 16 * sizeof(int16_t));
        }
    }

    void open(int64_t at, int64_t begin, int64_t end, int64_t limit) {
        blocks_.open(at, begin, end, limit);
        for (int64_t b = 0; b < kSegmentBlocks; ++b) {
            uint16_t scales[2 * kFastBlock];
            memcpy(scales, blocks_.at(b) + layout_.scales, sizeof scales);
            for (int64_t t = 0; t < kFastBlock; ++t) key_scales_[b * kFastBlock + t] = from_bf16(scales[t]);
            for (int64_t t = 0; t < kFastBlock; ++t) {
                value_scales_[b * kFastBlock + t] = from_bf16(scales[kFastBlock + t]);
            }
            if (widened_) widen(b);
        }
    }

    // Add positions [low, high) of the open segment to n rows.
    void add(int64_t row, int64_t n, int64_t low, int64_t high, Sums* sums, float* values) {
        switch (n) {
            case 1:
                return add_rows<1>(row, low, high, sums, values);
            case 2:
                return add_rows<2>(row, low, high, sums, values);
            case 3:
                return add_rows<3>(row, low, high, sums, values);
            default:
                return add_rows<4>(row, low, high, sums, values);
        }
    }

   private:
    static constexpr int64_t kWorthWidening = 12;  // rows; fewer widen keys and values on the way
    static constexpr int64_t kBlockElements = kFastBlock * kFastHeadDim;

    template <int R>
    struct Tile {
        alignas(64) int32_t scores[R][kSegment];
        alignas(64) int16_t codes[R][kSegment];  // weights * scales of the values, rounded
        float mine[R], theirs[R];                // what sums so far and those of codes are multiplied by
    };

    void widen(int64_t block) {
        const int8_t* from = reinterpret_cast<const int8_t*>(blocks_.at(block));
        int16_t* keys = keys_ + block * kBlockElements;
        int16_t* values = values_ + block * kBlockElements;
        const int64_t n = kFastBlock * dim_;
        for (int64_t i = 0; i < n; i += kWords) store_words(keys + i, load_words(from + i));
        for (int64_t i = 0; i < n; i += kWords) store_words(values + i, load_words(from + n + i));
    }

    template <int R>
    void add_rows(int64_t row, int64_t low, int64_t high, Sums* sums, float* values) {
        Tile<R> tile;
        const bool fetching = blocks_.fetching();
        if (widened_) {
            score<R, int16_t>(row, low, high, fetching, tile);
        } else {
            score<R, int8_t>(row, low, high, fetching, tile);
        }
        for (int r = 0; r < R; ++r) {
            if (high - low == kSegment) {
                weigh<false, R>(r, scale_[row + r], low, high, sums[r], tile);
            } else {
                weigh<true, R>(r, scale_[row + r], low, high, sums[r], tile);
            }
        }
        if (widened_) {
            gather<R, int16_t>(low, high, fetching, tile, values);
        } else {
            gather<R, int8_t>(low, high, fetching, tile, values);
        }
    }

    template <class Stored>
    const Stored* keys(int64_t block) const;
    template <class Stored>
    const Stored* values(int64_t block) const;

    template <int R, class Stored>
    void score(int64_t row, int64_t low, int64_t high, bool fetching, Tile<R>& tile) const {
        const int16_t* asked = queries_ + row * dim_;
        for (int64_t v = low / kLanes / kKeyVectors * kKeyVectors; v * kLanes < high; v += kKeyVectors) {
            const Stored* from[kKeyVectors];
            for (int c = 0; c < kKeyVectors; ++c) {
                from[c] = keys<Stored>((v + c) / kBlockVectors) + (v + c) % kBlockVectors * kWords;
                if (fetching && (v + c) % kBlockVectors == 0) blocks_.fetch_keys((v + c) / kBlockVectors);
            }
            Ints found[R][kKeyVectors] = {};
            add_tile(asked, dim_, from, 2 * kFastBlock, dim_ / 2, found);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) memcpy(tile.scores[r] + v * kLanes, found[r], sizeof found[r]);
        }
    }

    template <bool kMasked, int R>
    void weigh(int r, float scale, int64_t low, int64_t high, Sums& mine, Tile<R>& tile) const {
        Lanes scores[kSegmentVectors], top = broadcast(kLowest);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kSegmentVectors; ++i) {
            Ints found;
            memcpy(&found, tile.scores[r] + i * kLanes, sizeof found);
            scores[i] = to_floats(found) * load(key_scales_ + i * kLanes);
            if (kMasked) scores[i] = select(within(i, low, high), scores[i], broadcast(kLowest));
            top = maximum(top, scores[i]);
        }
        const float highest = largest(top) * scale;
        Lanes added = {}, most = {};
#pragma GCC unroll 8
        for (int64_t i = 0; i < kSegmentVectors; ++i) {
            Lanes weights = exp2(fma(scores[i], broadcast(scale), broadcast(-highest)));
            if (kMasked) weights = select(within(i, low, high), weights, Lanes{});
            added += weights;
            scores[i] = weights * load(value_scales_ + i * kLanes);
            if (kMasked) scores[i] = select(within(i, low, high), scores[i], Lanes{});
            most = maximum_positive(most, scores[i]);
        }
        const float size = largest_positive(most);
        const bool tiny = size < kTiny;
        const Lanes inverse = broadcast(tiny ? 0.0f : 32767.0f / size);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kSegmentVectors; i += 2) {
            store_words(tile.codes[r] + i * kLanes, to_words(scores[i] * inverse, scores[i + 1] * inverse));
        }
        const Fades f = fade(mine, highest, sum(added));
        tile.mine[r] = f.mine;
        tile.theirs[r] = tiny ? 0.0f : size / 32767.0f * f.theirs;
    }

    template <int R, class Stored>
    void gather(int64_t low, int64_t high, bool fetching, const Tile<R>& tile, float* out) const {
        const int64_t vectors = dim_ / kLanes;
        int64_t v = 0, fetched = 0;
        for (; v + kValueVectors <= vectors; v += kValueVectors) {
            for (; fetching && fetched < (v + kValueVectors) * kSegmentBlocks / vectors; ++fetched) {
                blocks_.fetch_values(fetched);
            }
            gather_vectors<R, kValueVectors, Stored>(v, low, high, tile, out);
        }
        for (; fetching && fetched < kSegmentBlocks; ++fetched) blocks_.fetch_values(fetched);
        for (; v < vectors; ++v) gather_vectors<R, 1, Stored>(v, low, high, tile, out);
    }

    template <int R, int C, class Stored>
    void gather_vectors(int64_t v, int64_t low, int64_t high, const Tile<R>& tile, float* out) const {
        Ints found[R][C] = {};
        for (int64_t b = low / kFastBlock; b * kFastBlock < high; ++b) {
            const Stored* from[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) from[c] = values<Stored>(b) + (v + c) * kWords;
            add_tile(tile.codes[0] + b * kFastBlock, kSegment, from, 2 * dim_, kFastBlock / 2, found);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                float* at = out + r * dim_ + (v + c) * kLanes;
                const Lanes theirs = to_floats(found[r][c]) * tile.theirs[r];
                store(at, fma(load(at), broadcast(tile.mine[r]), theirs));
            }
        }
    }

    Blocks blocks_;
    KvLayout layout_;
    int64_t dim_;
    bool widened_;
    float scale_[kQueryRows];
    alignas(64) float key_scales_[kSegment];
    alignas(64) float value_scales_[kSegment];
    alignas(64) int16_t queries_[kQueryValues];
    alignas(64) int16_t keys_[kSegmentBlocks * kBlockElements];
    alignas(64) int16_t values_[kSegmentBlocks * kBlockElements];
};

template <>
inline const int8_t* IntKernel::keys<int8_t>(int64_t block) const {
    return reinterpret_cast<const int8_t*>(blocks_.at(block));
}
template <>
inline const int16_t* IntKernel::keys<int16_t>(int64_t block) const {
    return keys_ + block * kBlockElements;
}
template <>
inline const int8_t* IntKernel::values<int8_t>(int64_t block) const {
    return reinterpret_cast<const int8_t*>(blocks_.at(block) + layout_.values);
}
template <>
inline const int16_t* IntKernel::values<int16_t>(int64_t block) const {
    return values_ + block * kBlockElements;
}

// Two numbers that a vector's lanes take one after the other: side by side in 16 bits, `apart` in 32.
inline void load_both(const uint16_t* p, int64_t, Lanes* first, Lanes* second) { load_pairs(p, first, second); }
inline void load_both(const float* p, int64_t apart, Lanes* first, Lanes* second) {
    *first = load(p);
    *second = load(p + apart);
}

template <class Stored>
class FloatKernel {
   public:
    static constexpr int64_t kRowsTogether = kFastRows;

    FloatKernel(const Places& places, int64_t)
        : blocks_(places), layout_(places.layout), dim_(places.a.cache->head_dim) {}

    void ask(int64_t row, const float* query) {
        memcpy(queries_ + row * dim_, query, static_cast<size_t>(dim_) * sizeof(float));
    }

    void open(int64_t at, int64_t begin, int64_t end, int64_t limit) { blocks_.open(at, begin, end, limit); }

    // Add positions [low, high) of the open segment to n rows.
    void add(int64_t row, int64_t n, int64_t low, int64_t high, Sums* sums, float* values) {
        switch (n) {
            case 1:
                return add_rows<1>(row, low, high, sums, values);
            case 2:
                return add_rows<2>(row, low, high, sums, values);
            case 3:
                return add_rows<3>(row, low, high, sums, values);
            default:
                return add_rows<4>(row, low, high, sums, values);
        }
    }

   private:
    static constexpr int64_t kPair = sizeof(Stored) == 2 ? 2 : 1;

    template <int R>
    struct Tile {
        alignas(64) float scores[R][kSegment];  // then weights
        float mine[R];
    };

    template <int R>
    void add_rows(int64_t row, int64_t low, int64_t high, Sums* sums, float* values) {
        Tile<R> tile;
        const bool fetching = blocks_.fetching();
        score(row, low, high, fetching, tile);
        for (int r = 0; r < R; ++r) {
            if (high - low == kSegment) {
                weigh<false, R>(r, low, high, sums[r], tile);
            } else {
                weigh<true, R>(r, low, high, sums[r], tile);
            }
        }
        const int64_t vectors = dim_ / kLanes;
        int64_t v = 0, fetched = 0;
        for (; v + kValueVectors <= vectors; v += kValueVectors) {
            for (; fetching && fetched < (v + kValueVectors) * kSegmentBlocks / vectors; ++fetched) {
                blocks_.fetch_values(fetched);
            }
            gather<R, kValueVectors>(v, low, high, tile, values);
        }
        for (; fetching && fetched < kSegmentBlocks; ++fetched) blocks_.fetch_values(fetched);
        for (; v < vectors; ++v) gather<R, 1>(v, low, high, tile, values);
    }

    template <int R>
    void score(int64_t row, int64_t low, int64_t high, bool fetching, Tile<R>& tile) const {
        const float* asked = queries_ + row * dim_;
        for (int64_t v = low / kLanes / kKeyVectors * kKeyVectors; v * kLanes < high; v += kKeyVectors) {
            const Stored* from[kKeyVectors];
            for (int c = 0; c < kKeyVectors; ++c) {
                from[c] = reinterpret_cast<const Stored*>(blocks_.at((v + c) / kBlockVectors)) +
                          (v + c) % kBlockVectors * kLanes * kPair;
                if (fetching && (v + c) % kBlockVectors == 0) blocks_.fetch_keys((v + c) / kBlockVectors);
            }
            Lanes found[R][kKeyVectors] = {};
            for (int64_t i = 0; i < dim_ / 2; ++i) {
                Lanes first[kKeyVectors], second[kKeyVectors];
#pragma GCC unroll 4
                for (int c = 0; c < kKeyVectors; ++c) {
                    load_both(from[c] + i * 2 * kFastBlock, kFastBlock, &first[c], &second[c]);
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Lanes a = broadcast(asked[r * dim_ + 2 * i]), b = broadcast(asked[r * dim_ + 2 * i + 1]);
#pragma GCC unroll 4
                    for (int c = 0; c < kKeyVectors; ++c) {
                        found[r][c] = fma(b, second[c], fma(a, first[c], found[r][c]));
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) memcpy(tile.scores[r] + v * kLanes, found[r], sizeof found[r]);
        }
    }

    template <bool kMasked, int R>
    void weigh(int r, int64_t low, int64_t high, Sums& mine, Tile<R>& tile) const {
        Lanes scores[kSegmentVectors], top = broadcast(kLowest);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kSegmentVectors; ++i) {
            scores[i] = load(tile.scores[r] + i * kLanes);
            if (kMasked) scores[i] = select(within(i, low, high), scores[i], broadcast(kLowest));
            top = maximum(top, scores[i]);
        }
        const float highest = largest(top);
        Lanes added = {};
#pragma GCC unroll 8
        for (int64_t i = 0; i < kSegmentVectors; ++i) {
            scores[i] = exp2(scores[i] - highest);
            if (kMasked) scores[i] = select(within(i, low, high), scores[i], Lanes{});
            added += scores[i];
        }
        const Fades f = fade(mine, highest, sum(added));
        tile.mine[r] = f.mine;
#pragma GCC unroll 8
        for (int64_t i = 0; i < kSegmentVectors; ++i) store(tile.scores[r] + i * kLanes, scores[i] * f.theirs);
    }

    // Positions outside [low, high) are not touched: what lies there may be no number.
    template <int R, int C>
    void gather(int64_t v, int64_t low, int64_t high, const Tile<R>& tile, float* out) const {
        Lanes found[R][C];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                found[r][c] = load(out + r * dim_ + (v + c) * kLanes) * tile.mine[r];
            }
        }
        for (int64_t j = low / 2 * 2; j < high; j += 2) {
            const char* block = blocks_.at(j / kFastBlock) + layout_.values;
            const Stored* from = reinterpret_cast<const Stored*>(block) + j % kFastBlock * dim_ + v * kLanes * kPair;
            Lanes first[C], second[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) load_both(from + c * kLanes * kPair, dim_, &first[c], &second[c]);
            if (j >= low) add_products<R, C>(tile, j, first, found);
            if (j + 1 < high) add_products<R, C>(tile, j + 1, second, found);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) store(out + r * dim_ + (v + c) * kLanes, found[r][c]);
        }
    }

    template <int R, int C>
    static void add_products(const Tile<R>& tile, int64_t j, const Lanes (&values)[C], Lanes (&found)[R][C]) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Lanes weight = broadcast(tile.scores[r][j]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) found[r][c] = fma(weight, values[c], found[r][c]);
        }
    }

    Blocks blocks_;
    KvLayout layout_;
    int64_t dim_;
    alignas(64) float queries_[kQueryValues];
};

}  // namespace
}  // namespace halve

#endif
