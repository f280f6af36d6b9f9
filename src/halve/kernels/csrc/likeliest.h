// The k likeliest tokens of rows whose logits are not written down: what the last product keeps of each block of its
// outputs, and one list from those of its places.
//
// Tokens are ordered by logit, equals by id, so the k likeliest are the same whoever saw them in which order. Most
// blocks hold none of them and cost one look at their largest: of V random logits some k (1 + ln(V / k)) are ever kept.
#pragma once

#include "sampling.h"

namespace halve {
namespace {

constexpr float kLowestFloat = -3.40282347e38f;

inline bool before(Best a, Best b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// The likeliest of the tokens seen so far, from the likeliest down.
struct List {
    Best* tokens;
    int64_t k;
    int32_t& held;

    void insert(Best token) {
        if (held == k && !before(token, tokens[k - 1])) return;
        int64_t at = held < k ? held++ : k - 1;
        for (; at > 0 && before(token, tokens[at - 1]); --at) tokens[at] = tokens[at - 1];
        tokens[at] = token;
    }

    // The outputs x [n] of a block, n <= kBlock, whose first token is `first`. No token below the floor is kept.
    void take(const float* x, int64_t n, int64_t first, float floor) {
        const float most = stretch_max(x, n);
        if (most < floor) return;
        if (most == kInfinity) return insert({kInfinity, 0});  // or NaN, which compares with nothing
        int64_t places[kBlock], found = 0;
        for (int64_t i = 0; i < n; ++i) {
            places[found] = i;
            found += x[i] >= floor;
        }
        for (int64_t i = 0; i < found; ++i) insert({x[places[i]], static_cast<int32_t>(first + places[i])});
    }
};

// One of the places, for this thread alone until it is given back.
inline int64_t take_place(const Likeliest& a) {
    for (int64_t place = 0;; place = place + 1 < a.places ? place + 1 : 0) {
        if (!__atomic_exchange_n(a.taken + place, 1, __ATOMIC_ACQUIRE)) return place;
    }
}

// What a block's sums [rows][kBlock] add to the likeliest tokens of rows first, first + 1, ... of T.
inline void keep_likeliest(const Product& p, int64_t block, int64_t first, int64_t rows, int64_t n, const float* sums) {
    const Likeliest& a = p.likeliest;
    const int64_t place = take_place(a);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t list = place * p.rows + first + r;
        List kept{a.lists + list * a.k, a.k, a.held[list]};
        float floor, *shared = a.floors + first + r;
        __atomic_load(shared, &floor, __ATOMIC_RELAXED);
        kept.take(sums + r * kBlock, n, block * kBlock, floor);
        if (kept.held < a.k || !(kept.tokens[a.k - 1].value > floor)) continue;
        __atomic_store(shared, &kept.tokens[a.k - 1].value, __ATOMIC_RELAXED);
    }
    __atomic_store_n(a.taken + place, 0, __ATOMIC_RELEASE);
}

void reduce(const Reduce& a, int64_t row) {
    const Likeliest& from = a.from;
    const int64_t k = from.k;
    Best best[kMostCandidates];
    int32_t held = 0;
    List kept{best, k, held};
    for (int64_t place = 0; place < from.places; ++place) {
        int32_t& there = from.held[place * a.rows + row];
        for (int32_t i = 0; i < there; ++i) kept.insert(from.lists[(place * a.rows + row) * k + i]);
        there = 0;
    }
    from.floors[row] = kLowestFloat;
    float* logits = a.logits + row * k;
    int32_t* ids = a.ids + row * k;
    for (int64_t i = 0; i < k; ++i) {
        const Best token = i < held ? best[i] : kNoBest;
        int64_t at = i;
        for (; i < held && at > 0 && ids[at - 1] > token.id; --at) {
            logits[at] = logits[at - 1];
            ids[at] = ids[at - 1];
        }
        logits[at] = token.value;
        ids[at] = token.id;
    }
}

}  // namespace
}  // namespace halve
