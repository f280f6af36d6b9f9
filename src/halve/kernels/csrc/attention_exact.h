// Attention over keys and values widened to floats, for every format, head size, block size and processor.
#pragma once

#include "attention_sums.h"

namespace halve {
namespace {

// The largest ways are the fast kernels'; this one is for what they do not take.
class ExactKernel {
   public:
    static constexpr int64_t kRowsTogether = 8;

    ExactKernel(const Places& places, int64_t) : places_(places), width_(row_width(places.a.cache->head_dim)) {
        memset(read_, 0, sizeof read_);
    }

    void ask(int64_t row, const float* query) {
        const int64_t dim = places_.a.cache->head_dim;
        for (int64_t i = 0; i < width_; ++i) queries_[row * width_ + i] = i < dim ? query[i] : 0.0f;
    }

    void open(int64_t at, int64_t, int64_t, int64_t) { at_ = at; }

    // Add positions [low, high) of the open segment to n rows.
    void add(int64_t row, int64_t n, int64_t low, int64_t high, Sums* sums, float* values) {
        alignas(64) float scores[kRowsTogether][kSegment + kRead];
        for (int64_t j = low; j < high; j += kRead) {
            read(at_ + j, smaller(kRead, high - j), false);
            for (int64_t r = 0; r < n; ++r) score(queries_ + (row + r) * width_, scores[r] + j - low);
        }
        for (int64_t r = 0; r < n; ++r) weigh(scores[r], high - low, sums[r], values + r * width_);
        for (int64_t j = low; j < high; j += kRead) {
            read(at_ + j, smaller(kRead, high - j), true);
            for (int64_t r = 0; r < n; ++r) gather(scores[r] + j - low, values + r * width_);
        }
    }

   private:
    static constexpr int64_t kRead = 4;                       // positions read at once
    static constexpr int64_t kReadStride = kMaxHeadDim + 16;  // their rows on different cache lines

    // Keys or values of n positions, and zeros up to kRead.
    void read(int64_t position, int64_t n, bool values) {
        for (int64_t j = 0; j < n; ++j) read_one(position + j, values, read_[j]);
        for (int64_t j = n; j < kRead; ++j) memset(read_[j], 0, static_cast<size_t>(width_) * sizeof(float));
    }

    void read_one(int64_t position, bool values, float* __restrict out) const {
        const KvCache& c = *places_.a.cache;
        const KvLayout& l = places_.layout;
        const char* head = places_.block(position);
        const int64_t token = position % c.block_size;
        const int64_t first = values ? value_element(c, l, token, 0) : key_element(c, l, token, 0);
        const char* stored = values ? head + l.values : head;
        switch (static_cast<KvFormat>(c.format)) {
            case KvFormat::kFloat32:
                widen(reinterpret_cast<const float*>(stored) + first, values, [](float x) { return x; }, out);
                break;
            case KvFormat::kBfloat16:
                widen(reinterpret_cast<const uint16_t*>(stored) + first, values, from_bf16, out);
                break;
            case KvFormat::kInt8: {
                const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + l.scales);
                const float scale = from_bf16(scales[values ? c.block_size + token : token]);
                widen(
                    reinterpret_cast<const int8_t*>(stored) + first, values,
                    [scale](int8_t code) { return static_cast<float>(code) * scale; }, out);
                break;
            }
            case KvFormat::kInt4:
                values ? read_int4<true>(head, token, out) : read_int4<false>(head, token, out);
                break;
        }
    }

    template <bool kValues>
    void read_int4(const char* head, int64_t token, float* __restrict out) const {
        const KvCache& c = *places_.a.cache;
        const KvLayout& l = places_.layout;
        constexpr int64_t kRun = kValues ? 16 : 4;  // dims in low halves of bytes, those of the high halves behind them
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(kValues ? head + l.values : head);
        for (int64_t i = 0; i < c.head_dim; ++i) {
            const int64_t run = i / (2 * kRun), at = i % kRun * (kValues ? 2 : 1);
            const uint8_t both = codes[(kValues ? value_byte(l, token, run) : key_byte(c, token, run)) + at];
            const int code = i / kRun % 2 ? both >> 4 : both & 15;
            const float scale = from_bf16(int4_scales(c, l, head, kValues, i / kKvGroup)[token]);
            out[i] = static_cast<float>(code - 8) * scale;
        }
    }

    // The dims of one token: of values always `pair` elements apart, of keys `pair` together and then a row on.
    template <class Stored, class Value>
    void widen(const Stored* __restrict p, bool values, Value value, float* __restrict out) const {
        const int64_t dim = places_.a.cache->head_dim, pair = places_.layout.pair;
        const int64_t row = pair * places_.a.cache->block_size;
        if (values || pair == 1) {
            const int64_t step = values ? pair : row;
            for (int64_t i = 0; i < dim; ++i) out[i] = value(p[i * step]);
            return;
        }
        for (int64_t i = 0; i + 2 <= dim; i += 2) {
            out[i] = value(p[i / 2 * row]);
            out[i + 1] = value(p[i / 2 * row + 1]);
        }
        if (dim % 2) out[dim - 1] = value(p[dim / 2 * row]);
    }

    void score(const float* query, float* scores) const {
        Lanes products[kRead] = {};
        for (int64_t i = 0; i < width_; i += kLanes) {
            const Lanes asked = load(query + i);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kRead; ++j) products[j] = fma(asked, load(read_[j] + i), products[j]);
        }
        const Four four = sums(products);
        memcpy(scores, &four, sizeof four);
    }

    // Turn n scores into weights, and make room for what they weigh.
    void weigh(float* scores, int64_t n, Sums& mine, float* values) const {
        float highest = mine.highest;
        for (int64_t j = 0; j < n; ++j) highest = scores[j] > highest ? scores[j] : highest;
        for (int64_t j = n; j < round_up(n); ++j) scores[j] = -__builtin_inff();
        const Lanes fade = exp2(broadcast(mine.highest - highest));
        Lanes added = {};
        for (int64_t j = 0; j < n; j += kLanes) {
            const Lanes weights = exp2(load(scores + j) - highest);
            store(scores + j, weights);
            added += weights;
        }
        for (int64_t i = 0; i < width_; i += kLanes) store(values + i, load(values + i) * fade);
        mine.weights = fma(broadcast(mine.weights), fade, broadcast(sum(added)))[0];
        mine.highest = highest;
    }

    void gather(const float* weights, float* values) const {
        for (int64_t i = 0; i < width_; i += kLanes) {
            Lanes total = load(values + i);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kRead; ++j) total = fma(load(read_[j] + i), broadcast(weights[j]), total);
            store(values + i, total);
        }
    }

    Places places_;
    int64_t width_;
    int64_t at_ = 0;
    alignas(64) float queries_[kQueryValues];
    alignas(64) float read_[kRead][kReadStride];
};

}  // namespace
}  // namespace halve
