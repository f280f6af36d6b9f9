// A block of 64 outputs of an integer matrix times rows of int8 activations, from one packed form for any row count.
//
// Up to kFewRows rows (decode) the planes are unpacked in registers and used at once: the loop reads the weight stream
// once and waits for memory. More rows (prefill, batches) share a panel: 256 inputs of the block are unpacked to bytes
// that stay in the first-level cache, and every strip of rows multiplies them there, at the rate of the dot products;
// meanwhile the next panel's stream is fetched.
#pragma once

#include "integer_tiles.h"
#include "products.h"

#if defined(HALVE_INTEGER_TILES)

namespace halve {
namespace {

constexpr int kFewRows = 4;

inline bool is_wide(int bits) { return kSixteenBit && bits == 8; }

inline void read_scales(const Packed& w, const uint8_t* head, float* scales) {
    for (int n = 0; n < kBlock; ++n) {
        if (w.scale_bytes == 2) {
            uint16_t half;
            memcpy(&half, head + 2 * n, sizeof half);
            scales[n] = from_bf16(half);
        } else {
            memcpy(scales + n, head + 4 * n, sizeof *scales);
        }
    }
}

// Where the sums of each run of one row begin: minus the zero point times the activations of the run. Inputs `first`
// to `first + runs * quads * 4`, in `first`'s multiple of 32.
inline void run_starts(const Activations& x, int bits, int64_t row, int64_t first, int runs, int quads, int32_t* starts) {
    const int shift = bits - 1;
    if (kSixteenBit && bits < 8) {
        const int32_t* halves = x.halves + row * (x.code_stride / 16) + first / 16;
        const int each = quads / 4;
        for (int run = 0; run < runs; ++run, halves += each) {
            uint32_t even = 0, odd = 0;
            for (int i = 0; i < each; ++i) {
                even += static_cast<uint32_t>(halves[i]);
                odd += static_cast<uint32_t>(halves[i]) >> 16;
            }
            starts[run] = static_cast<int32_t>((even << shift & 0xffff) | odd << (16 + shift));
        }
        return;
    }
    const int32_t* sums = x.sums + row * (x.code_stride / kChunk) + first / kChunk;
    const int each = ceil_div(quads, 8);
    for (int run = 0; run < runs; ++run, sums += each) {
        uint32_t sum = 0;
        for (int i = 0; i < each; ++i) sum += static_cast<uint32_t>(sums[i]);
        starts[run] = static_cast<int32_t>(sum << shift);
    }
}

// Codes of one row at an input, as the tiles read them.
inline const uint8_t* codes_at(const Activations& x, bool wide, int64_t row, int64_t input) {
    const int64_t at = row * x.code_stride + input;
    return wide ? reinterpret_cast<const uint8_t*>(x.wide + at) : reinterpret_cast<const uint8_t*>(x.codes + at);
}

// One chunk of a vector's outputs against the same chunk of a few rows: quads [from, from + count) added to `sum`.
template <int bits, int rows, int from, int count>
inline void dot_chunk(const uint8_t* weights, const uint8_t* const (&activations)[rows], Vec (&sum)[rows]) {
    Vec quads[8];
    unpack<bits>(weights, quads);
#pragma GCC unroll 8
    for (int q = from; q < from + count; ++q) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
#if defined(__AVX512VNNI__)
            sum[r] = dot(sum[r], quads[q], broadcast_vec(int_at(activations[r] + 4 * q)));
#else
            if constexpr (bits == 8) {
                const Vec even = masked(quads[q], broadcast_vec(0x00ff00ff)), odd = shifted_right<8>(quads[q]);
                sum[r] = dot_pair(sum[r], even, broadcast_vec(int_at(activations[r] + 8 * q)));
                sum[r] = dot_pair(sum[r], odd, broadcast_vec(int_at(activations[r] + 8 * q + 4)));
            } else {
                sum[r] = dot(sum[r], quads[q], broadcast_vec(int_at(activations[r] + 4 * q)));
            }
#endif
        }
    }
}

