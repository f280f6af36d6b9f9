// Attention over int8 in whole numbers. A query is rounded to 16 bits (scale absmax / 32767), as are the weights times
// the scales of the values, by the largest of these in a segment; products of pairs are added in 32 bits exactly, since
// kFastHeadDim * 32767 * 127 and kSegment * 32767 * 127 fit. That is twice the speed of floats, and the rounding is
// 2^-8 of what int8 has cost already.
//
// Error of a score, beside float rounding: at most absmax(q) / 65534 * sum |k|, or 2^-100 * sum |k| where a query has
// nothing above 2^-100. Of a segment's values, relative to its largest weight: at most kSegment / 65534 * max |v|, or
// kSegment * 127 * 2^-100 where that is below.
#pragma once

#include "attention_tile.h"

#if defined(HALVE_PAIR_PRODUCTS)

namespace halve {
namespace {

// sums[r][c] += pairs of a's row r times vectors c of b, over an even number of steps. Every second step fetches the
// next kFetched lines of `ahead`.
template <int R, int C, int kFetched, class Stored>
inline __attribute__((always_inline)) void add_tile(const int16_t* a, int64_t a_stride, const Stored* const (&b)[C],
                                                    int64_t step, int64_t steps, const char* const* ahead,
                                                    Ints (&sums)[R][C]) {
#pragma GCC unroll 1  // unrolled further, it would not fit the registers
    for (int64_t i = 0; i < steps; i += 2) {
#pragma GCC unroll 4
        for (int f = 0; f < kFetched; ++f) __builtin_prefetch(ahead[f] + i * (kAlign / 2), 0, 2);
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
        constexpr int kRounded = kWords > 16 ? 16 : kWords;
        for (int64_t i = 0; i < dim_; i += kRounded) {
            alignas(64) float lanes[kWords] = {};
            memcpy(lanes, query + i, kRounded * sizeof(float));
            int16_t words[kWords];
            store_words(words, to_words(load(lanes) * inverse, load(lanes + kLanes) * inverse));
            memcpy(queries_ + row * dim_ + i, words, kRounded * sizeof(int16_t));
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
        with_rows(n, [&]<int R>() { add_rows<R>(row, low, high, sums, values); });
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
        Lanes most = {};
        for (int64_t i = 0; i < kSegment; i += kLanes) {
            const Lanes size = load(value_scales_ + i);
            most = maximum_positive(most, kMasked ? select(within(i, low, high), size, Lanes{}) : size);
        }
        const float size = largest_positive(most);
        const Lanes inverse = broadcast(size < kTiny ? 0.0f : 32767.0f / size);
        alignas(64) float to_codes[kSegment];
        for (int64_t i = 0; i < kSegment; i += kLanes) store(to_codes + i, load(value_scales_ + i) * inverse);
        Four scales = {};
        for (int r = 0; r < R; ++r) scales[r] = scale_[row + r];
        const Four highest = largest(w.tops) * scales;
        for (int r = 0; r < R; ++r) {
            const Lanes scale = broadcast(scales[r]), top = broadcast(-highest[r]);
            Lanes added = {};
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kWords) {
                Lanes codes[2];
                for (int64_t half = 0; half < 2; ++half) {
                    const int64_t at = i + half * kLanes;
                    Lanes weight = exp2(fma(load(w.scores[r] + at), scale, top));
                    if (kMasked) weight = select(within(at, low, high), weight, Lanes{});
                    added += weight;
                    codes[half] = weight * load(to_codes + at);
                    if (kMasked) codes[half] = select(within(at, low, high), codes[half], Lanes{});
                }
                store_words(w.codes[r] + i, to_words(codes[0], codes[1]));
            }
            w.added[r] = added;
        }
        w.fade(sums, R, highest);
        for (int r = 0; r < R; ++r) w.theirs[r] *= size < kTiny ? 0.0f : size / 32767.0f;
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

}  // namespace
}  // namespace halve

#endif
