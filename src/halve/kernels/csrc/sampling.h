// Choosing a token from a row of logits; halve/kernels/sampling.py is the definition, with the order of operations.
//
// A row is never sorted. One pass finds the maximum of every kStretch logits; a floor under the candidates (from
// top_k, through those maxima, and from what can matter in a double) then skips most stretches. Each cut is a place in
// an order (by logit, or by nearness to the mean for typical_p), found by a histogram that is refined at its border.
// What is left stays in order of ids, so that the draw is a walk along a running sum.
//
// Weights and their sums are in double. With eps = 2^-53 and s = (z - max) / temperature, -80 <= s <= 0, a weight is
// off by (3 |s| + 4) eps of itself (roundings of the difference, the inverse and the product, then exp's 2 ulp), and by
// (2 |s| + 2) eps in the definition; a sum of n adds less than n eps in each. So running sums are within
// (406 + 2 n) eps of the total of the definition's, and the token is the same unless the draw or a cut falls that close
// to a border.
#pragma once

#include "lanes.h"
#include "products.h"
#include "rows.h"

namespace halve {
namespace {

constexpr double kFarthest = 80.0;  // e^-80 < 2^-115: with any vocabulary less than a sum's last bit
constexpr float kInfinity = __builtin_inff();

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline float largest_of(Lanes v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
    return lanes[0];
}

// The largest of n <= kStretch logits; NaN counts as +infinity, so that a broken row shows in its maximum.
inline float stretch_max(const float* x, int64_t n) {
    const Lanes infinity = broadcast(kInfinity);
    Lanes most = -infinity;
    auto sound = most < infinity;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes v = load(x + i);
        most = larger(v, most);
        sound &= v < infinity;
    }
    float result = largest_of(sound ? most : infinity);
    for (; i < n; ++i) {
        if (!(x[i] <= result)) result = x[i] < kInfinity ? x[i] : kInfinity;
    }
    return result;
}

constexpr Best kNoBest = {-kInfinity, 0};

// Take n <= kStretch more logits, those of tokens first, first + 1, ..., in order of ids.
inline void improve(Best& best, const float* x, int64_t n, int64_t first) {
    const float value = stretch_max(x, n);
    if (!(value > best.value)) return;
    int64_t i = 0;
    while (x[i] < value) ++i;
    best = {value, static_cast<int32_t>(first + i)};
}

// Unsigned numbers in the order of floats; zeros of both signs are one.
inline uint32_t ordered(float x) {
    const uint32_t bits = bits_of(x + 0.0f);
    return bits ^ ((0 - (bits >> 31)) | 0x80000000);  // no branch: signs are random
}

inline float unordered(uint32_t key) { return float_of(key & 0x80000000 ? key & 0x7fffffff : ~key); }

// The smallest float that is at least x, and finite.
inline float float_above(double x) {
    const double lowest = -3.4028234663852886e38;
    const float f = static_cast<float>(x < lowest ? lowest : x);
    return static_cast<double>(f) < x ? unordered(ordered(f) + 1) : f;
}

typedef double Doubles __attribute__((vector_size(kLanes * 4)));
typedef uint64_t LongBits __attribute__((vector_size(kLanes * 4)));
typedef float HalfLanes __attribute__((vector_size(kLanes * 2)));
constexpr int64_t kDoubles = kLanes / 2;

inline double sum(Doubles v) {
    double total = v[0];
    for (int i = 1; i < kDoubles; ++i) total += v[i];
    return total;
}

// e^x within 2 ulp for -700 < x < 700: x less whole multiples of ln 2 (in two parts, as fdlibm's), Taylor to x^13.
inline Doubles exp(Doubles x) {
    const double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number, left in the low bits
    const Doubles shifted = x * 1.44269504088896338700 + shift;
    const Doubles n = shifted - shift;
    const Doubles r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    Doubles p = Doubles{} + 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    LongBits power;
    memcpy(&power, &shifted, sizeof power);
    power = (power << 52) + (1023ull << 52);
    Doubles scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// e^((x - top) * inverse), not below e^-kFarthest.
inline Doubles weights(const float* x, double top, double inverse) {
    HalfLanes narrow;
    memcpy(&narrow, x, sizeof narrow);
    const Doubles s = (__builtin_convertvector(narrow, Doubles) - top) * inverse, lowest = Doubles{} - kFarthest;
    return exp(s < lowest ? lowest : s);
}

// The sum of the weights of n logits, which are written to w unless it is null.
inline double weigh(const float* x, double* w, int64_t n, double top, double inverse) {
    Doubles total = {};
    int64_t i = 0;
    for (; i + kDoubles <= n; i += kDoubles) {
        const Doubles v = weights(x + i, top, inverse);
        total += v;
        if (w) memcpy(w + i, &v, sizeof v);
    }
    float rest[kDoubles] = {};
    memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(float));
    const Doubles v = weights(rest, top, inverse);
    double last = 0.0;
    for (int64_t j = 0; i + j < n; ++j) {
        last += v[j];
        if (w) w[i + j] = v[j];
    }
    return sum(total) + last;
}

inline double sum_of(const double* w, int64_t n) {
    Doubles total = {};
    int64_t i = 0;
    for (; i + kDoubles <= n; i += kDoubles) {
        Doubles v;
        memcpy(&v, w + i, sizeof v);
        total += v;
    }
    double result = sum(total);
    for (; i < n; ++i) result += w[i];
    return result;
}

// 53 random bits in [0, 1): the first output of Philox 4x64-10 with key {seed, 0} and counter {step + 1, 0, 0, 0}
// (numpy counts up before it draws).
inline double uniform(uint64_t seed, uint64_t step) {
    uint64_t c[4] = {step + 1, step + 1 == 0, 0, 0}, key[2] = {seed, 0};
    for (int round = 0; round < 10; ++round) {
        const unsigned __int128 a = static_cast<unsigned __int128>(0xd2e7470ee14c6c93ull) * c[0];
        const unsigned __int128 b = static_cast<unsigned __int128>(0xca5a826395121157ull) * c[2];
        const uint64_t c1 = c[1], c3 = c[3];
        c[0] = static_cast<uint64_t>(b >> 64) ^ c1 ^ key[0];
        c[1] = static_cast<uint64_t>(b);
        c[2] = static_cast<uint64_t>(a >> 64) ^ c3 ^ key[1];
        c[3] = static_cast<uint64_t>(a);
        key[0] += 0x9e3779b97f4a7c15ull;
        key[1] += 0xbb67ae8584caa73bull;
    }
    return static_cast<double>(c[0] >> 11) * 0x1p-53;
}

// Memory of one thread, carved from what the caller gives; `sampling_bytes` counts it.
struct Scratch {
    double *w, *distance, *bin_w, *bins;
    uint64_t* places;
    float *z, *kept_z, *maxima;
    uint32_t* counts;  // all zero between rows
    int32_t* kept_id;

