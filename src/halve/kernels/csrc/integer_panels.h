// Sums of a block of 64 outputs of an integer matrix with rows of int8 activations by vectors of 8 outputs or fewer:
// AVX2, which has no exact dot product of bytes and 16 registers, AVX-VNNI, and 64-bit ARM.
//
// Up to kFewRows rows (decode) the planes are unpacked in registers and used at once: the loop reads the weight stream
// once and waits for memory. More rows (prefill, batches) share a panel: kPanelInputs inputs of the block are unpacked
// to bytes that stay in the first-level cache, and every strip of rows multiplies them there, at the rate of the dot
// products; meanwhile the next panel's stream is fetched.
#pragma once

#include "integer_vectors.h"
#include "packed_scales.h"

#if defined(HALVE_INTEGER_VECTORS) && !defined(__AVX512VNNI__)

namespace halve {
namespace {

#if defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2, kFewVecs = 2;
constexpr int kPanelInputs = 128;  // 8 KB, twice in the first-level cache where two threads share it
#else
constexpr int kTileRows = 6, kTileVecs = 4, kFewVecs = 4;  // 24 sums in 32 registers
constexpr int kPanelInputs = 256;                          // 16 KB
#endif
constexpr int kPanelStep = static_cast<int>(kBlock) * 4;  // bytes, of an unpacked panel: all outputs side by side
constexpr int kMaxRuns = kPanelInputs / 16;               // of a panel
constexpr int kFewRows = 4;
// Bytes to fetch ahead: hardware prefetch stops at the end of a 4 KiB page.
constexpr int64_t kAhead = 1536;

// Whether sums begin at minus the zero point times the sum of their activations; else codes have none when multiplied.
template <int bits>
constexpr bool kHasStarts = !kSignedBytes || bits < 8;
constexpr int32_t kNoStarts[kMaxRuns] = {};

#if defined(__ARM_FEATURE_DOTPROD)

}  // namespace
}  // namespace halve

#include "neon_tiles.h"

namespace halve {
namespace {

#else

// Sums of one run for a tile of `rows` rows and kTileVecs vectors of outputs, and what becomes of them. `raw`: the
// weight has one scale a row, so that runs are added up as integers.
template <int rows, bool raw>
struct RunSums {
    Vec sum[rows][kTileVecs];

    inline void begin(const int32_t* starts, int64_t stride) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec start = broadcast_vec(raw ? 0 : starts[r * stride]);
#pragma GCC unroll 8
            for (int c = 0; c < kTileVecs; ++c) sum[r][c] = start;
        }
    }

    inline void end(bool wide, const float* scales, float* sums) {
#pragma GCC unroll 8
        for (int c = 0; c < kTileVecs; ++c) {
            const Lanes scale = raw ? Lanes{} : load(scales + c * kVecOutputs);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                float* at = sums + r * kBlock + c * kVecOutputs;
                const Vec run = wide ? sum[r][c] : finished(sum[r][c]);
                if (raw) {
                    store_vec(at, add32(load_vec(at), run));
                } else {
                    store(at, fma(to_floats(run), scale, load(at)));
                }
            }
        }
    }
};

#endif

// What a tile multiplies: a panel of unpacked codes with the activations of a strip of rows.
struct Panel {
    const uint8_t* codes;        // [steps][64 outputs][4 bytes]
    const float* scales;         // [runs][64]
    const uint8_t* activations;  // codes of the strip's first row at the panel's first input
    int64_t row_bytes;           // from one row of activations to the next
    const int32_t* starts;       // [rows, start_stride] where the sums of each run begin; not read where raw
    int64_t start_stride;
    const uint8_t* ahead;      // weights that come next, to be fetched meanwhile,
    const uint8_t* ahead_end;  // up to here,
    int64_t ahead_bytes;       // so many in each run of a tile
    int runs, steps;           // of a run
};

