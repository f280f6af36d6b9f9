// The paged cache of one layer: how a block lies in memory.
//
// A block holds P tokens, head after head; of each head, with x = 2 tokens or dims side by side (1 in fp32):
//
//     keys    [ceil(D / x)][P][x]     tokens lie in the lanes of a vector: a score needs no sum across lanes
//     values  [ceil(P / x)][D][x]     dims lie in the lanes: neither does a weighted sum
//     scales  bf16 [2][P]             int8 only: of the keys, then of the values
//
// in fp32, bf16 or int8, rounded up to kAlign bytes. A pair of 16-bit numbers is what one lane of a product of pairs
// takes; int8 is widened on the way.
//
// int8: scale = absmax / 127 rounded to bf16, one a token and head for keys and one for values; code = x / scale
// rounded to nearest even, within -127..127. A scale below 2^-126 is 0, and so are its codes; one that is not finite is
// NaN. Error of an element: at most scale / 2, and absmax where that is below 2^-119.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace halve {
namespace {

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kAlign = 64;

struct KvLayout {
    int64_t pair;     // x above
    int64_t element;  // bytes
    int64_t values;   // byte of a head's part where they start
    int64_t scales;
    int64_t head;  // bytes of a head's part
};

inline KvLayout layout_of(const KvCache& c) {
    const bool wide = c.format == static_cast<int32_t>(KvFormat::kFloat32);
    const bool int8 = c.format == static_cast<int32_t>(KvFormat::kInt8);
    KvLayout l;
    l.pair = wide ? 1 : 2;
    l.element = wide ? 4 : int8 ? 1 : 2;
    l.values = parts(c.head_dim, l.pair) * l.pair * c.block_size * l.element;
    l.scales = l.values + parts(c.block_size, l.pair) * l.pair * c.head_dim * l.element;
    l.head = parts(l.scales + (int8 ? 2 * c.block_size * 2 : 0), kAlign) * kAlign;
    return l;
}

inline int64_t kv_block_bytes(const KvCache& c) { return c.num_kv_heads * layout_of(c).head; }

inline char* head_at(const KvCache& c, const KvLayout& l, int64_t block, int64_t head) {
    return static_cast<char*>(c.data) + (block * c.num_kv_heads + head) * l.head;
}

// Where element (token, dim) lies among a head's keys or values.
inline int64_t key_element(const KvCache& c, const KvLayout& l, int64_t token, int64_t dim) {
    return (dim / l.pair * c.block_size + token) * l.pair + dim % l.pair;
}
inline int64_t value_element(const KvCache& c, const KvLayout& l, int64_t token, int64_t dim) {
    return (token / l.pair * c.head_dim + dim) * l.pair + token % l.pair;
}

}  // namespace
}  // namespace halve
