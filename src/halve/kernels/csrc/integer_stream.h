// Sums of a block of 64 outputs of an integer matrix with rows of int8 activations on AVX-512 VNNI: tiles that multiply
// straight from the packed stream.
//
// A tile holds the sums of all 64 outputs for a strip of rows in registers, so that the stream is read in the order in
// which it lies in memory: from there at memory's rate while there is one strip, else from the cache, where it comes in
// panels that every strip reads in turn. Unpacking 4 bits takes 3 instructions for 2 quads, on other ports than dot
// products: for 3 rows or more it is free. Other widths are unpacked once a panel, as are 4 bits for many rows.
#pragma once

#include "amx_tiles.h"
#include "integer_vectors.h"
#include "packed_scales.h"

#if defined(__AVX512VNNI__)

namespace halve {
namespace {

// Scaled sums lie in registers beside the integer sums of the run; with one scale a row there are only the latter.
constexpr int kScaledRows = 3, kRawRows = 6;
constexpr int64_t kPanelBytes = 16384;  // half of the first-level cache
constexpr int64_t kUnpackedRows = 64;   // of 4 bits: from here on a panel is worth unpacking
constexpr int64_t kAhead = 4096;        // bytes to fetch ahead: hardware prefetch stops at the end of a 4 KiB page

// What a tile multiplies: whole groups of a block's stream with the activations of a strip of rows.
struct Stretch {
    const uint8_t* stream;       // where the first group's scales begin, or the codes where there is one scale a row
    int64_t groups, chunks;      // groups of so many chunks each
    int64_t head;                // bytes of a group's scales
    const uint8_t* activations;  // codes of the strip's first row at the first input
    int64_t row_bytes;           // from one row of activations to the next
    const int32_t* starts;       // [rows, start_stride] where the sums of each group begin; not read where raw
    int64_t start_stride;
    const uint8_t* ahead;  // what comes next, to be fetched meanwhile,
    int64_t ahead_bytes;   // so many in each chunk
};

// Quads q.. of a chunk for the vectors of outputs [from, to) against the same quads of the strip.
template <int bits, int rows, int from, int to, int q = 0>
__attribute__((always_inline)) inline void dot_quads(const uint8_t* chunk, const uint8_t* activations,
                                                     int64_t row_bytes, Vec (&sum)[rows][kVecs]) {
    if constexpr (q < 8) {
        Vec quad[kVecs];
#pragma GCC unroll 4
        for (int c = from; c < to; ++c) {
            quad[c] = quad_of<bits, q>(chunk + lane_offset(bits, c * kVecOutputs));
            if constexpr (rows > 1) asm volatile("" : "+v"(quad[c]));  // else gcc loads it again for every row
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec asked = broadcast_vec(int_at(activations + r * row_bytes + 4 * q));
#pragma GCC unroll 4
            for (int c = from; c < to; ++c) sum[r][c] = dot(sum[r][c], quad[c], asked);
        }
        dot_quads<bits, rows, from, to, q + 1>(chunk, activations, row_bytes, sum);
    }
}

// One chunk of the stream; for a single row line after line, which memory likes best.
template <int bits, int rows>
__attribute__((always_inline)) inline void dot_chunk(const uint8_t* chunk, const uint8_t* activations,
                                                     int64_t row_bytes, Vec (&sum)[rows][kVecs]) {
    if constexpr (rows > 1) {
        dot_quads<bits, rows, 0, kVecs>(chunk, activations, row_bytes, sum);
    } else {
        dot_quads<bits, rows, 0, 1>(chunk, activations, row_bytes, sum);
        dot_quads<bits, rows, 1, 2>(chunk, activations, row_bytes, sum);
        dot_quads<bits, rows, 2, 3>(chunk, activations, row_bytes, sum);
        dot_quads<bits, rows, 3, 4>(chunk, activations, row_bytes, sum);
    }
}

// sums [rows][64] += the strip times the stretch. raw: one scale a row, so that sums are integers all the way.
// alone: no other strip reads the stretch, which comes from memory.
template <int bits, int rows, bool raw, bool alone>
HALVE_HOT void hot_stretch(const Packed& w, const Stretch& s, float* sums) {
    const uint8_t* at = s.stream;
    const uint8_t* activations = s.activations;
    const uint8_t* ahead = s.ahead;
    const int64_t row_bytes = s.row_bytes;
    Lanes total[rows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kVecs; ++c) total[r][c] = load(sums + r * kBlock + c * kVecOutputs);
    }
    for (int64_t group = 0; group < s.groups; ++group) {
        const uint8_t* scales = at;
        at += s.head;
        Vec sum[rows][kVecs];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec start = raw ? Vec{} : broadcast_vec(s.starts[r * s.start_stride + group]);
#pragma GCC unroll 4
            for (int c = 0; c < kVecs; ++c) sum[r][c] = raw ? (Vec)total[r][c] : start;
        }
        if constexpr (alone) {
            for (int64_t i = 0; i < s.head; i += 64) __builtin_prefetch(scales + kAhead + i, 0, 3);
        }
        for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
            if constexpr (alone) {
#pragma GCC unroll 32
                for (int i = 0; i < bits * kBlock * 4; i += 64) __builtin_prefetch(at + kAhead + i, 0, 3);
            } else {
                for (const uint8_t* end = ahead + s.ahead_bytes; ahead < end; ahead += 64) {
                    __builtin_prefetch(ahead, 0, 2);
                }
            }
            dot_chunk<bits, rows>(at, activations, row_bytes, sum);
            at += bits * kBlock * 4;
            activations += kChunk;
        }
#pragma GCC unroll 4
        for (int c = 0; c < kVecs; ++c) {
            const Lanes scale = raw ? Lanes{} : scales_of(w, scales, c * kVecOutputs);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                total[r][c] = raw ? (Lanes)sum[r][c] : fma(to_floats(sum[r][c]), scale, total[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kVecs; ++c) store(sums + r * kBlock + c * kVecOutputs, total[r][c]);
    }
}

// The most rows of a strip that reads the stream alone. Unpacking a plane of one bit takes registers of its own.
template <int bits, bool raw>
constexpr int alone_rows = raw        ? kRawRows
                           : bits % 2 ? 2
                                      : kScaledRows;

template <int bits, bool raw, bool alone>
inline void run_stretch(int64_t rows, const Packed& w, const Stretch& s, float* sums) {
    typedef void (*Tile)(const Packed&, const Stretch&, float*);
    if constexpr (raw) {
        static constexpr Tile tiles[kRawRows] = {hot_stretch<bits, 1, raw, alone>, hot_stretch<bits, 2, raw, alone>,
                                                 hot_stretch<bits, 3, raw, alone>, hot_stretch<bits, 4, raw, alone>,
                                                 hot_stretch<bits, 5, raw, alone>, hot_stretch<bits, 6, raw, alone>};
        tiles[rows - 1](w, s, sums);
    } else {
        constexpr int most = alone ? alone_rows<bits, raw> : kScaledRows;
        static constexpr Tile tiles[kScaledRows] = {hot_stretch<bits, 1, raw, alone>, hot_stretch<bits, 2, raw, alone>,
                                                    hot_stretch<bits, most, raw, alone>};
        tiles[rows - 1](w, s, sums);
    }
}

template <int bits, int line = 0>
__attribute__((always_inline)) inline void widen_chunk(const uint8_t* from, uint8_t* to) {
    if constexpr (line < 8 * kVecs) {
        constexpr int output = line / 8 * kVecOutputs, q = line % 8;
        store_vec(to + lane_offset(8, output) + q * kStep, quad_of<bits, q>(from + lane_offset(bits, output)));
        widen_chunk<bits, line + 1>(from, to);
    }
}

// The stretch as a stream of 8-bit codes.
template <int bits>
void widen_stretch(const Stretch& s, uint8_t* to) {
    const uint8_t* from = s.stream;
    for (int64_t group = 0; group < s.groups; ++group) {
        memcpy(to, from, static_cast<size_t>(s.head));
        from += s.head;
        to += s.head;
        for (int64_t chunk = 0; chunk < s.chunks; ++chunk, from += bits * kBlock * 4, to += 8 * kBlock * 4) {
            widen_chunk<bits>(from, to);
        }
    }
}

// sums [rows][64] of a block, scaled group by group, or as integers where there is one scale a row (`raw`).
template <int bits, bool raw>
void integer_sums(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows,
                  float* sums) {
#if defined(HALVE_AMX)
    if (rows >= fewest_tiled(w)) return tiled_sums<bits, raw>(w, block, x, first, rows, sums);
#endif
    const int64_t inputs = padded_inputs(w), group = raw ? inputs : w.group;
    const int64_t strips = ceil_div(rows, raw ? kRawRows : kScaledRows);
    Stretch s = {};
    s.head = raw ? 0 : head_bytes(w);
    s.row_bytes = x.code_stride;
    s.start_stride = x.start_stride;
    s.stream = block + (raw ? head_bytes(w) : 0);
    if (rows <= alone_rows<bits, raw>) {
        s.groups = inputs / group;
        s.chunks = group / kChunk;
        s.activations = codes_at(x, false, first, 0);
        s.starts = x.starts + first * x.start_stride;
        return run_stretch<bits, raw, true>(rows, w, s, sums);
    }
    constexpr int64_t most = kPanelBytes / kBlock;                        // inputs of a panel
    alignas(64) uint8_t panel[kPanelBytes + most / kChunk * kBlock * 4];  // with scales of 4 bytes for groups of 32
    const bool widened = bits != 8 && (bits != 4 || rows >= kUnpackedRows);
    const uint8_t* stream = s.stream;
    for (int64_t input = 0; input < inputs; input += most) {
        const int64_t span = least(most, inputs - input);
        s.groups = raw ? 1 : span / group;
        s.chunks = raw ? span / kChunk : group / kChunk;
        s.stream = stream;
        stream += s.groups * (s.head + s.chunks * (bits * kBlock * 4));
        s.ahead = stream;
        s.ahead_bytes = ceil_div(ceil_div(stream - s.stream, strips * s.groups * s.chunks), 64) * 64;
        if (widened) {
            widen_stretch<bits>(s, panel);
            s.stream = panel;
        }
        for (int64_t strip = 0, row = 0; strip < strips; ++strip) {
            const int64_t now = ceil_div(rows - row, strips - strip);
            s.activations = codes_at(x, false, first + row, input);
            s.starts = x.starts + (first + row) * x.start_stride + (raw ? 0 : input / group);
            if (widened) {
                run_stretch<8, raw, false>(now, w, s, sums + row * kBlock);
            } else if constexpr (bits == 4 || bits == 8) {
                run_stretch<bits, raw, false>(now, w, s, sums + row * kBlock);
            }
            s.ahead += s.ahead_bytes * s.groups * s.chunks;
            row += now;
        }
    }
}

}  // namespace
}  // namespace halve

#endif