    Scratch(void* memory, int64_t vocab) {
        const int64_t n = whole_stretches(vocab);
        w = static_cast<double*>(memory);
        distance = w + n;
        bin_w = distance + n;
        places = reinterpret_cast<uint64_t*>(bin_w + n);
        bins = bin_w + 2 * n;
        z = reinterpret_cast<float*>(bins + (1 << kBinBits));
        kept_z = z + n;
        maxima = kept_z + n;
        counts = reinterpret_cast<uint32_t*>(maxima + n / kStretch);
        kept_id = reinterpret_cast<int32_t*>(counts + n);
    }
};

// Where an ordered set ends: all places before `place` are in it, and the first `ties` (by id) at it.
struct Border {
    uint64_t place;
    int64_t ties;
};

// The bin in which a running sum reaches the target, of which what the bins before it hold is taken away. Where
// rounding leaves it unreached, the last bin that is filled.
inline int64_t take_bins(const double* bins, int64_t used, double& target) {
    int64_t filled = 0;
    double left = target;
    for (int64_t bin = 0; bin < used; ++bin) {
        if (bins[bin] == 0.0) continue;
        filled = bin, target = left;
        if (bins[bin] >= left) break;
        left -= bins[bin];
    }
    return filled;
}

// Some two bins for each token, so that a short row does not pay for a long histogram.
inline int bin_bits(int64_t n) {
    const int bits = n < 8 ? 4 : 65 - __builtin_clzll(static_cast<uint64_t>(n));
    return bits < kBinBits ? bits : kBinBits;
}

// The border of the shortest beginning that holds `target`: a sum of weights, or a number of tokens when w is null.
// place(i) is 0 for the first and at most `last`. Bin by bin, then again within the bin where the target is reached.
template <class Place>
Border border_at(Place place, const double* w, int64_t n, uint64_t last, double target, double* bins) {
    uint64_t first = 0, span = last;
    for (;;) {
        const int width = span ? 64 - __builtin_clzll(span) : 0, bits = bin_bits(n);
        const int shift = width > bits ? width - bits : 0;
        const int64_t used = static_cast<int64_t>(span >> shift) + 1;
        memset(bins, 0, static_cast<size_t>(used) * sizeof *bins);
        for (int64_t i = 0; i < n; ++i) {
            const uint64_t at = place(i) - first;
            if (at <= span) bins[at >> shift] += w ? w[i] : 1.0;
        }
        const int64_t bin = take_bins(bins, used, target);
        first += static_cast<uint64_t>(bin) << shift;
        const uint64_t rest = span - (static_cast<uint64_t>(bin) << shift), wide = (1ull << shift) - 1;
        span = rest < wide ? rest : wide;
        if (shift == 0) break;
    }
    int64_t equals = 0;
    double each = 1.0;
    for (int64_t i = 0; i < n; ++i) {
        if (place(i) != first) continue;
        ++equals;
        if (w) each = w[i];
    }
    const double ties = __builtin_ceil(target / each);
    return {first, ties < 1.0 ? 1 : ties < static_cast<double>(equals) ? static_cast<int64_t>(ties) : equals};
}

// By how far a logit is below the largest.
struct ByLogit {
    const float* z;
    float top;
    float depth(int64_t i) const { return top - z[i]; }
    uint64_t operator()(int64_t i) const { return ordered(top) - ordered(z[i]); }
};

// By how far a scaled logit is from the mean.
struct ByDistance {
    const double* distance;
    float depth(int64_t i) const { return static_cast<float>(distance[i]); }
    uint64_t operator()(int64_t i) const {
        uint64_t bits;
        memcpy(&bits, distance + i, sizeof bits);
        return bits;
    }
};

// As border_at, for many: bins of equal depth first, which spread logits better than places do, then border_at for the
// tokens of one bin.
template <class Place>
Border border_of_many(Place place, const double* w, int64_t n, float deepest, double target, const Scratch& scratch) {
    const int bits = bin_bits(n);
    const float most = static_cast<float>((1 << bits) - 1), scale = deepest > 0.0f ? most / deepest : 0.0f;
    const auto bin_of = [&](int64_t i) {
        const float at = place.depth(i) * scale;
        return static_cast<int32_t>(at < most ? at : most);
    };
    memset(scratch.bins, 0, sizeof(double) << bits);
    for (int64_t i = 0; i < n; ++i) scratch.bins[bin_of(i)] += w[i];
    const int64_t bin = take_bins(scratch.bins, 1 << bits, target);
    uint64_t* places = scratch.places;
    double* weights = scratch.bin_w;
    int64_t here = 0;
    uint64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool in = bin_of(i) == bin;
        const uint64_t at = place(i);
        places[here] = at;
        weights[here] = w[i];
        last = in && at > last ? at : last;
        here += in;
    }
    return border_at([places](int64_t i) { return places[i]; }, weights, here, last, target, scratch.bins);
}