// sums [rows][64] += the strip times the panel, kTileVecs vectors of outputs from `output` on.
template <int rows, bool wide, bool raw>
HALVE_HOT void hot_tile(const Panel& p, int output, float* sums) {
    const uint8_t* codes = p.codes + 4 * output;
    const uint8_t* activations = p.activations;
    const float* scales = p.scales + output;
    const uint8_t* ahead = p.ahead;
    const int64_t row_bytes = p.row_bytes;
    for (int run = 0; run < p.runs; ++run) {
        RunSums<rows, raw> tile;
        if (raw) {
            tile.begin(nullptr, 0);
        } else {
            tile.begin(p.starts + run, p.start_stride);
        }
        for (const uint8_t* end = ahead + p.ahead_bytes; ahead < end && ahead < p.ahead_end; ahead += 64) {
            __builtin_prefetch(ahead, 0, 2);
        }
#if defined(__ARM_FEATURE_DOTPROD)
        for (int step = 0; step < p.steps; step += 4, codes += 4 * kPanelStep, activations += 16) {
            tile.add(codes, activations, row_bytes);
        }
#else
        for (int step = 0; step < p.steps; ++step) {
            Vec weights[kTileVecs];
#pragma GCC unroll 8
            for (int c = 0; c < kTileVecs; ++c) weights[c] = load_vec(codes + c * static_cast<int>(sizeof(Vec)));
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const Vec quad = broadcast_vec(int_at(activations + r * row_bytes));
#pragma GCC unroll 8
                for (int c = 0; c < kTileVecs; ++c) {
                    if constexpr (wide) {
                        tile.sum[r][c] = dot_pair(tile.sum[r][c], weights[c], quad);
                    } else {
                        tile.sum[r][c] = dot(tile.sum[r][c], weights[c], quad);
                    }
                }
            }
            codes += kPanelStep;
            activations += 4;
        }
#endif
        tile.end(wide, scales, sums + output);
        scales += kBlock;
    }
}

// Quads `from` to `to` of a chunk, for kFewVecs vectors of outputs, against the same quads of a few rows: so many that
// a cache line of weights is read at once, and that a broadcast of activations serves all.
template <int bits, int rows, int from, int to>
inline void dot_quads(const uint8_t* const (&weights)[kFewVecs], const uint8_t* const (&activations)[rows],
                      int64_t input, Vec (&sum)[rows][kFewVecs]) {
    if constexpr (from < to) {
        Vec quad[kFewVecs];
        for (int c = 0; c < kFewVecs; ++c) {
            quad[c] = quad_of<bits, from>(weights[c]);
#if defined(__aarch64__)
            asm volatile("" : "+w"(quad[c]));  // else gcc unpacks many quads before it multiplies the first
#endif
        }
        if constexpr (kSixteenBit && bits == 8) {
            const Vec low = broadcast_vec(0x00ff00ff);
            const Vec even[2] = {quad[0] & low, quad[1] & low};
            const Vec odd[2] = {shifted_right<8>(quad[0]), shifted_right<8>(quad[1])};
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                const uint8_t* at = activations[r] + 2 * (input + 4 * from);
                const Vec first = broadcast_vec(int_at(at)), second = broadcast_vec(int_at(at + 4));
                for (int c = 0; c < 2; ++c) sum[r][c] = dot_pair(dot_pair(sum[r][c], even[c], first), odd[c], second);
            }
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                const Vec asked = broadcast_vec(int_at(activations[r] + input + 4 * from));
                for (int c = 0; c < kFewVecs; ++c) sum[r][c] = dot(sum[r][c], quad[c], asked);
            }
        }
        dot_quads<bits, rows, from + 1, to>(weights, activations, input, sum);
    }
}

