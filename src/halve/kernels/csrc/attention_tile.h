// What attention over whole vectors of tokens and dims shares, where the processor has the operations of simd.h: blocks
// of kFastBlock tokens, head sizes that 16 divides. A tile of rows and vectors stays in registers while it runs along
// the dims (scores) or the tokens (values), so that every number that was loaded serves all rows.
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
constexpr int kKeyVectors = kLanes == 8 ? 2 : 4;    // of a tile of scores: AVX2 has 16 registers, others 32
constexpr int kValueVectors = kLanes == 8 ? 2 : 4;  // of a tile of values
constexpr float kTiny = 0x1p-100f;                  // taken for zero where a scale is made from it

// Positions [low, high) among those from `first` on.
inline Bits within(int64_t first, int64_t low, int64_t high) {
    Ints lane;
    for (int j = 0; j < kLanes; ++j) lane[j] = j;
    lane += static_cast<int32_t>(first);
    return (Bits)((lane >= static_cast<int32_t>(low)) & (lane < static_cast<int32_t>(high)));
}

inline Lanes select(Bits mask, Lanes a, Lanes b) { return (Lanes)((mask & (Bits)a) | (~mask & (Bits)b)); }

inline Four higher(Four a, Four b) { return a > b ? a : b; }

// f.template operator()<n>(), n a number of rows from 1 to kFastRows.
template <class Function>
inline void with_rows(int64_t n, const Function& f) {
    switch (n) {
        case 1:
            return f.template operator()<1>();
        case 2:
            return f.template operator()<2>();
        case 3:
            return f.template operator()<3>();
        default:
            return f.template operator()<4>();
    }
}

// The largest lane of four vectors each.
inline Four largest(const Lanes* v) {
    Four four[4];
    for (int i = 0; i < 4; ++i) {
        Four quarters[kLanes / 4];
        memcpy(quarters, v + i, sizeof quarters);
        four[i] = quarters[0];
        for (int j = 1; j < kLanes / 4; ++j) four[i] = higher(four[i], quarters[j]);
    }
    const Four ab = higher(HALVE_SHUFFLE(four[0], four[1], 0, 4, 1, 5), HALVE_SHUFFLE(four[0], four[1], 2, 6, 3, 7));
    const Four cd = higher(HALVE_SHUFFLE(four[2], four[3], 0, 4, 1, 5), HALVE_SHUFFLE(four[2], four[3], 2, 6, 3, 7));
    return higher(HALVE_SHUFFLE(ab, cd, 0, 1, 4, 5), HALVE_SHUFFLE(ab, cd, 2, 3, 6, 7));
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
        const Four top = higher(highest, before);
        constexpr int kVectors = kLanes == 4 ? 2 : 1;
        Lanes apart[kVectors] = {}, of_rows = {}, of_segment = {};
        const Four from_top[2] = {before - top, highest - top};
        memcpy(apart, from_top, sizeof from_top);
        for (Lanes& of : apart) of = exp2(of);
        memcpy(&mine, apart, sizeof mine);
        memcpy(&theirs, reinterpret_cast<const char*>(apart) + sizeof mine, sizeof theirs);
        memcpy(&of_rows, &weighed, sizeof weighed);
        const Four added_weights = weights * theirs;
        memcpy(&of_segment, &added_weights, sizeof added_weights);
        const Lanes total = fma(of_rows, apart[0], of_segment);
        for (int64_t r = 0; r < n; ++r) rows[r] = {top[r], total[r]};
    }
};

// The blocks of one segment, and of the next one to be fetched while this one is computed: hardware does not foresee
// a jump to the next block. Lines go to the second-level cache, which has room for more of them on their way.
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
        for (int64_t i = 0; i < bytes; i += kAlign) __builtin_prefetch(begin + i, 0, 2);
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

}  // namespace
}  // namespace halve

#endif