// Candidates in order of ids, in a thread's scratch. top: the largest logit of all.
struct Candidates {
    const Scratch& scratch;
    float top;
    int64_t n = 0;

    ByLogit by_logit() const { return {scratch.kept_z, top}; }

    uint64_t place_of(float z) const { return ordered(top) - ordered(z); }

    // Take the logits that are at least `floor`.
    void gather(const float* z, int64_t vocab, float floor) {
        float* kept_z = scratch.kept_z;
        int32_t* kept_id = scratch.kept_id;
        int64_t kept = 0;
        for (int64_t start = 0; start < vocab; start += kStretch) {
            if (scratch.maxima[start / kStretch] < floor) continue;
            const int64_t end = least(vocab, start + kStretch);
            for (int64_t i = start; i < end; ++i) {
                kept_z[kept] = z[i];
                kept_id[kept] = static_cast<int32_t>(i);
                kept += z[i] >= floor;
            }
        }
        n = kept;
    }

    // Leave what `stays` says; without a branch, as it would be mispredicted.
    template <class Stays>
    void leave(Stays stays, bool weighed) {
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const bool stay = stays(i);
            scratch.kept_z[kept] = scratch.kept_z[i];
            scratch.kept_id[kept] = scratch.kept_id[i];
            if (weighed) scratch.w[kept] = scratch.w[i];
            kept += stay;
        }
        n = kept;
    }

    template <class Place>
    void cut(Place place, Border border, bool weighed) {
        leave(
            [place, border](int64_t i) mutable {
                const uint64_t at = place(i);
                const bool tie = (at == border.place) & (border.ties > 0);
                border.ties -= tie;
                return (at < border.place) | tie;
            },
            weighed);
    }

    void cut_below(float floor) {
        const float* z = scratch.kept_z;
        leave([z, floor](int64_t i) { return z[i] >= floor; }, true);
    }

    float lowest() const {
        float least = top;
        for (int64_t i = 0; i < n; ++i) least = scratch.kept_z[i] < least ? scratch.kept_z[i] : least;
        return least;
    }

    // The k largest. k >= 1.
    void cut_top_k(int64_t k, float floor) {
        if (k >= n) return;
        const uint64_t last = place_of(floor);
        cut(by_logit(), border_at(by_logit(), nullptr, n, last, static_cast<double>(k), scratch.bins), false);
    }

    // `total` is the sum of the weights. Tokens below half of (1 - top_p) / n of it hold less than 1 - top_p together,
    // so they go first.
    void cut_top_p(double top_p, double total, double temperature, float floor) {
        const double lowest = temperature * __builtin_log((1.0 - top_p) * total / (2.0 * static_cast<double>(n)));
        const float above = float_above(top + lowest), least_likely = above < top ? above : top;
        if (least_likely > floor) cut_below(least_likely);
        const float deepest = top - (least_likely > floor ? least_likely : floor);
        cut(by_logit(), border_of_many(by_logit(), scratch.w, n, deepest, top_p * total, scratch), true);
    }

    void cut_min_p(double min_p, double temperature) {
        cut_below(float_above(top + temperature * __builtin_log(min_p)));
    }

    void cut_typical(double typical_p, double inverse) {
        const double total = sum_of(scratch.w, n);
        double mean = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            scratch.distance[i] = (static_cast<double>(scratch.kept_z[i]) - top) * inverse;
            mean += scratch.w[i] * scratch.distance[i];
        }
        mean /= total;
        double farthest = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            const double away = __builtin_fabs(scratch.distance[i] - mean);
            scratch.distance[i] = away;
            farthest = away > farthest ? away : farthest;
        }
        const ByDistance place{scratch.distance};
        const float deepest = static_cast<float>(farthest);
        cut(place, border_of_many(place, scratch.w, n, deepest, typical_p * total, scratch), true);
    }

    // The first candidate at which the running sum of weights exceeds u of the total.
    int32_t draw(double u) const {
        const double target = u * sum_of_stretches(n);
        int64_t start = 0;
        double before = 0.0;
        for (; start + kStretch < n; start += kStretch) {
            const double here = sum_of(scratch.w + start, kStretch);
            if (before + here > target) break;
            before += here;
        }
        for (int64_t i = start; i < n; ++i) {
            before += scratch.w[i];
            if (before > target) return scratch.kept_id[i];
        }
        return scratch.kept_id[n - 1];
    }

    double sum_of_stretches(int64_t end) const {
        double total = 0.0;
        for (int64_t i = 0; i < end; i += kStretch) total += sum_of(scratch.w + i, least(kStretch, end - i));
        return total;
    }
};