// sums [rows][64] of a block for up to kFewRows rows, scaled group by group, or as integers where there is one scale a
// row (`raw`). The order of additions is that of hot_tile.
template <int bits, int rows, bool raw>
HALVE_HOT void few_rows(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, float* sums) {
    constexpr bool wide = kSixteenBit && bits == 8;
    constexpr int runs_a_chunk = kSixteenBit && bits == 6 ? 2 : 1;
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
    for (int64_t input = 0, run = 0; input < inputs;) {
        const uint8_t* scales = at;
        at += head;
        for (const int64_t end = input + group; input < end; input += span, at += span_bytes, run += runs_a_chunk) {
#pragma GCC unroll 1
            for (int c = 0; c < kVecs; c += kFewVecs) {
                const uint8_t* ahead = at + kAhead + c * span_bytes / kVecs;
                for (int64_t i = 0; i < kFewVecs * span_bytes / kVecs; i += 64) __builtin_prefetch(ahead + i, 0, 3);
                const uint8_t* weights[kFewVecs];
                for (int v = 0; v < kFewVecs; ++v) weights[v] = at + lane_offset(bits, (c + v) * kVecOutputs);
                Vec sum[rows][kFewVecs];
                const auto begin = [&](int64_t which) {
                    for (int r = 0; r < rows; ++r) {
                        const Vec start = broadcast_vec(raw || !kHasStarts<bits> ? 0 : starts[r][which]);
                        for (int v = 0; v < kFewVecs; ++v) sum[r][v] = start;
                    }
                };
                const auto finish = [&] {
                    for (int v = 0; v < kFewVecs; ++v) {
                        const Lanes scale = raw ? Lanes{} : scales_of(w, scales, (c + v) * kVecOutputs);
                        for (int r = 0; r < rows; ++r) {
                            float* to = sums + r * kBlock + (c + v) * kVecOutputs;
                            const Vec whole = wide ? sum[r][v] : finished(sum[r][v]);
                            if (raw) {
                                store_vec(to, add32(load_vec(to), whole));
                            } else {
                                store(to, fma(to_floats(whole), scale, load(to)));
                            }
                        }
                    }
                };
                begin(run);
                if constexpr (runs_a_chunk == 2) {
                    dot_quads<bits, rows, 0, 4>(weights, activations, input, sum);
                    finish();
                    begin(run + 1);
                    dot_quads<bits, rows, 4, 8>(weights, activations, input, sum);
                } else {
                    dot_quads<bits, rows, 0, 8>(weights, activations, input, sum);
#pragma GCC unroll 1
                    for (int64_t i = kChunk; i < span; i += kChunk) {
                        for (const uint8_t*& vec : weights) vec += bits * kBlock * 4;
                        dot_quads<bits, rows, 0, 8>(weights, activations, input + i, sum);
                    }
                }
                finish();
            }
        }
    }
}

template <int bits, int q>
inline void unpack_quads(const uint8_t* at, uint8_t* to) {
    if constexpr (q < 8) {
        const Vec quad = quad_of<bits, q>(at);
#if defined(__ARM_FEATURE_DOTPROD)
        store_quads(to + q * kPanelStep, quad, quad_of<bits, q + 1>(at));
        unpack_quads<bits, q + 2>(at, to);
#else
        if constexpr (kSixteenBit && bits == 8) {
            store_vec(to + 2 * q * kPanelStep, quad & broadcast_vec(0x00ff00ff));
            store_vec(to + (2 * q + 1) * kPanelStep, shifted_right<8>(quad));
        } else {
            store_vec(to + q * kPanelStep, quad);
        }
        unpack_quads<bits, q + 1>(at, to);
#endif
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
template <int bits, bool raw>
void many_rows(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows, float* sums) {
    constexpr bool wide = kSixteenBit && bits == 8;
    constexpr int64_t most = kPanelInputs;  // a multiple of every run
    alignas(64) uint8_t codes[kPanelInputs * kBlock * (wide ? 2 : 1)];
    alignas(64) float scales[kMaxRuns * kBlock];
    const int64_t inputs = padded_inputs(w), strips = ceil_div(rows, kTileRows);
    for (int64_t input = 0; input < inputs; input += most) {
        const int64_t span = least(most, inputs - input), run = raw ? span : x.run;
        unpack_panel<bits>(w, block, input, span, run, codes, scales);
        Panel p = {};
        p.codes = codes;
        p.scales = scales;
        p.row_bytes = x.code_stride * (wide ? 2 : 1);
        p.start_stride = kHasStarts<bits> ? x.start_stride : 0;
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
            if (!kHasStarts<bits>) p.starts = kNoStarts;
            run_strip<wide, raw>(now, p, sums + row * kBlock);
            p.ahead += p.ahead_bytes * (kVecs / kTileVecs) * p.runs;
            row += now;
        }
    }
}

template <int bits, bool raw>
void integer_sums(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows,
                  float* sums) {
    switch (rows) {
        case 1:
            return few_rows<bits, 1, raw>(w, block, x, first, sums);
        case 2:
            return few_rows<bits, 2, raw>(w, block, x, first, sums);
        case 3:
            return few_rows<bits, 3, raw>(w, block, x, first, sums);
        case 4:
            return few_rows<bits, 4, raw>(w, block, x, first, sums);
        default:
            many_rows<bits, raw>(w, block, x, first, rows, sums);
    }
}

}  // namespace
}  // namespace halve

#endif
