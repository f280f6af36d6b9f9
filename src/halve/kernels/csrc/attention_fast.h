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

// Positions [low, high) among those from `first` on.
inline Bits within(int64_t first, int64_t low, int64_t high) {
    Ints lane;
    for (int j = 0; j < kLanes; ++j) lane[j] = j;
    lane += static_cast<int32_t>(first);
    return (Bits)((lane >= static_cast<int32_t>(low)) & (lane < static_cast<int32_t>(high)));
}

inline Lanes select(Bits mask, Lanes a, Lanes b) { return (Lanes)((mask & (Bits)a) | (~mask & (Bits)b)); }

inline Four maximum(Four a, Four b) { return a > b ? a : b; }

// The largest lane of four vectors each.
inline Four largest(const Lanes* v) {
    Four four[4];
    for (int i = 0; i < 4; ++i) {
        Four quarters[kLanes / 4];
        memcpy(quarters, v + i, sizeof quarters);
        four[i] = quarters[0];
        for (int j = 1; j < kLanes / 4; ++j) four[i] = maximum(four[i], quarters[j]);
    }
    const Four ab = maximum(HALVE_SHUFFLE(four[0], four[1], 0, 4, 1, 5), HALVE_SHUFFLE(four[0], four[1], 2, 6, 3, 7));
    const Four cd = maximum(HALVE_SHUFFLE(four[2], four[3], 0, 4, 1, 5), HALVE_SHUFFLE(four[2], four[3], 2, 6, 3, 7));
    return maximum(HALVE_SHUFFLE(ab, cd, 0, 1, 4, 5), HALVE_SHUFFLE(ab, cd, 2, 3, 6, 7));
}

// A few rows over one segment, between scores and values. There is room for kFastRows even where fewer are in use.
struct Weighing {
    alignas(64) float scores[kFastRows][kSegment];   // whole numbers first; then weights
    alignas(64) int16_t codes[kFastRows][kSegment];  // weights * scales of the values, rounded
    Lanes tops[kFastRows];                           // highest scores, lane by lane
    Lanes added[kFastRows];                          // weights
    Four mine, theirs;                               // what sums so far and those of the segment are multiplied by

    // Add the segment's highest scores and weights to the rows' own.
    void fade(Sums* rows, int64_t n, Four highest) {
        const Four weights = sums(added);
        Four before = {}, weighed = {};
        for (int64_t r = 0; r < n; ++r) before[r] = rows[r].highest;
        for (int64_t r = 0; r < n; ++r) weighed[r] = rows[r].weights;
        const Four top = maximum(highest, before);
        Lanes apart = {}, of_rows = {}, of_segment = {};
        const Four from_top[2] = {before - top, highest - top};
        memcpy(&apart, from_top, sizeof from_top);
        const Lanes faded = exp2(apart);
        memcpy(&mine, &faded, sizeof mine);
        memcpy(&theirs, reinterpret_cast<const char*>(&faded) + sizeof mine, sizeof theirs);
        memcpy(&of_rows, &weighed, sizeof weighed);
        const Four added_weights = weights * theirs;
        memcpy(&of_segment, &added_weights, sizeof added_weights);
        const Lanes total = fma(of_rows, faded, of_segment);
        for (int64_t r = 0; r < n; ++r) rows[r] = {top[r], total[r]};
    }
};

// The blocks of one segment, and of the next one to be fetched while this one is computed: hardware does not foresee
// a jump to the next block. What is fetched lies `kAhead` beside what is computed, a line for every two steps.
class Blocks {
   public:
    explicit Blocks(const Places& places)
        : layout_(places.layout),
          data_(head_at(*places.a.cache, places.layout, 0, places.kv_head)),
          bytes_(places.layout.head * places.a.cache->num_kv_heads),
          blocks_(places.blocks) {}