// Fill the maxima of every stretch; returns that of the row.
inline float find_maxima(const float* z, int64_t vocab, float* maxima) {
    float top = -kInfinity;
    for (int64_t start = 0; start < vocab; start += kStretch) {
        const float here = stretch_max(z + start, least(kStretch, vocab - start));
        maxima[start / kStretch] = here;
        top = here > top ? here : top;
    }
    return top;
}

// A number that at least k logits reach, and not below `floor`: the k-th largest of the maxima, where there are k.
inline float floor_of_top_k(const Scratch& scratch, int64_t vocab, float top, int64_t k, float floor) {
    const int64_t stretches = (vocab + kStretch - 1) / kStretch;
    if (k > stretches) return floor;
    const ByLogit place{scratch.maxima, top};
    const uint64_t last = ordered(top) - ordered(-kInfinity);
    const Border border = border_at(place, nullptr, stretches, last, static_cast<double>(k), scratch.bins);
    const float bound = unordered(static_cast<uint32_t>(ordered(top) - border.place));
    return bound > floor ? bound : floor;
}

inline int32_t draw_row(const Sampling& a, int64_t row, const float* z, float top, const Scratch& scratch) {
    const double temperature = static_cast<double>(a.temperature[row]), inverse = 1.0 / temperature;
    const int64_t k = a.top_k[row] > 0 && a.top_k[row] < a.vocab ? a.top_k[row] : a.vocab;
    float floor = float_above(top - kFarthest * temperature);
    if (k < a.vocab) floor = floor_of_top_k(scratch, a.vocab, top, k, floor);
    Candidates candidates{scratch, top};
    candidates.gather(z, a.vocab, floor);
    candidates.cut_top_k(k, floor);
    // From here on only the tokens that are left count, so that a row of the k likeliest alone gives the same token.
    if (a.top_k[row] > 0) floor = candidates.lowest();
    const double total = weigh(scratch.kept_z, scratch.w, candidates.n, static_cast<double>(top), inverse);
    if (a.top_p[row] < 1.0f) candidates.cut_top_p(static_cast<double>(a.top_p[row]), total, temperature, floor);
    if (a.min_p[row] > 0.0f) candidates.cut_min_p(static_cast<double>(a.min_p[row]), temperature);
    if (a.typical_p[row] < 1.0f) candidates.cut_typical(static_cast<double>(a.typical_p[row]), inverse);
    return candidates.draw(uniform(a.seed[row], static_cast<uint64_t>(a.step[row])));
}

