// Products with stored matrices, and rows of stored tables.
//
// A block of outputs is widened to float a stretch of inputs at a time, then multiplied with every activation row
// while it lies in the cache, so that the weight is read and widened once whatever the number of rows. Widening is
// exact: a code of 8 bits times a bf16 scale of 8 bits fits float's 24.
//
// The sum over inputs has one order, whatever the rows beside it and whatever the thread: within a stretch of kDepth
// inputs lane l takes inputs l, l + kLanes, ..., lanes are added as a tree, and stretches one after the other.
#pragma once

#include "lanes.h"
#include "rows.h"

namespace halve {
namespace {

constexpr int64_t kDepth = 1024;  // inputs of a stretch: kOutputBlock x kDepth floats stay in the second-level cache
constexpr int64_t kStride = kDepth + 16;  // of a staged row, so that rows do not fall on the same cache lines
constexpr int kTileRows = 6;
constexpr int64_t kFewOutputs = 4;  // staged at a time when one tile holds every row: they stay in the first level

inline void widen_int4(const uint8_t* bytes, float scale, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) {  // every group is a multiple of 32
        uint16_t pairs[16];
        for (int j = 0; j < 16; ++j) {
            const uint16_t byte = bytes[i / 2 + j];
            pairs[j] = static_cast<uint16_t>((byte | byte << 4) & 0x0f0f);  // low nibble in the low byte
        }
        uint8_t codes[32];
        memcpy(codes, pairs, sizeof codes);
        for (int j = 0; j < 32; ++j) out[i + j] = static_cast<float>(codes[j] - 8) * scale;
    }
}

inline void widen_int8(const int8_t* codes, float scale, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        for (int j = 0; j < 32; ++j) out[i + j] = static_cast<float>(codes[i + j]) * scale;
    }
    for (; i < n; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

// Inputs [begin, begin + n) of one row, a group or a part of it at a time.
inline void widen_integers(const Matrix& w, int64_t row, int64_t begin, int64_t n, float* out) {
    const int64_t at = row * w.in_features, end = begin + n;
    const int64_t group = begin / w.group;
    const uint16_t* scale = w.scale + row * (w.in_features / w.group) + group;
    int64_t group_end = (group + 1) * w.group;
    for (int64_t k = begin; k < end; ++scale, group_end += w.group) {
        const int64_t part = least(group_end, end) - k;
        if (w.kind == static_cast<int32_t>(Kind::kInt4)) {
            widen_int4(static_cast<const uint8_t*>(w.codes) + (at + k) / 2, from_bf16(*scale), out + k - begin, part);
        } else {
            widen_int8(static_cast<const int8_t*>(w.codes) + at + k, from_bf16(*scale), out + k - begin, part);
        }
        k += part;
    }
}

// Inputs [begin, begin + n) of one row as the floats that `Weight.dequantize` means.
void widen(const Matrix& w, int64_t row, int64_t begin, int64_t n, float* __restrict out) {
    const int64_t at = row * w.in_features + begin;
    switch (static_cast<Kind>(w.kind)) {
        case Kind::kFloat32:
            memcpy(out, static_cast<const float*>(w.codes) + at, static_cast<size_t>(n) * sizeof(float));
            break;
        case Kind::kFloat16: {
            const uint16_t* codes = static_cast<const uint16_t*>(w.codes) + at;
            for (int64_t i = 0; i < n; ++i) out[i] = from_half(codes[i]);
            break;
        }
        case Kind::kBfloat16: {
            const uint16_t* codes = static_cast<const uint16_t*>(w.codes) + at;
            for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(codes[i]);
            break;
        }
        case Kind::kInt4:
        case Kind::kInt8:
            widen_integers(w, row, begin, n, out);
            break;
    }
}

struct Stretch {
    const Linear* linear;
    const float* staged;  // [kOutputBlock, kStride], zero beyond the matrix
    int64_t first;        // output of staged row 0
    int64_t outputs;      // valid staged rows
    int64_t begin;        // input of staged column 0
    int64_t depth;        // valid staged columns
};

// R activation rows from `row` on, times C staged outputs from `output` on.
template <int R, int C>
inline void tile(const Stretch& s, int64_t row, int64_t output) {
    const int64_t inputs = s.linear->weight->in_features;
    const float* x = s.linear->x + row * inputs + s.begin;
    const float* w = s.staged + output * kStride;
    Lanes total[R * C] = {};
    const int64_t whole = s.depth / kLanes * kLanes;
    for (int64_t k = 0; k < whole; k += kLanes) {
        Lanes weights[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) weights[c] = load(w + c * kStride + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Lanes values = load(x + r * inputs + k);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) total[r * C + c] += values * weights[c];
        }
    }
    if (whole < s.depth) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Lanes values = load(x + r * inputs + whole, s.depth - whole);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) total[r * C + c] += values * load(w + c * kStride + whole);
        }
    }
    const int64_t valid = least(C, s.outputs - output);
    float added[R * C];