// sums [rows][64] of a block for up to kFewRows rows, scaled group by group, or as integers where there is one scale a
// row. The order of additions is that of hot_tile.
template <int bits, int rows>
HALVE_HOT void few_rows(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, float* sums) {
    constexpr bool wide = kSixteenBit && bits == 8;
    constexpr int bytes = wide ? 2 : 1;
    const bool raw = !w.group;
    const int64_t inputs = padded_inputs(w);
    const int quads = run_quads(bits, w.group);
    const int64_t run_inputs = quads * 4;
    memset(sums, 0, rows * kBlock * sizeof(float));
    alignas(64) float scales[kBlock];
    const uint8_t* activations[rows];
    for (int r = 0; r < rows; ++r) activations[r] = codes_at(x, wide, first + r, 0);
    for (int64_t input = 0; input < inputs;) {
        // A span: whole runs under one head of scales, two of them in a chunk at 6 bits on AVX2.
        const int64_t span = least(run_inputs > kChunk ? run_inputs : kChunk, inputs - input);
        constexpr bool halved = kSixteenBit && bits == 6;
        int32_t starts[rows][2];
        for (int r = 0; r < rows; ++r) {
            run_starts(x, bits, first + r, input, halved ? 2 : 1, halved ? 4 : static_cast<int>(span / 4), starts[r]);
        }
        const int64_t chunk = input / kChunk;
        const uint8_t* stream = block + chunk_offset(w, chunk);
        if (!raw) read_scales(w, block + scale_offset(w, chunk), scales);
        for (int c = 0; c < kVecs; ++c) {
            const uint8_t* at = stream + c * sizeof(Vec);
#pragma GCC unroll 2
            for (int half = 0; half < (halved ? 2 : 1); ++half) {
                Vec sum[rows];
                for (int r = 0; r < rows; ++r) sum[r] = broadcast_vec(starts[r][half]);
                if constexpr (halved) {
                    if (half == 0) {
                        dot_chunk<bits, rows, 0, 4>(at, activations, sum);
                    } else {
                        dot_chunk<bits, rows, 4, 4>(at, activations, sum);
                    }
                } else {
                    const uint8_t* moved[rows];
                    for (int r = 0; r < rows; ++r) moved[r] = activations[r];
                    for (int64_t i = 0; i < span; i += kChunk) {
                        dot_chunk<bits, rows, 0, 8>(at + i / kChunk * (bits * kStep), moved, sum);
                        for (int r = 0; r < rows; ++r) moved[r] += kChunk * bytes;
                    }
                }
                for (int r = 0; r < rows; ++r) {
                    float* to = sums + r * kBlock + c * kVecOutputs;
                    const Vec run = wide ? sum[r] : finished(sum[r]);
                    if (raw) {
                        store_vec(to, add32(load_vec(to), run));
                    } else {
                        store_floats(to, multiply_add(to_floats(run), load_floats(scales + c * kVecOutputs),
                                                      load_floats(to)));
                    }
                }
            }
        }
        for (int r = 0; r < rows; ++r) activations[r] += span * bytes;
        input += span;
    }
}

// Unpack a panel: inputs [first, first + inputs) of a block as [steps][64][4] bytes, and the scales of its runs.
template <int bits>
void unpack_panel(const Packed& w, const uint8_t* block, int64_t first, int64_t inputs, int run_inputs, uint8_t* codes,
                  float* scales) {
    for (int64_t i = 0; i < inputs; i += kChunk) {
        const uint8_t* stream = block + chunk_offset(w, (first + i) / kChunk);
        for (int c = 0; c < kVecs; ++c) {
            Vec quads[8];
            unpack<bits>(stream + c * sizeof(Vec), quads);
            uint8_t* to = codes + c * sizeof(Vec);
            for (int q = 0; q < 8; ++q) {
                if constexpr (kSixteenBit && bits == 8) {
                    store_vec(to + 2 * q * kStep, masked(quads[q], broadcast_vec(0x00ff00ff)));
                    store_vec(to + (2 * q + 1) * kStep, shifted_right<8>(quads[q]));
                } else {
                    store_vec(to + q * kStep, quads[q]);
                }
            }
        }
        codes += (kSixteenBit && bits == 8 ? 16 : 8) * kStep;
    }
    if (!w.group) return;
    for (int64_t i = 0; i < inputs; i += run_inputs, scales += kBlock) {
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
    constexpr int64_t most = wide ? kPanelInputs / 2 : kPanelInputs;
    alignas(64) uint8_t codes[kPanelInputs * kBlock];
    alignas(64) float scales[kMaxRuns * kBlock];
    const int64_t inputs = padded_inputs(w), strips = ceil_div(rows, kTileRows);
    const bool raw = !w.group;
    memset(sums, 0, static_cast<size_t>(rows * kBlock) * sizeof(float));
    for (int64_t input = 0; input < inputs; input += most) {
        const int64_t span = least(most, inputs - input);
        const int quads = raw ? static_cast<int>(span / 4) : run_quads(bits, w.group);
        unpack_panel<bits>(w, block, input, span, quads * 4, codes, scales);
        int32_t starts[kTileRows][kMaxRuns];
        Panel p = {};
        p.codes = codes;
        p.scales = scales;
        p.row_bytes = x.code_stride * (wide ? 2 : 1);
        p.starts = starts[0];
        p.runs = static_cast<int>(span / (quads * 4));
        p.steps = wide ? quads * 2 : quads;
        p.ahead = block + (input + span < inputs ? chunk_offset(w, (input + span) / kChunk) : w.block_bytes);
        const int64_t next = most / kChunk * chunk_bytes(w), tiles = strips * (kVecs / kTileVecs) * p.runs;
        p.ahead_end = p.ahead + next;
        p.ahead_bytes = ceil_div(ceil_div(next, tiles), 64) * 64;
        for (int64_t strip = 0, row = 0; strip < strips; ++strip) {
            const int now = static_cast<int>(ceil_div(rows - row, strips - strip));
            for (int r = 0; r < now; ++r) run_starts(x, bits, first + row + r, input, p.runs, quads, starts[r]);
            p.activations = codes_at(x, wide, first + row, input);
            raw ? run_strip<wide, true>(now, p, sums + row * kBlock) : run_strip<wide, false>(now, p, sums + row * kBlock);
            p.ahead += p.ahead_bytes * (kVecs / kTileVecs) * p.runs;
            row += now;
        }
    }
}

template <int bits>
void integer_sums(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows, float* sums) {
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
