// A block of 64 outputs of an integer matrix times rows of int8 activations, from one packed form for any row count.
//
// Up to kFewRows rows (decode) the planes are unpacked in registers and used at once: the loop reads the weight stream
// once and waits for memory. More rows (prefill, batches) share a panel: kPanelInputs inputs of the block are unpacked
// to bytes that stay in the first-level cache, and every strip of rows multiplies them there, at the rate of the dot
// products; meanwhile the next panel's stream is fetched.
#pragma once

#include "integer_tiles.h"
#include "packed_scales.h"
#include "products.h"

#if defined(HALVE_INTEGER_TILES)

namespace halve {
namespace {

constexpr int kFewRows = 4;
// Bytes to fetch ahead: hardware prefetch stops at the end of a 4 KiB page.
constexpr int64_t kAhead = 1536;

// Codes of one row at an input, as the tiles read them.
inline const uint8_t* codes_at(const Activations& x, bool wide, int64_t row, int64_t input) {
    const int64_t at = row * x.code_stride + input;
    return wide ? reinterpret_cast<const uint8_t*>(x.wide + at) : reinterpret_cast<const uint8_t*>(x.codes + at);
}

// Quads `from` to `to` of a chunk against the same quads of a few rows.
template <int bits, int rows, int from, int to>
inline void dot_quads(const uint8_t* weights, const uint8_t* const (&activations)[rows], int64_t input,
                      Vec (&sum)[rows]) {
    if constexpr (from < to) {
        const Vec quad = quad_of<bits, from>(weights);
        if constexpr (kSixteenBit && bits == 8) {
            const Vec even = quad & broadcast_vec(0x00ff00ff), odd = shifted_right<8>(quad);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                const uint8_t* at = activations[r] + 2 * (input + 4 * from);
                sum[r] = dot_pair(sum[r], even, broadcast_vec(int_at(at)));
                sum[r] = dot_pair(sum[r], odd, broadcast_vec(int_at(at + 4)));
            }
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                sum[r] = dot(sum[r], quad, broadcast_vec(int_at(activations[r] + input + 4 * from)));
            }
        }
        dot_quads<bits, rows, from + 1, to>(weights, activations, input, sum);
    }
}

// sums [rows][64] of a block for up to kFewRows rows, scaled group by group, or as integers where there is one scale a
// row. The order of additions is that of hot_tile.
template <int bits, int rows>
HALVE_HOT void few_rows(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, float* sums) {
    constexpr bool wide = kSixteenBit && bits == 8;
    constexpr int runs_a_chunk = kSixteenBit && bits == 6 ? 2 : 1;
    const bool raw = !w.group;
    const int64_t inputs = padded_inputs(w), group = raw ? inputs : w.group;
    const int64_t span = raw ? kChunk : x.run < kChunk ? kChunk : x.run;
    const int64_t span_bytes = span / kChunk * (bits * kBlock * 4), head = head_bytes(w);
    const uint8_t* activations[rows];
    const int32_t* starts[rows];
    for (int r = 0; r < rows; ++r) {
        activations[r] = codes_at(x, wide, first + r, 0);
        starts[r] = x.starts + (first + r) * x.start_stride;
    }
    const uint8_t* at = block;
    int64_t run = 0;
    for (int64_t input = 0; input < inputs;) {
        const uint8_t* scales = at;
        at += head;
        for (const int64_t end = input + group; input < end;
             input += span, at += span_bytes, run += raw ? 0 : runs_a_chunk) {
            for (int64_t i = 0; i < span_bytes; i += 64) __builtin_prefetch(at + kAhead + i, 0, 3);
#pragma GCC unroll 1
            for (int c = 0; c < kVecs; ++c) {
                const uint8_t* weights = at + lane_offset(bits, c * kVecOutputs);
                const Lanes scale = raw ? Lanes{} : scales_of(w, scales, c * kVecOutputs);
                const auto finish = [&](Vec(&sum)[rows]) {
                    for (int r = 0; r < rows; ++r) {
                        float* to = sums + r * kBlock + c * kVecOutputs;
                        const Vec whole = wide ? sum[r] : finished(sum[r]);
                        if (raw) {
                            store_vec(to, add32(load_vec(to), whole));
                        } else {
                            store(to, fma(to_floats(whole), scale, load(to)));
                        }
                    }
                };
                Vec sum[rows];
                for (int r = 0; r < rows; ++r) sum[r] = broadcast_vec(raw ? 0 : starts[r][run]);
                if constexpr (runs_a_chunk == 2) {
                    dot_quads<bits, rows, 0, 4>(weights, activations, input, sum);
                    finish(sum);
                    for (int r = 0; r < rows; ++r) sum[r] = broadcast_vec(starts[r][run + 1]);
                    dot_quads<bits, rows, 4, 8>(weights, activations, input, sum);
                } else {
                    dot_quads<bits, rows, 0, 8>(weights, activations, input, sum);
#pragma GCC unroll 1
                    for (int64_t i = kChunk; i < span; i += kChunk) {
                        weights += bits * kBlock * 4;
                        dot_quads<bits, rows, 0, 8>(weights, activations, input + i, sum);
                    }
                }
                finish(sum);
            }
        }
    }
}