// Forbid what the bits of a row leave out.
inline void forbid(const uint32_t* allowed, float* z, int64_t vocab) {
    for (int64_t start = 0; start < vocab; start += 32) {
        const uint32_t word = allowed[start / 32];
        if (word == 0xffffffff) continue;
        const int64_t end = least(vocab, start + 32);
        for (int64_t i = start; i < end; ++i) z[i] = word >> (i - start) & 1 ? z[i] : -kInfinity;
    }
}

// Through memory, so that no product contracts with the sum that takes it: the definition rounds each.
inline double rounded(double x) {
    asm volatile("" : "+m"(x));
    return x;
}

constexpr uint32_t kSeen = 1u << 31, kDone = 1u << 30;  // flags beside a token's count

// A logit after the penalties, as the definition computes it.
inline float penalize(const Sampling& a, int64_t row, double z, uint32_t counted) {
    const double repetition = static_cast<double>(a.repetition_penalty[row]);
    const double count = static_cast<double>(counted & ~(kSeen | kDone));
    if (counted & kSeen) z = rounded(z > 0.0 ? z / repetition : z * repetition);
    z = rounded(z - rounded(static_cast<double>(a.frequency_penalty[row]) * count));
    return static_cast<float>(count > 0.0 ? z - static_cast<double>(a.presence_penalty[row]) : z);
}

