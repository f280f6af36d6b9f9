// The paged cache of one layer: how a block lies in memory.
//
// A block holds P tokens, head after head; of each head, with x = 2 tokens or dims side by side (1 in fp32):
//
//     keys    [ceil(D / x)][P][x]     tokens lie in the lanes of a vector: a score needs no sum across lanes
//     values  [ceil(P / x)][D][x]     dims lie in the lanes: neither does a weighted sum
//     scales  bf16 [2][P]             int8 only: of the keys, then of the values
//
// in fp32, bf16 or int8; in int4, where two numbers share a byte, the first of them in its low half:
//
//     keys    [ceil(D / 8)][P][4]           dim 8 i + j beside dim 8 i + 4 + j: a vector gives quads of two runs of
//     dims values  [ceil(P / 2)][groups][16][2]  dim 32 g + j beside dim 32 g + 16 + j: pairs of tokens of two vectors
//     of dims scales  bf16 [2][groups][P]           of the keys, then of the values; groups of kKvGroup dims, ceil(D /
//     32)
//
// so that no two tokens share a byte. All is rounded up to kAlign bytes. A pair of 16-bit numbers is what one lane of a
// product of pairs takes; int8 is widened on the way.
//
// int8: scale = absmax / 127 rounded to bf16, one a token and head for keys and one for values; code = x / scale
// rounded to nearest even, within -127..127. A scale below 2^-126 is 0, and so are its codes; one that is not finite is
// NaN. Error of an element: at most scale / 2, and absmax where that is below 2^-119.
//
// int4: keys are rotated by the orthonormal Walsh-Hadamard matrix first (rotation.h), as queries are when they are
// read. scale = m / -8 rounded to bf16, m the number of largest magnitude of a group of dims (of both signs the
// positive one); code = x / scale rounded to nearest even, within -8..7, stored as code + 8. Scales that are too small
// or not finite as above. Error of an element: at most |scale| / 2, |scale| where it has the other sign and m's
// magnitude, and |m| where that is below 2^-123.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace halve {
namespace {

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kAlign = 64;
constexpr int64_t kKvGroup = 32;  // dims of a head that share a scale in int4

struct KvLayout {
    int64_t pair;     // x above
    int64_t element;  // bytes
    int64_t values;   // byte of a head's part where they start
    int64_t scales;
    int64_t head;    // bytes of a head's part
    int64_t groups;  // of int4
};

inline KvLayout layout_of(const KvCache& c) {
    const bool wide = c.format == static_cast<int32_t>(KvFormat::kFloat32);
    const bool int8 = c.format == static_cast<int32_t>(KvFormat::kInt8);
    KvLayout l;
    l.groups = parts(c.head_dim, kKvGroup);
    if (c.format == static_cast<int32_t>(KvFormat::kInt4)) {
        l.pair = l.element = 1;  // that no division by them fails; int4 has offsets of its own
        l.values = parts(c.head_dim, 8) * 4 * c.block_size;
        l.scales = l.values + parts(c.block_size, 2) * l.groups * kKvGroup;
        l.head = parts(l.scales + 2 * l.groups * c.block_size * 2, kAlign) * kAlign;
        return l;
    }
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

// The same in int4, in bytes: of keys the byte of dim 8 i of a token, of values that of dim 32 g.
inline int64_t key_byte(const KvCache& c, int64_t token, int64_t i) { return (i * c.block_size + token) * 4; }
inline int64_t value_byte(const KvLayout& l, int64_t token, int64_t g) {
    return (token / 2 * l.groups + g) * kKvGroup + token % 2;
}

// Where the scales of one group of dims lie, of all tokens of a block.
inline uint16_t* int4_scales(const KvCache& c, const KvLayout& l, char* head, bool values, int64_t g) {
    return reinterpret_cast<uint16_t*>(head + l.scales) + ((values ? l.groups : 0) + g) * c.block_size;
}
inline const uint16_t* int4_scales(const KvCache& c, const KvLayout& l, const char* head, bool values, int64_t g) {
    return int4_scales(c, l, const_cast<char*>(head), values, g);
}

}  // namespace
}  // namespace halve
