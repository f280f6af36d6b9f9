// Attention over int4 in whole numbers. Scores: a query, rotated as the keys are, is rounded to 8 bits (scale absmax /
// 127) and meets the codes in dot products of bytes, exactly, group by group. That is twice as many products an
// instruction as of 16 bits, and the rounding is 2^-4 of what int4 has cost already. Values: the weights times the
// scales of a group of dims are rounded to 16 bits by the largest of these in a segment, as with int8, and meet the
// codes in products of pairs, since 8 bits would lose the many small weights beside a large one.
//
// Codes lie from 0 to 15; sums begin at -8 times the sum of what they are multiplied with.
//
// Error of a score, beside float rounding: at most absmax(q) / 254 * sum |k|, both rotated, or 2^-100 * sum |k| where a
// query has nothing above 2^-100. Of a segment's values, relative to its largest weight: at most kSegment / 65534 *
// max |v|, or kSegment * 8 * 2^-100 where that is below.
#pragma once

#include "attention_tile.h"
#include "integer_vectors.h"

#if defined(HALVE_PAIR_PRODUCTS)

namespace halve {
namespace {

class Int4Kernel {
   public:
    static constexpr int64_t kRowsTogether = kFastRows;

    Int4Kernel(const Places& places, int64_t rows)
        : blocks_(places),
          layout_(places.layout),
          dim_(places.a.cache->head_dim),
          groups_(places.layout.groups),
          widened_(rows >= kWorthWidening) {}

    void ask(int64_t row, const float* query) {
        const float most = absmax(query, dim_);
        const bool tiny = most < kTiny;
        const float inverse = !tiny && most <= 3.4e38f ? 127.0f / most : 0.0f;
        const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
        scale_[row] = tiny ? 0.0f : most / 127.0f;
        for (int64_t g = 0; g < groups_; ++g) {
            int8_t* codes = queries_ + row * dim_ + g * kKvGroup;
            int32_t sum = 0;
            for (int64_t i = 0; i < kKvGroup; ++i) {
                const float code = inverse > 0 ? (query[g * kKvGroup + i] * inverse + whole) - whole : 0.0f;
                codes[i] = static_cast<int8_t>(code);
                sum += codes[i];
            }
            starts_[row * groups_ + g] = -8 * sum;
        }
    }

    void open(int64_t at, int64_t begin, int64_t end, int64_t limit) {
        blocks_.open(at, begin, end, limit);
        for (int64_t b = 0; widened_ && b < kSegmentBlocks; ++b) widen(b);
    }

    // Add positions [low, high) of the open segment to n rows.
    void add(int64_t row, int64_t n, int64_t low, int64_t high, Sums* sums, float* values) {
        with_rows(n, [&]<int R>() { add_rows<R>(row, low, high, sums, values); });
    }

   private:
    static constexpr int64_t kWorthWidening = 12;  // rows; fewer take codes apart on the way
    static constexpr int64_t kMostGroups = kFastHeadDim / kKvGroup;
    static constexpr int64_t kColumns = kFastBlock / kLanes;  // vectors of half a group of dims
    static constexpr int64_t kEight = kFastBlock * 4;         // bytes of 8 dims of a block's keys

    // A few rows over one segment, between scores and values: see Weighing.
    struct GroupWeighing : Weighing {
        alignas(64) int16_t group_codes[kMostGroups][kFastRows][kSegment];
        float sizes[kMostGroups];                // largest scales of values
        int32_t starts[kMostGroups][kFastRows];  // of sums of values
    };

    static Vec low_half(Vec both) { return (Vec)((Ints)both & (Ints)broadcast_vec(0x0f0f0f0f)); }
    static Vec high_half(Vec both) { return low_half(shifted_right<4>(both)); }
    static Words low_half(Words both) { return both & 15; }
    static Words high_half(Words both) { return both >> 4; }  // they are not negative