    void open(int64_t at, int64_t begin, int64_t end, int64_t limit) {
        for (int64_t b = 0; b < kSegmentBlocks; ++b) {
            const int64_t first = at + b * kFastBlock, ahead = first + kSegment;
            now_[b] = block(first >= end ? end - 1 : first + kFastBlock <= begin ? begin : first);
            if (!opened_) fetch(now_[b], layout_.head);
            next_[b] = ahead < limit ? block(ahead) : now_[b];
            if (layout_.head > layout_.scales) fetch(next_[b] + layout_.scales, layout_.head - layout_.scales);
        }
        opened_ = true;
    }

    const char* now(int64_t b) const { return now_[b]; }
    const char* next(int64_t b) const { return next_[b]; }
    void fetch_next(int64_t b) const { fetch(next_[b], layout_.scales); }

   private:
    const char* block(int64_t position) const { return data_ + blocks_[position / kFastBlock] * bytes_; }

    static void fetch(const char* begin, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += kAlign) __builtin_prefetch(begin + i);
    }

    const KvLayout layout_;
    const char* data_;
    int64_t bytes_;
    const int32_t* blocks_;
    const char* now_[kSegmentBlocks];
    const char* next_[kSegmentBlocks];
    bool opened_ = false;
};

// Loops that need all registers are functions of their own, or gcc keeps what surrounds them in some.
#define HALVE_OWN_REGISTERS __attribute__((noinline))

