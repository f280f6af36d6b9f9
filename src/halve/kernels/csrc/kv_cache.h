// Writing into the paged cache of one layer, whose layout kv_layout.h tells.
#pragma once

#include "attention_units.h"
#include "kv_layout.h"
#include "lanes.h"
#include "rotation.h"

namespace halve {
namespace {

// Rotate the pairs (i, i + D / 2) of one head, or copy it where cos is null.
inline void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t dim,
                   float* __restrict y) {
    if (!cos) {
        memcpy(y, x, static_cast<size_t>(dim) * sizeof(float));
        return;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cos[i] - x[i + half] * sin[i];
        y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
}

inline uint16_t round_int8(const float* __restrict x, int64_t n, int8_t* __restrict codes) {
    const uint16_t scale = to_bf16(absmax(x, n) / 127.0f);
    const float step = from_bf16(scale);
    const bool usable = step >= 0x1p-126f && step <= 3.4e38f;
    const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    for (int64_t i = 0; i < n; ++i) {
        float code = (x[i] / step + whole) - whole;
        code = code < -127.0f ? -127.0f : code;
        code = code > 127.0f ? 127.0f : code;
        codes[i] = static_cast<int8_t>(usable ? code : 0.0f);
    }
    return usable ? scale : step < 0x1p-126f ? 0 : 0x7fc0;
}

// Codes 0..15 of n numbers of one group, 8 for zero; the scale is returned.
inline uint16_t round_int4(const float* __restrict x, int64_t n, uint8_t* __restrict codes) {
    float high = x[0], low = x[0];
    for (int64_t i = 0; i < n; ++i) {
        high = x[i] > high ? x[i] : high;
        low = x[i] < low ? x[i] : low;
    }
    const uint16_t scale = to_bf16((high >= -low ? high : low) / -8.0f);
    const float step = from_bf16(scale), size = step < 0 ? -step : step;
    const bool number = absmax(x, n) <= 3.4e38f, usable = number && size >= 0x1p-126f && size <= 3.4e38f;
    const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    for (int64_t i = 0; i < n; ++i) {
        float code = (x[i] / step + whole) - whole;
        code = code < -8.0f ? -8.0f : code;
        code = code > 7.0f ? 7.0f : code;
        codes[i] = static_cast<uint8_t>(usable ? code + 8.0f : 8.0f);
    }
    return usable ? scale : number && size < 0x1p-126f ? 0 : 0x7fc0;
}

// Where one token of one head is written. Only its own bytes are touched: its neighbours may be written meanwhile.
struct Place {
    const KvCache& cache;
    const KvLayout& layout;
    char* head;
    int64_t token;  // in its block

    template <class Element>
    void put(const Element* keys, const Element* values) const {
        const int64_t dim = cache.head_dim;
        Element* k = reinterpret_cast<Element*>(head) + key_element(cache, layout, token, 0);
        Element* v = reinterpret_cast<Element*>(head + layout.values) + value_element(cache, layout, token, 0);
        if (layout.pair == 1) {
            for (int64_t i = 0; i < dim; ++i) k[i * cache.block_size] = keys[i];
            for (int64_t i = 0; i < dim; ++i) v[i] = values[i];
            return;
        }
        for (int64_t i = 0; i + 2 <= dim; i += 2) memcpy(k + i * cache.block_size, keys + i, 2 * sizeof(Element));
        if (dim % 2) k[(dim - 1) * cache.block_size] = keys[dim - 1];
        for (int64_t i = 0; i < dim; ++i) v[2 * i] = values[i];
    }

    // Keys, rotated, and values in int4; there is room for whole groups of them.
    void put_int4(const float* keys, const float* values) const {
        const int64_t dim = cache.head_dim;
        uint8_t codes[kMaxHeadDim + kKvGroup];
        uint8_t* k = reinterpret_cast<uint8_t*>(head);
        uint8_t* v = k + layout.values;
        codes_of(keys, false, codes);
        for (int64_t i = 0; i < parts(dim, 8); ++i) {
            uint8_t* at = k + key_byte(cache, token, i);
            for (int64_t j = 0; j < 4; ++j) at[j] = static_cast<uint8_t>(codes[8 * i + j] | codes[8 * i + 4 + j] << 4);
        }
        codes_of(values, true, codes);
        for (int64_t g = 0; g < layout.groups; ++g) {
            const uint8_t* from = codes + g * kKvGroup;
            uint8_t* at = v + value_byte(layout, token, g);
            for (int64_t j = 0; j < 16; ++j) at[2 * j] = static_cast<uint8_t>(from[j] | from[16 + j] << 4);
        }
    }

    void codes_of(const float* x, bool values, uint8_t* codes) const {
        for (int64_t g = 0; g < layout.groups; ++g) {
            const int64_t first = g * kKvGroup, n = smaller(kKvGroup, cache.head_dim - first);
            int4_scales(cache, layout, head, values, g)[token] = round_int4(x + first, n, codes + first);
            for (int64_t i = n; i < kKvGroup; ++i) codes[first + i] = 8;
        }
    }

    void scale(uint16_t of_keys, uint16_t of_values) const {
        uint16_t* scales = reinterpret_cast<uint16_t*>(head + layout.scales);
        scales[token] = of_keys;
        scales[cache.block_size + token] = of_values;
    }
};

inline void put_rounded(const Place& place, float* keys, const float* values) {
    const int64_t dim = place.cache.head_dim;
    switch (static_cast<KvFormat>(place.cache.format)) {
        case KvFormat::kFloat32:
            place.put(keys, values);
            break;
        case KvFormat::kBfloat16: {
            uint16_t k[kMaxHeadDim], v[kMaxHeadDim];
            for (int64_t i = 0; i < dim; ++i) k[i] = to_bf16(keys[i]);
            for (int64_t i = 0; i < dim; ++i) v[i] = to_bf16(values[i]);
            place.put(k, v);
            break;
        }
        case KvFormat::kInt8: {
            int8_t k[kMaxHeadDim], v[kMaxHeadDim];
            place.scale(round_int8(keys, dim, k), round_int8(values, dim, v));
            place.put(k, v);
            break;
        }
        case KvFormat::kInt4:
            hadamard(keys, dim);
            place.put_int4(keys, values);
            break;
    }
}

void kv_write(const KvWrite& w, int64_t unit) {
    const KvCache& cache = *w.cache;
    const KvLayout layout = layout_of(cache);
    const int64_t dim = cache.head_dim, head = unit % cache.num_kv_heads;
    const int64_t first = unit / cache.num_kv_heads * kWriteTokens;
    alignas(64) float key[kMaxHeadDim];
    for (int64_t t = first; t < smaller(first + kWriteTokens, w.batch->num_tokens); ++t) {
        const int64_t slot = w.batch->slot_mapping[t], angles = t * (dim / 2);
        rotate(w.k + t * w.k_stride + head * dim, w.cos ? w.cos + angles : nullptr, w.cos ? w.sin + angles : nullptr,
               dim, key);
        const Place place = {cache, layout, head_at(cache, layout, slot / cache.block_size, head),
                             slot % cache.block_size};
        put_rounded(place, key, w.v + t * w.v_stride + head * dim);
    }
}

void copy_block(const BlockCopies& w, int64_t unit) {
    const int64_t bytes = kv_block_bytes(*w.cache);
    char* data = static_cast<char*>(w.cache->data);
    memcpy(data + w.pairs[2 * unit + 1] * bytes, data + w.pairs[2 * unit] * bytes, static_cast<size_t>(bytes));
}

}  // namespace
}  // namespace halve