template <int bits, int q>
inline void unpack_quads(const uint8_t* at, uint8_t* to) {
    if constexpr (q < 8) {
        const Vec quad = quad_of<bits, q>(at);
        if constexpr (kSixteenBit && bits == 8) {
            store_vec(to + 2 * q * kPanelStep, quad & broadcast_vec(0x00ff00ff));
            store_vec(to + (2 * q + 1) * kPanelStep, shifted_right<8>(quad));
        } else {
            store_vec(to + q * kPanelStep, quad);
        }
        unpack_quads<bits, q + 1>(at, to);
    }
}

// Unpack a panel: inputs [first, first + inputs) of a block as [steps][64][4] bytes, and the scales of its runs.
template <int bits>
void unpack_panel(const Packed& w, const uint8_t* block, int64_t first, int64_t inputs, int64_t run, uint8_t* codes,
                  float* scales) {
    for (int64_t i = 0; i < inputs; i += kChunk) {
        const uint8_t* stream = block + chunk_offset(w, (first + i) / kChunk);
        for (int c = 0; c < kVecs; ++c)
            unpack_quads<bits, 0>(stream + lane_offset(bits, c * kVecOutputs), codes + c * sizeof(Vec));
        codes += (kSixteenBit && bits == 8 ? 16 : 8) * kPanelStep;
    }
    if (!w.group) return;
    for (int64_t i = 0; i < inputs; i += run, scales += kBlock) {
        read_scales(w, block + scale_offset(w, (first + i) / kChunk), scales);
    }
}

template <bool wide, bool raw>
void run_strip(int rows, const Panel& panel, float* sums) {
    constexpr int step = kTileVecs * kVecOutputs;
    typedef void (*Tiles)(const Panel&, int, float*);
    static constexpr Tiles tiles[kTileRows] = {hot_tile<1, wide, raw>, hot_tile<2, wide, raw>, hot_tile<3, wide, raw>,
                                               hot_tile<4, wide, raw>, hot_tile<5, wide, raw>, hot_tile<6, wide, raw>};
    Panel p = panel;
    for (int output = 0; output < kBlock; output += step) {
        tiles[rows - 1](p, output, sums);
        p.ahead += p.ahead_bytes * p.runs;
    }
}