struct Tokens {
    const int32_t *begin, *end;
    Tokens(const int32_t* ids, const int64_t* offsets, int64_t row)
        : begin(ids ? ids + offsets[row] : nullptr), end(ids ? ids + offsets[row + 1] : nullptr) {}
};

// Bias and penalties on a copy of the row, token by token.
inline void adjust(const Sampling& a, int64_t row, float* z, uint32_t* counts) {
    const bool counting =
        a.repetition_penalty[row] != 1.0f || a.frequency_penalty[row] != 0.0f || a.presence_penalty[row] != 0.0f;
    const Tokens biased(a.bias_ids, a.bias_offsets, row);
    const Tokens prompt(counting ? a.prompt_ids : nullptr, a.prompt_offsets, row);
    const Tokens output(counting ? a.output_ids : nullptr, a.output_offsets, row);
    for (const int32_t* id = prompt.begin; id < prompt.end; ++id) counts[*id] |= kSeen;
    for (const int32_t* id = output.begin; id < output.end; ++id) counts[*id] = (counts[*id] | kSeen) + 1;
    for (const int32_t* id = biased.begin; id < biased.end; ++id) {
        const double sum = rounded(static_cast<double>(z[*id]) + static_cast<double>(a.bias_values[id - a.bias_ids]));
        z[*id] = penalize(a, row, sum, counts[*id]);
        counts[*id] |= kDone;
    }
    const Tokens touched[] = {prompt, output, biased};
    for (int h = 0; h < 2; ++h) {
        const Tokens& history = touched[h];
        for (const int32_t* id = history.begin; id < history.end; ++id) {
            if (!(counts[*id] & kDone)) z[*id] = penalize(a, row, static_cast<double>(z[*id]), counts[*id]);
            counts[*id] |= kDone;
        }
    }
    for (const Tokens& tokens : touched) {
        for (const int32_t* id = tokens.begin; id < tokens.end; ++id) counts[*id] = 0;
    }
}

// Ascending.
inline void sort(uint64_t* a, int64_t n) {
    const auto sink = [a](int64_t root, int64_t end) {
        const uint64_t value = a[root];
        for (int64_t child; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && a[child] < a[child + 1]) ++child;
            if (a[child] <= value) break;
            a[root] = a[child];
        }
        a[root] = value;
    };
    for (int64_t root = n / 2; root-- > 0;) sink(root, n);
    for (int64_t end = n; end-- > 1;) {
        const uint64_t largest = a[0];
        a[0] = a[end];
        a[end] = largest;
        sink(0, end);
    }
}

// The log-probabilities of a row, (x - top) - log of the sum of e^(x - top): large logits of one size stay apart.
struct LogSoftmax {
    double top = 0.0, log_sum = 0.0;
    float operator()(float x) const { return static_cast<float>((static_cast<double>(x) - top) - log_sum); }
};

