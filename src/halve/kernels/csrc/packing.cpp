// From a file's rows to the layout of packing.h. Runs once for each weight; speed matters a little (a billion weights
// in a second or two), generality more: the widths are template arguments, so that shifts are constants.
#include "packing.h"

#include <string.h>

namespace halve {
namespace {

float float_from(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Exact; subnormals, infinities and NaN too.
float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_from(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    const float value = float_from(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
}

// e4m3fn has no infinities, and 3 bits of mantissa, so that bf16 holds every value.
uint16_t bf16_from_float8(uint8_t byte) {
    const uint16_t sign = static_cast<uint16_t>((byte & 0x80) << 8);
    const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
    if (exponent == 15 && mantissa == 7) return sign | 0x7fc0;
    if (exponent) return static_cast<uint16_t>(sign | (exponent + 120) << 7 | mantissa << 4);
    if (!mantissa) return sign;
    const float value = static_cast<float>(mantissa) * 0x1p-9f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(sign | bits >> 16);
}

uint32_t word_at(const uint8_t* bytes, int64_t index) {
    uint32_t word;
    memcpy(&word, bytes + 4 * index, sizeof word);
    return word;
}

// 32 unsigned codes from `bits` words, first code in the lowest bits.
template <int bits>
void read_chunk(const uint8_t* words, uint8_t* codes) {
    uint64_t held = 0;
    int have = 0, next = 0;
    for (int i = 0; i < kChunk; ++i) {
        if (have < bits) {
            held |= static_cast<uint64_t>(word_at(words, next++)) << have;
            have += 32;
        }
        codes[i] = static_cast<uint8_t>(held & ((1u << bits) - 1));
        held >>= bits;
        have -= bits;
    }
}

template <>
void read_chunk<8>(const uint8_t* bytes, uint8_t* codes) {
    for (int i = 0; i < kChunk; ++i) codes[i] = bytes[i] ^ 0x80;
}

// The 32 codes of output `lane` into the planes of a chunk that was zeroed.
template <int bits>
void write_chunk(const uint8_t* codes, uint8_t* chunk, int64_t lane) {
    uint8_t* at = chunk + lane_offset(bits, lane);
    int low = 0;
    const auto plane = [&](int width) {
        const int per_byte = 8 / width, mask = (1 << width) - 1;
        for (int quad = 0; quad < 8; ++quad) {
            uint8_t* to = at + quad / per_byte * kStep;
            const int shift = quad % per_byte * width;
            for (int j = 0; j < 4; ++j) to[j] |= static_cast<uint8_t>((codes[4 * quad + j] >> low & mask) << shift);
        }
        at += 8 / per_byte * kStep;
        low += width;
    };
    if (bits == 8) return plane(8);
    if (bits & 4) plane(4);
    if (bits & 2) plane(2);
    if (bits & 1) plane(1);
}

template <int bits>
void pack_chunks(const Stored& from, const Packed& to, uint8_t* block, int64_t output, int64_t lane) {
    const int64_t k = from.in_features;
    const int64_t row_bytes = bits == 8 ? k : ceil_div(k * bits, 32) * 4;
    const uint8_t* row = static_cast<const uint8_t*>(from.codes) + output * row_bytes;
    for (int64_t chunk = 0; chunk * kChunk < k; ++chunk) {
        const int64_t left = k - chunk * kChunk;
        uint8_t codes[kChunk], tail[kChunk] = {};
        const uint8_t* words = row + chunk * kChunk * bits / 8;
        if (left < kChunk) {  // a row may end midway: read no further
            memcpy(tail, words, static_cast<size_t>(row_bytes - chunk * kChunk * bits / 8));
            words = tail;
        }
        read_chunk<bits>(words, codes);
        for (int64_t i = left; i < kChunk; ++i) codes[i] = 1 << (bits - 1);
        write_chunk<bits>(codes, block + chunk_offset(to, chunk), lane);
    }
}

template <int bits>
void pad_chunks(const Packed& to, uint8_t* block, int64_t lane) {
    uint8_t codes[kChunk];
    memset(codes, 1 << (bits - 1), sizeof codes);
    for (int64_t chunk = 0; chunk * kChunk < to.in_features; ++chunk) {
        write_chunk<bits>(codes, block + chunk_offset(to, chunk), lane);
    }
}

template <int bits>
void pack_integers(const Stored& from, const Packed& to, uint8_t* block, int64_t first) {
    for (int64_t lane = 0; lane < kBlock; ++lane) {
        if (first + lane < from.out_features) {
            pack_chunks<bits>(from, to, block, first + lane, lane);
        } else {
            pad_chunks<bits>(to, block, lane);
        }
    }
}

uint16_t half_at(const void* values, int64_t index) {
    uint16_t half;
    memcpy(&half, static_cast<const uint8_t*>(values) + 2 * index, sizeof half);
    return half;
}

float scale_at(const Stored& from, int64_t index) {
    switch (static_cast<StoredKind>(from.scale_kind)) {
        case StoredKind::kBfloat16:
            return float_from(static_cast<uint32_t>(half_at(from.scale, index)) << 16);
        case StoredKind::kFloat16:
            return from_float16(half_at(from.scale, index));
        default:
            return float_from(word_at(static_cast<const uint8_t*>(from.scale), index));
    }
}

void pack_scales(const Stored& from, const Packed& to, uint8_t* block, int64_t first) {
    const int64_t groups = to.group ? to.in_features / to.group : 1;
    for (int64_t group = 0; group < groups; ++group) {
        uint8_t* head = block + (to.group ? scale_offset(to, group * to.group / kChunk) : 0);
        for (int64_t lane = 0; lane < kBlock && first + lane < from.out_features; ++lane) {
            const int64_t index = (first + lane) * groups + group;
            if (to.scale_bytes == 2) {
                const uint16_t half = half_at(from.scale, index);
                memcpy(head + 2 * lane, &half, sizeof half);
            } else {
                const float value = scale_at(from, index);
                memcpy(head + 4 * lane, &value, sizeof value);
            }
        }
    }
}

void pack_floats(const Stored& from, const Packed& to, uint8_t* block, int64_t first) {
    uint8_t* body = block + head_bytes(to);
    const int64_t k = from.in_features;
    for (int64_t lane = 0; lane < kBlock && first + lane < from.out_features; ++lane) {
        const int64_t row = (first + lane) * k;
        for (int64_t i = 0; i < k; ++i) {
            if (to.kind == Kind::kFloat32) {
                const uint32_t value = word_at(static_cast<const uint8_t*>(from.codes), row + i);
                memcpy(body + 4 * (i * kBlock + lane), &value, sizeof value);
                continue;
            }
            const uint16_t value = from.kind == static_cast<int32_t>(StoredKind::kFloat8)
                                       ? bf16_from_float8(static_cast<const uint8_t*>(from.codes)[row + i])
                                       : half_at(from.codes, row + i);
            const int64_t at = to.kind == Kind::kBfloat16 ? (i / 2 * kBlock + lane) * 2 + i % 2 : i * kBlock + lane;
            memcpy(body + 2 * at, &value, sizeof value);
        }
    }
}

}  // namespace

int64_t plan_packing(const Stored& from, Packed* to) {
    to->out_features = from.out_features;
    to->in_features = from.in_features;
    to->group = from.group;
    to->data = nullptr;
    to->bits = from.bits;
    to->scale_bytes = !from.scale ? 0 : from.scale_kind == static_cast<int32_t>(StoredKind::kBfloat16) ? 2 : 4;
    const int64_t k = from.in_features;
    int64_t body = 0;
    switch (static_cast<StoredKind>(from.kind)) {
        case StoredKind::kInt:
            to->kind = Kind::kInt;
            body = ceil_div(k, kChunk) * chunk_bytes(*to) + (from.group ? (k / from.group - 1) * head_bytes(*to) : 0);
            break;
        case StoredKind::kBfloat16:
        case StoredKind::kFloat8:
            to->kind = Kind::kBfloat16;
            body = ceil_div(k, 2) * 4 * kBlock;
            break;
        case StoredKind::kFloat16:
            to->kind = Kind::kFloat16;
            body = k * 2 * kBlock;
            break;
        case StoredKind::kFloat32:
            to->kind = Kind::kFloat32;
            body = k * 4 * kBlock;
            break;
    }
    to->block_bytes = head_bytes(*to) + body;
    return to->block_bytes * blocks_of(*to);
}

void pack_blocks(const Stored& from, const Packed& to, uint8_t* out, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
        uint8_t* block = out + b * to.block_bytes;
        memset(block, 0, static_cast<size_t>(to.block_bytes));
        if (from.scale) pack_scales(from, to, block, b * kBlock);
        if (to.kind != Kind::kInt) {
            pack_floats(from, to, block, b * kBlock);
            continue;
        }
        switch (to.bits) {
            case 2:
                pack_integers<2>(from, to, block, b * kBlock);
                break;
            case 3:
                pack_integers<3>(from, to, block, b * kBlock);
                break;
            case 4:
                pack_integers<4>(from, to, block, b * kBlock);
                break;
            case 5:
                pack_integers<5>(from, to, block, b * kBlock);
                break;
            case 6:
                pack_integers<6>(from, to, block, b * kBlock);
                break;
            default:
                pack_integers<8>(from, to, block, b * kBlock);
        }
    }
}

}  // namespace halve