// sums [rows][64] of a block, as few_rows.
template <int bits>
void many_rows(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows, float* sums) {
    constexpr bool wide = kSixteenBit && bits == 8;
    constexpr int64_t most = kPanelInputs;  // a multiple of every run
    alignas(64) uint8_t codes[kPanelInputs * kBlock * (wide ? 2 : 1)];
    alignas(64) float scales[kMaxRuns * kBlock];
    const int64_t inputs = padded_inputs(w), strips = ceil_div(rows, kTileRows);
    const bool raw = !w.group;
    for (int64_t input = 0; input < inputs; input += most) {
        const int64_t span = least(most, inputs - input), run = raw ? span : x.run;
        unpack_panel<bits>(w, block, input, span, run, codes, scales);
        Panel p = {};
        p.codes = codes;
        p.scales = scales;
        p.row_bytes = x.code_stride * (wide ? 2 : 1);
        p.start_stride = x.start_stride;
        p.runs = static_cast<int>(span / run);
        p.steps = static_cast<int>(run / (wide ? 2 : 4));
        p.ahead = block + (input + span < inputs ? chunk_offset(w, (input + span) / kChunk) : w.block_bytes);
        const int64_t next = most / kChunk * chunk_bytes(w), tiles = strips * (kVecs / kTileVecs) * p.runs;
        p.ahead_end = p.ahead + next;
        p.ahead_bytes = ceil_div(ceil_div(next, tiles), 64) * 64;
        for (int64_t strip = 0, row = 0; strip < strips; ++strip) {
            const int now = static_cast<int>(ceil_div(rows - row, strips - strip));
            p.activations = codes_at(x, wide, first + row, input);
            p.starts = x.starts + (first + row) * x.start_stride + (raw ? 0 : input / run);
            raw ? run_strip<wide, true>(now, p, sums + row * kBlock)
                : run_strip<wide, false>(now, p, sums + row * kBlock);
            p.ahead += p.ahead_bytes * (kVecs / kTileVecs) * p.runs;
            row += now;
        }
    }
}

template <int bits>
void integer_sums(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows,
                  float* sums) {
    switch (rows) {
        case 1:
            return few_rows<bits, 1>(w, block, x, first, sums);
        case 2:
            return few_rows<bits, 2>(w, block, x, first, sums);
        case 3:
            return few_rows<bits, 3>(w, block, x, first, sums);
        case 4:
            return few_rows<bits, 4>(w, block, x, first, sums);
        default:
            many_rows<bits>(w, block, x, first, rows, sums);
    }
}

// sums [rows][64]: the products of one block with rows [first, first + rows) of int8 activations.
void integer_block(const Packed& w, int64_t index, const Activations& x, int64_t first, int64_t rows, float* sums) {
    const uint8_t* block = w.data + index * w.block_bytes;
    for (int64_t r = 0; r < rows; ++r) {  // 0, or as integers all that the row's sums begin at
        const Vec start = broadcast_vec(w.group ? 0 : x.starts[(first + r) * x.start_stride]);
        for (int c = 0; c < kVecs; ++c) store_vec(sums + r * kBlock + c * kVecOutputs, start);
    }
    switch (w.bits) {
        case 2:
            integer_sums<2>(w, block, x, first, rows, sums);
            break;
        case 3:
            integer_sums<3>(w, block, x, first, rows, sums);
            break;
        case 4:
            integer_sums<4>(w, block, x, first, rows, sums);
            break;
        case 5:
            integer_sums<5>(w, block, x, first, rows, sums);
            break;
        case 6:
            integer_sums<6>(w, block, x, first, rows, sums);
            break;
        default:
            integer_sums<8>(w, block, x, first, rows, sums);
    }
    alignas(64) float scales[kBlock];
    if (!w.group) read_scales(w, block, scales);
    for (int64_t r = 0; r < rows; ++r) {
        const float scale = x.scale[first + r];
        for (int n = 0; n < kBlock; ++n) {
            float* at = sums + r * kBlock + n;
            *at = (w.group ? *at : static_cast<float>(static_cast<int32_t>(bits_of(*at))) * scales[n]) * scale;
        }
    }
}

}  // namespace
}  // namespace halve

#endif