    // Scales of a group of dims of the positions from `at` on.
    Lanes scales_at(bool values, int64_t g, int64_t at) const {
        const int64_t first = ((values ? groups_ : 0) + g) * kFastBlock + at % kFastBlock;
        return widened_halves(blocks_.now(at / kFastBlock) + layout_.scales + first * 2);
    }

    void widen(int64_t block) {
        const char* from = blocks_.now(block);
        uint8_t* keys = keys_ + block * kFastBlock * dim_;
        blocks_.fetch_next(block);
        for (int64_t i = 0; i < dim_ / 8; ++i) {
            for (int64_t at = 0; at < kEight; at += static_cast<int64_t>(sizeof(Vec))) {
                const Vec both = load_vec(from + i * kEight + at);
                store_vec(keys + 2 * i * kEight + at, low_half(both));
                store_vec(keys + (2 * i + 1) * kEight + at, high_half(both));
            }
        }
        const uint8_t* values = reinterpret_cast<const uint8_t*>(from + layout_.values);
        int16_t* to = values_ + block * kFastBlock * dim_;
        for (int64_t i = 0; i < kFastBlock / 2 * groups_ * kColumns; ++i) {
            const Words both = load_words(values + i * kWords);
            store_words(to + 2 * i * kWords, low_half(both));
            store_words(to + (2 * i + 1) * kWords, high_half(both));
        }
    }

    template <int R>
    void add_rows(int64_t row, int64_t low, int64_t high, Sums* sums, float* values) {
        GroupWeighing w;
        widened_ ? score<true, R>(row, low, high, w) : score<false, R>(row, low, high, w);
        high - low == kSegment ? weigh<false, R>(row, low, high, sums, w) : weigh<true, R>(row, low, high, sums, w);
        for (int64_t g = 0; g < groups_; ++g) {
            for (int64_t column = 0; column < kColumns; ++column) {
                widened_ ? gather<true, R>(g, column, low, high, w, values)
                         : gather<false, R>(g, column, low, high, w, values);
            }
        }
    }

    template <bool kWidened, int R>
    HALVE_OWN_REGISTERS void score(int64_t row, int64_t low, int64_t high, Weighing& w) const {
        for (int64_t v = low / kLanes / kKeyVectors * kKeyVectors; v * kLanes < high; v += kKeyVectors) {
            const char* from[kKeyVectors];
            const char* ahead[kKeyVectors / kBlockVectors];
            for (int c = 0; c < kKeyVectors; ++c) {
                const int64_t block = (v + c) / kBlockVectors, at = (v + c) % kBlockVectors * kLanes * 4;
                from[c] = kWidened ? reinterpret_cast<const char*>(keys_) + block * kFastBlock * dim_ + at
                                   : blocks_.now(block) + at;
                ahead[c / kBlockVectors] = blocks_.next(block);
            }
            for (int64_t g = 0; g < groups_; ++g) add_scores<kWidened, R>(row, g, v, from, ahead, w);
        }
    }