// Write the likeliest tokens of the model itself. Takes the row's maxima.
inline LogSoftmax log_probabilities(const Sampling& a, int64_t row, const float* x, float top, const Scratch& scratch) {
    const double highest = static_cast<double>(top);
    const LogSoftmax logprob{highest, __builtin_log(weigh(x, nullptr, a.vocab, highest, 1.0))};
    const int64_t k = least(a.num_logprobs[row], a.most_logprobs);
    if (k == 0) return logprob;
    const float floor = floor_of_top_k(scratch, a.vocab, top, k, -kInfinity);
    Candidates candidates{scratch, top};
    candidates.gather(x, a.vocab, floor);
    candidates.cut_top_k(k, floor);
    uint64_t* order = scratch.places;  // place, then id
    for (int64_t i = 0; i < k; ++i) {
        order[i] = candidates.by_logit()(i) << 32 | static_cast<uint32_t>(scratch.kept_id[i]);
    }
    sort(order, k);
    for (int64_t i = 0; i < k; ++i) {
        const int32_t id = static_cast<int32_t>(order[i]);
        a.top_ids[row * a.most_logprobs + i] = id;
        a.top_logprobs[row * a.most_logprobs + i] = logprob(x[id]);
    }
    return logprob;
}

inline Best best_of(const float* x, int64_t vocab) {
    Best best = kNoBest;
    for (int64_t start = 0; start < vocab; start += kStretch) {
        improve(best, x + start, least(kStretch, vocab - start), start);
    }
    return best;
}

enum Status : int32_t { kChosen = 0, kBrokenLogits = 1, kBeyondFloat = 2, kAllForbidden = 3 };

inline Status sample_row(const Sampling& a, int64_t row, const Scratch& scratch) {
    const float* x = a.logits + row * a.vocab;
    const float* z = x;
    const bool greedy = a.temperature[row] == 0.0f, logprobs = a.num_logprobs[row] >= 0;
    const bool copied = a.allowed || a.bias_ids || a.repetition_penalty[row] != 1.0f ||
                        a.frequency_penalty[row] != 0.0f || a.presence_penalty[row] != 0.0f;
    LogSoftmax logprob;
    if (copied || logprobs || !greedy) {
        float top = find_maxima(x, a.vocab, scratch.maxima);
        if (top == kInfinity) return kBrokenLogits;
        if (top == -kInfinity) return kAllForbidden;
        if (logprobs) logprob = log_probabilities(a, row, x, top, scratch);
        if (copied) {
            memcpy(scratch.z, x, static_cast<size_t>(a.vocab) * sizeof(float));
            z = scratch.z;
            if (a.allowed) forbid(a.allowed + row * ((a.vocab + 31) / 32), scratch.z, a.vocab);
            adjust(a, row, scratch.z, scratch.counts);
            top = greedy ? 0.0f : find_maxima(z, a.vocab, scratch.maxima);
            if (top == kInfinity) return kBeyondFloat;
            if (top == -kInfinity) return kAllForbidden;
        }
        if (!greedy) a.token_ids[row] = draw_row(a, row, z, top, scratch);
    }
    if (greedy) {
        const Best best = best_of(z, a.vocab);
        if (best.value == kInfinity) return copied ? kBeyondFloat : kBrokenLogits;
        if (best.value == -kInfinity) return kAllForbidden;
        a.token_ids[row] = best.id;
    }
    if (logprobs) a.logprobs[row] = logprob(x[a.token_ids[row]]);
    return kChosen;
}

// One thread's share: rows are handed out one by one.
void sample(const Sampling& a, int64_t thread) {
    const Scratch scratch(static_cast<char*>(a.scratch) + thread * sampling_bytes(a.vocab), a.vocab);
    for (int64_t row; (row = __atomic_fetch_add(a.next, 1, __ATOMIC_RELAXED)) < a.rows;) {
        a.status[row] = sample_row(a, row, scratch);
    }
}

}  // namespace
}  // namespace halve