// sums[r][c] += pairs of a's row r times vectors c of b, over an even number of steps. Every second step fetches the
// next kFetched lines of `ahead`.
template <int R, int C, int kFetched, class Stored>
inline __attribute__((always_inline)) void add_tile(const int16_t* a, int64_t a_stride, const Stored* const (&b)[C],
                                                    int64_t step, int64_t steps, const char* const* ahead,
                                                    Ints (&sums)[R][C]) {
#pragma GCC unroll 1  // unrolled further, it would not fit the registers
    for (int64_t i = 0; i < steps; i += 2) {
#pragma GCC unroll 4
        for (int f = 0; f < kFetched; ++f) __builtin_prefetch(ahead[f] + i * (kAlign / 2));
#pragma GCC unroll 2
        for (int64_t j = i; j < i + 2; ++j) {
            Words columns[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) columns[c] = load_words(b[c] + j * step);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Words row = broadcast_pair(a + r * a_stride + 2 * j);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) sums[r][c] = add_products(sums[r][c], row, columns[c]);
            }
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
            memcpy(scales, blocks_.now(b) + layout_.scales, sizeof scales);
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

    void widen(int64_t block) {
        const int8_t* from = reinterpret_cast<const int8_t*>(blocks_.now(block));
        const int64_t n = kFastBlock * dim_;
        blocks_.fetch_next(block);
        for (int64_t i = 0; i < n; i += kWords) store_words(keys_ + block * n + i, load_words(from + i));
        for (int64_t i = 0; i < n; i += kWords) store_words(values_ + block * n + i, load_words(from + n + i));
    }

    template <int R>
    void add_rows(int64_t row, int64_t low, int64_t high, Sums* sums, float* values) {
        Weighing w;
        widened_ ? score_widened<R>(row, low, high, w) : score<R>(row, low, high, w);
        high - low == kSegment ? weigh<false, R>(row, low, high, sums, w) : weigh<true, R>(row, low, high, sums, w);
        const int64_t vectors = dim_ / kLanes;
        int64_t v = 0;
        for (; v + kValueVectors <= vectors; v += kValueVectors) gather<R, kValueVectors>(v, low, high, w, values);
        for (; v < vectors; ++v) gather<R, 1>(v, low, high, w, values);
    }

    template <int R>
    HALVE_OWN_REGISTERS void score(int64_t row, int64_t low, int64_t high, Weighing& w) const {
        for (int64_t v = low / kLanes / kKeyVectors * kKeyVectors; v * kLanes < high; v += kKeyVectors) {
            const int8_t* from[kKeyVectors];
            const char* ahead[kKeyVectors / kBlockVectors];
            for (int c = 0; c < kKeyVectors; ++c) {
                const int64_t block = (v + c) / kBlockVectors;
                from[c] = reinterpret_cast<const int8_t*>(blocks_.now(block)) + (v + c) % kBlockVectors * kWords;
                ahead[c / kBlockVectors] = blocks_.next(block);
            }
            Ints found[R][kKeyVectors] = {};
            add_tile<R, kKeyVectors, kKeyVectors / kBlockVectors>(queries_ + row * dim_, dim_, from, 2 * kFastBlock,
                                                                  dim_ / 2, ahead, found);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) memcpy(w.scores[r] + v * kLanes, found[r], sizeof found[r]);
        }
    }

    template <int R>
    HALVE_OWN_REGISTERS void score_widened(int64_t row, int64_t low, int64_t high, Weighing& w) const {
        for (int64_t v = low / kLanes / kKeyVectors * kKeyVectors; v * kLanes < high; v += kKeyVectors) {
            const int16_t* from[kKeyVectors];
            for (int c = 0; c < kKeyVectors; ++c) {
                const int64_t block = (v + c) / kBlockVectors;
                from[c] = keys_ + block * kFastBlock * dim_ + (v + c) % kBlockVectors * kWords;
            }
            Ints found[R][kKeyVectors] = {};
            add_tile<R, kKeyVectors, 0>(queries_ + row * dim_, dim_, from, 2 * kFastBlock, dim_ / 2, nullptr, found);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) memcpy(w.scores[r] + v * kLanes, found[r], sizeof found[r]);
        }
    }

    // Row after row through each part, so that the sums over lanes are taken for all of them at once.
    template <bool kMasked, int R>
    HALVE_OWN_REGISTERS void weigh(int64_t row, int64_t low, int64_t high, Sums* sums, Weighing& w) const {
        for (int r = 0; r < kFastRows; ++r) w.tops[r] = w.added[r] = Lanes{};
        for (int r = 0; r < R; ++r) {
            Lanes top = broadcast(kLowest);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                Ints found;
                memcpy(&found, w.scores[r] + i, sizeof found);
                Lanes score = to_floats(found) * load(key_scales_ + i);
                if (kMasked) score = select(within(i, low, high), score, broadcast(kLowest));
                store(w.scores[r] + i, score);
                top = maximum(top, score);
            }
            w.tops[r] = top;
        }
        Four scales = {};
        for (int r = 0; r < R; ++r) scales[r] = scale_[row + r];
        const Four highest = largest(w.tops) * scales;
        for (int r = 0; r < R; ++r) {
            const Lanes scale = broadcast(scales[r]), top = broadcast(-highest[r]);
            Lanes added = {}, most = {};
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                Lanes weight = exp2(fma(load(w.scores[r] + i), scale, top));
                if (kMasked) weight = select(within(i, low, high), weight, Lanes{});
                added += weight;
                Lanes scaled = weight * load(value_scales_ + i);
                if (kMasked) scaled = select(within(i, low, high), scaled, Lanes{});
                most = maximum_positive(most, scaled);
                store(w.scores[r] + i, scaled);
            }
            w.added[r] = added;
            w.tops[r] = most;
        }
        w.fade(sums, R, highest);
        for (int r = 0; r < R; ++r) {
            const float size = largest_positive(w.tops[r]);
            const Lanes inverse = broadcast(size < kTiny ? 0.0f : 32767.0f / size);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kWords) {
                const Lanes first = load(w.scores[r] + i), second = load(w.scores[r] + i + kLanes);
                store_words(w.codes[r] + i, to_words(first * inverse, second * inverse));
            }
            w.theirs[r] *= size < kTiny ? 0.0f : size / 32767.0f;
        }
    }

    template <int R, int C>
    HALVE_OWN_REGISTERS void gather(int64_t v, int64_t low, int64_t high, const Weighing& w, float* out) const {
        Ints found[R][C] = {};
        const int64_t first = low / kFastBlock, end = parts(high, kFastBlock);
        if (widened_) {
            const int16_t* from[C];
            for (int c = 0; c < C; ++c) from[c] = values_ + first * kFastBlock * dim_ + (v + c) * kWords;
            add_tile<R, C, 0>(w.codes[0] + first * kFastBlock, kSegment, from, 2 * dim_,
                              (end - first) * (kFastBlock / 2), nullptr, found);
        } else {
            for (int64_t b = first; b < end; ++b) {
                constexpr int kLines = parts(C, kBlockVectors);
                const int8_t* values = reinterpret_cast<const int8_t*>(blocks_.now(b) + layout_.values);
                const int8_t* from[C];
                const char* ahead[kLines];
                for (int c = 0; c < C; ++c) from[c] = values + (v + c) * kWords;
                for (int l = 0; l < kLines; ++l) {
                    ahead[l] = blocks_.next(b) + layout_.values + (v / kBlockVectors + l) * kFastBlock * kFastBlock;
                }
                add_tile<R, C, kLines>(w.codes[0] + b * kFastBlock, kSegment, from, 2 * dim_, kFastBlock / 2, ahead,
                                       found);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                float* at = out + r * dim_ + (v + c) * kLanes;
                store(at, fma(load(at), broadcast(w.mine[r]), to_floats(found[r][c]) * w.theirs[r]));
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
    alignas(64) int16_t keys_[kSegment * kFastHeadDim];
    alignas(64) int16_t values_[kSegment * kFastHeadDim];
};

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
    void add_rows(int64_t row, int64_t low, int64_t high, Sums* sums, float* values) {
        Weighing w;
        score<R>(row, low, high, w);
        high - low == kSegment ? weigh<false, R>(low, high, sums, w) : weigh<true, R>(low, high, sums, w);
        const int64_t vectors = dim_ / kLanes;
        int64_t v = 0;
        for (; v + kValueVectors <= vectors; v += kValueVectors) gather<R, kValueVectors>(v, low, high, w, values);
        for (; v < vectors; ++v) gather<R, 1>(v, low, high, w, values);
    }

    template <int R>
    HALVE_OWN_REGISTERS void score(int64_t row, int64_t low, int64_t high, Weighing& w) const {
        const float* asked = queries_ + row * dim_;
        for (int64_t v = low / kLanes / kKeyVectors * kKeyVectors; v * kLanes < high; v += kKeyVectors) {
            const Stored* from[kKeyVectors];
            const Stored* ahead[kKeyVectors / kBlockVectors];
            for (int c = 0; c < kKeyVectors; ++c) {
                const int64_t block = (v + c) / kBlockVectors;
                from[c] =
                    reinterpret_cast<const Stored*>(blocks_.now(block)) + (v + c) % kBlockVectors * kLanes * kPair;
                ahead[c / kBlockVectors] = reinterpret_cast<const Stored*>(blocks_.next(block));
            }
            Lanes found[R][kKeyVectors] = {};
#pragma GCC unroll 1
            for (int64_t i = 0; i < dim_ / 2; ++i) {
                Lanes first[kKeyVectors], second[kKeyVectors];
#pragma GCC unroll 4
                for (int c = 0; c < kKeyVectors; ++c) {
                    load_both(from[c] + i * 2 * kFastBlock, kFastBlock, &first[c], &second[c]);
                }
                fetch<kKeyVectors / kBlockVectors>(ahead, i * 2 * kFastBlock);
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
            for (int r = 0; r < R; ++r) memcpy(w.scores[r] + v * kLanes, found[r], sizeof found[r]);
        }
    }

    // The lines of 2 * kFastBlock elements at each of `ahead`.
    template <int kFetched>
    static void fetch(const Stored* const* ahead, int64_t at) {
#pragma GCC unroll 4
        for (int f = 0; f < kFetched; ++f) {
            __builtin_prefetch(ahead[f] + at);
            if (kPair == 1) __builtin_prefetch(ahead[f] + at + kFastBlock);
        }
    }

    template <bool kMasked, int R>
    HALVE_OWN_REGISTERS void weigh(int64_t low, int64_t high, Sums* sums, Weighing& w) const {
        for (int r = 0; r < kFastRows; ++r) w.tops[r] = w.added[r] = Lanes{};
        for (int r = 0; r < R; ++r) {
            w.tops[r] = broadcast(kLowest);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                Lanes score = load(w.scores[r] + i);
                if (kMasked) score = select(within(i, low, high), score, broadcast(kLowest));
                w.tops[r] = maximum(w.tops[r], score);
            }
        }
        const Four highest = largest(w.tops);
        for (int r = 0; r < R; ++r) {
            const Lanes top = broadcast(highest[r]);
            Lanes added = {};
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                Lanes weight = exp2(load(w.scores[r] + i) - top);
                if (kMasked) weight = select(within(i, low, high), weight, Lanes{});
                added += weight;
                store(w.scores[r] + i, weight);
            }
            w.added[r] = added;
        }
        w.fade(sums, R, highest);
    }

    // Positions outside [low, high) are not touched: what lies there may be no number.
    template <int R, int C>
    HALVE_OWN_REGISTERS void gather(int64_t v, int64_t low, int64_t high, const Weighing& w, float* out) const {
        Lanes found[R][C] = {};
        for (int64_t b = low / kFastBlock; b * kFastBlock < high; ++b) {
            constexpr int kLines = parts(C, kBlockVectors);
            const int64_t at = v * kLanes * kPair;
            const Stored* from = reinterpret_cast<const Stored*>(blocks_.now(b) + layout_.values) + at;
            const Stored* ahead[kLines];
            for (int l = 0; l < kLines; ++l) {
                ahead[l] = reinterpret_cast<const Stored*>(blocks_.next(b) + layout_.values) +
                           (v / kBlockVectors + l) * kFastBlock * kFastBlock;
            }
            const int64_t first = low - b * kFastBlock, end = high - b * kFastBlock;
            if (first <= 0 && end >= kFastBlock) {
                add_block<true>(from, ahead, w, b, 0, kFastBlock, found);
            } else {
                add_block<false>(from, ahead, w, b, first, end, found);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                float* at = out + r * dim_ + (v + c) * kLanes;
                store(at, fma(load(at), broadcast(w.mine[r]), found[r][c] * w.theirs[r]));
            }
        }
    }

    template <bool kWhole, int R, int C>
    inline __attribute__((always_inline)) void add_block(const Stored* from, const Stored* const* ahead,
                                                         const Weighing& w, int64_t block, int64_t low, int64_t high,
                                                         Lanes (&found)[R][C]) const {
#pragma GCC unroll 1
        for (int64_t j = 0; j < kFastBlock; j += 2) {
            if (!kWhole && (j + 2 <= low || j >= high)) continue;
            Lanes first[C], second[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) load_both(from + j * dim_ + c * kLanes * kPair, dim_, &first[c], &second[c]);
            fetch<parts(C, kBlockVectors)>(ahead, j * kFastBlock);
            const int64_t at = block * kFastBlock + j;
            if (kWhole || j >= low) add_products<R, C>(w, at, first, found);
            if (kWhole || j + 1 < high) add_products<R, C>(w, at + 1, second, found);
        }
    }

    template <int R, int C>
    inline __attribute__((always_inline)) static void add_products(const Weighing& w, int64_t j,
                                                                   const Lanes (&values)[C], Lanes (&found)[R][C]) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Lanes weight = broadcast(w.scores[r][j]);
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