    template <bool kWidened, int R>
    inline __attribute__((always_inline)) void add_scores(int64_t row, int64_t g, int64_t v,
                                                          const char* const (&from)[kKeyVectors],
                                                          const char* const* ahead, Weighing& w) const {
        const int8_t* asked = queries_ + row * dim_ + g * kKvGroup;
        Vec found[R][kKeyVectors];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec start = broadcast_vec(kSixteenBit ? 0 : starts_[(row + r) * groups_ + g]);
#pragma GCC unroll 4
            for (int c = 0; c < kKeyVectors; ++c) found[r][c] = start;
        }
#pragma GCC unroll 1
        for (int64_t i = g * (kKvGroup / 8); i < (g + 1) * (kKvGroup / 8); ++i, asked += 8) {
            if (!kWidened) {
#pragma GCC unroll 4
                for (int f = 0; f < kKeyVectors / kBlockVectors; ++f) __builtin_prefetch(ahead[f] + i * kEight, 0, 2);
            }
            Vec quads[2][kKeyVectors];
#pragma GCC unroll 4
            for (int c = 0; c < kKeyVectors; ++c) {
                if (kWidened) {
                    quads[0][c] = load_vec(from[c] + 2 * i * kEight);
                    quads[1][c] = load_vec(from[c] + (2 * i + 1) * kEight);
                } else {
                    const Vec both = load_vec(from[c] + i * kEight);
                    quads[0][c] = low_half(both);
                    quads[1][c] = high_half(both);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const Vec four = broadcast_vec(int_at(asked + r * dim_ + 4 * half));
#pragma GCC unroll 4
                    for (int c = 0; c < kKeyVectors; ++c) found[r][c] = dot(found[r][c], quads[half][c], four);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < kKeyVectors; ++c) {
                float* score = w.scores[r] + (v + c) * kLanes;
                const Lanes sum = whole(found[r][c], starts_[(row + r) * groups_ + g]);
                const Lanes scale = scales_at(false, g, (v + c) * kLanes);
                store(score, fma(sum, scale, g ? load(score) : Lanes{}));
            }
        }
    }

    // A group's sum; in 16 bits it is 8 quads of at most 2 * 15 * 127, which fit, and has not begun at `start`.
    static Lanes whole(Vec sum, int32_t start) {
#if defined(__AVX512VNNI__)
        (void)start;
        return to_floats((Ints)sum);
#else
        return to_floats((Ints)finished(sum) + (kSixteenBit ? start : 0));
#endif
    }