#pragma GCC unroll 8
    for (int i = 0; i + 4 <= R * C; i += 4) {
        const Four four = sums(total + i);
        memcpy(added + i, &four, sizeof four);
    }
#pragma GCC unroll 8
    for (int i = R * C / 4 * 4; i < R * C; ++i) added[i] = sum(total[i]);
    for (int r = 0; r < R; ++r) {
        float* y = s.linear->y + (row + r) * s.linear->weight->out_features + s.first + output;
        const float* bias = s.linear->bias ? s.linear->bias + s.first + output : nullptr;
        for (int c = 0; c < valid; ++c) {
            const float before = s.begin ? y[c] : bias ? bias[c] : 0.0f;
            y[c] = before + added[r * C + c];
        }
    }
}

template <int R>
void tiles(const Stretch& s, int64_t row) {
    // One row alone needs more sums at once to hide the latency of an addition.
    constexpr int kOutputs = R == 1 ? kFewOutputs : kTileOutputs;
    for (int64_t output = 0; output < s.outputs; output += kOutputs) tile<R, kOutputs>(s, row, output);
}

void multiply(const Stretch& s) {
    constexpr void (*kTiles[])(const Stretch&, int64_t) = {tiles<1>, tiles<2>, tiles<3>, tiles<4>, tiles<5>, tiles<6>};
    static_assert(sizeof kTiles / sizeof *kTiles == kTileRows);
    const int64_t rows = s.linear->rows;
    for (int64_t row = 0; row < rows;) {  // tiles as even as can be: 8 rows are 4 and 4, not 6 and 2
        const int64_t num_tiles = (rows - row + kTileRows - 1) / kTileRows;
        const int64_t taken = (rows - row + num_tiles - 1) / num_tiles;
        kTiles[taken - 1](s, row);
        row += taken;
    }
}

void linear(const Linear& a, int64_t block) {
    alignas(64) float staged[kOutputBlock * kStride];
    const Matrix& w = *a.weight;
    const int64_t begin = block * kOutputBlock, end = least(begin + kOutputBlock, w.out_features);
    const int64_t together = a.rows <= kTileRows ? kFewOutputs : kOutputBlock;
    if (end - begin < kOutputBlock) memset(staged, 0, sizeof staged);  // a tile reads past the last output
    for (int64_t first = begin; first < end; first += together) {
        Stretch s = {&a, staged, first, least(together, end - first), 0, 0};
        for (; s.begin < w.in_features; s.begin += kDepth) {
            s.depth = least(kDepth, w.in_features - s.begin);
            for (int64_t o = 0; o < s.outputs; ++o) {
                float* out = staged + o * kStride;
                widen(w, first + o, s.begin, s.depth, out);
                for (int64_t k = s.depth; k < round_up(s.depth); ++k) out[k] = 0.0f;
            }
            multiply(s);
        }
    }
}

void embed(const Embed& a, int64_t token) {
    const int64_t width = a.table->in_features;
    widen(*a.table, a.ids[token], 0, width, a.y + token * width);
}

}  // namespace
}  // namespace halve
