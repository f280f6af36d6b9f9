// Attention over fp32 and bf16 in whole vectors of floats. Each score is a sum along the dims in one lane, each value a
// sum along the tokens: D and n roundings.
#pragma once

#include "attention_tile.h"

#if defined(HALVE_PAIR_PRODUCTS)

namespace halve {
namespace {

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
        with_rows(n, [&]<int R>() { add_rows<R>(row, low, high, sums, values); });
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
            __builtin_prefetch(ahead[f] + at, 0, 2);
            if (kPair == 1) __builtin_prefetch(ahead[f] + at + kFastBlock, 0, 2);
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