    // Row after row through each part, so that the sums over lanes are taken for all of them at once.
    template <bool kMasked, int R>
    HALVE_OWN_REGISTERS void weigh(int64_t row, int64_t low, int64_t high, Sums* sums_of, GroupWeighing& w) const {
        for (int r = 0; r < kFastRows; ++r) w.tops[r] = w.added[r] = Lanes{};
        for (int r = 0; r < R; ++r) {
            Lanes top = broadcast(kLowest);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                Lanes score = load(w.scores[r] + i);
                if (kMasked) score = select(within(i, low, high), score, broadcast(kLowest));
                if (kMasked) store(w.scores[r] + i, score);
                top = maximum(top, score);
            }
            w.tops[r] = top;
        }
        alignas(64) float to_codes[kMostGroups][kSegment];
        for (int64_t g = 0; g < groups_; ++g) {
            Lanes scales_of[kSegmentVectors];
            for (int64_t i = 0; i < kSegmentVectors; ++i) scales_of[i] = scales_at(true, g, i * kLanes);
            Lanes most = {};
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                const Lanes size = (Lanes)((Bits)scales_of[i / kLanes] & 0x7fffffffu);
                most = maximum_positive(most, kMasked ? select(within(i, low, high), size, Lanes{}) : size);
            }
            w.sizes[g] = largest_positive(most);
            const Lanes inverse = broadcast(w.sizes[g] < kTiny ? 0.0f : 32767.0f / w.sizes[g]);
            for (int64_t i = 0; i < kSegment; i += kLanes) store(to_codes[g] + i, scales_of[i / kLanes] * inverse);
        }
        Four scales = {};
        for (int r = 0; r < R; ++r) scales[r] = scale_[row + r];
        const Four highest = largest(w.tops) * scales;
        Words ones;
        for (int j = 0; j < kWords; ++j) ones[j] = 1;
        Lanes codes_added[kMostGroups][kFastRows];
        for (int64_t g = 0; g < groups_; ++g) {
            for (Lanes& of : codes_added[g]) of = Lanes{};
        }
        for (int r = 0; r < R; ++r) {
            const Lanes scale = broadcast(scales[r]), top = broadcast(-highest[r]);
            Lanes added = {};
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSegment; i += kLanes) {
                Lanes weight = exp2(fma(load(w.scores[r] + i), scale, top));
                if (kMasked) weight = select(within(i, low, high), weight, Lanes{});
                added += weight;
                store(w.scores[r] + i, weight);
            }
            w.added[r] = added;
            for (int64_t g = 0; g < groups_; ++g) {
                Ints total = {};
#pragma GCC unroll 4
                for (int64_t i = 0; i < kSegment; i += kWords) {
                    Lanes codes[2];
                    for (int64_t half = 0; half < 2; ++half) {
                        const int64_t at = i + half * kLanes;
                        codes[half] = load(w.scores[r] + at) * load(to_codes[g] + at);
                        if (kMasked) codes[half] = select(within(at, low, high), codes[half], Lanes{});
                    }
                    const Words words = to_words(codes[0], codes[1]);
                    store_words(w.group_codes[g][r] + i, words);
                    total = add_products(total, words, ones);
                }
                codes_added[g][r] = to_floats(total);  // exact, as their sum is: below 2^24
            }
        }
        for (int64_t g = 0; g < groups_; ++g) {
            const Four total = sums(codes_added[g]) * -8.0f;
            for (int r = 0; r < kFastRows; ++r) w.starts[g][r] = static_cast<int32_t>(total[r]);
        }
        w.fade(sums_of, R, highest);
    }

    // Half a group of dims is one or more vectors; a column is one of them in each half.
    template <bool kWidened, int R>
    HALVE_OWN_REGISTERS void gather(int64_t g, int64_t column, int64_t low, int64_t high, const GroupWeighing& w,
                                    float* out) const {
        Ints found[R][2];
        for (int r = 0; r < R; ++r) found[r][0] = found[r][1] = Ints{} + w.starts[g][r];
        const int64_t step = groups_ * kColumns * kWords, first = (g * kColumns + column) * kWords;
        for (int64_t b = low / kFastBlock; b * kFastBlock < high; ++b) {
            const int16_t* codes = w.group_codes[g][0] + b * kFastBlock;
            const uint8_t* from = reinterpret_cast<const uint8_t*>(blocks_.now(b) + layout_.values) + first;
            const int16_t* wide = values_ + b * kFastBlock * dim_ + 2 * first;
            const char* ahead = blocks_.next(b) + layout_.values + g * (kFastBlock / 2 * kKvGroup);
#pragma GCC unroll 2
            for (int64_t j = 0; j < kFastBlock / 2; ++j) {
                if (!kWidened && column == 0 && j % 2 == 0) __builtin_prefetch(ahead + j * kKvGroup, 0, 2);
                Words halves[2];
                if (kWidened) {
                    halves[0] = load_words(wide + 2 * j * step);
                    halves[1] = load_words(wide + 2 * j * step + kWords);
                } else {
                    const Words both = load_words(from + j * step);
                    halves[0] = low_half(both);
                    halves[1] = high_half(both);
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Words pair = broadcast_pair(codes + r * kSegment + 2 * j);
                    found[r][0] = add_products(found[r][0], pair, halves[0]);
                    found[r][1] = add_products(found[r][1], pair, halves[1]);
                }
            }
        }
        const float size = w.sizes[g] < kTiny ? 0.0f : w.sizes[g] / 32767.0f;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            for (int half = 0; half < 2; ++half) {
                float* at = out + r * dim_ + g * kKvGroup + half * (kKvGroup / 2) + column * kLanes;
                const Lanes sum = to_floats(found[r][half]) * (w.theirs[r] * size);
                store(at, fma(load(at), broadcast(w.mine[r]), sum));
            }
        }
    }

    Blocks blocks_;
    KvLayout layout_;
    int64_t dim_;
    int64_t groups_;
    bool widened_;
    float scale_[kQueryRows];
    int32_t starts_[kQueryRows * kMostGroups];
    alignas(64) int8_t queries_[kQueryValues];
    alignas(64) uint8_t keys_[kSegment * kFastHeadDim];
    alignas(64) int16_t values_[kSegment * kFastHeadDim];
};

}  // namespace
}  // namespace halve

#endif
