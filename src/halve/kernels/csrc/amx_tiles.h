// Products of tiles by AMX: 16 rows of activations, 64 bytes each, times 16 outputs of weights.
//
// A tile of weights is what packing.h and the panels hold: row q is quad q (or pair q of bf16) of 16 outputs, 64 bytes,
// and the next quad lies 256 bytes on. Tiles are registers of a thread: whoever multiplies sets them up and lets them
// go. Linux lends them to a process that asked (hardware/detect.py does). Source: Intel 64 and IA-32 Architectures
// Software Developer's Manual, volume 1, chapter 18.
//
// Integers: exact, so that a row has the bits that the loops of integer_stream.h give it, and these take few rows
// (`fewest_tiled`). bf16: tdpbf16ps sums even and odd inputs apart and flushes subnormal numbers, in an order that no
// other instruction has; it multiplies every row, alone or among others. Per output, stretches of kTileDepth inputs are
// summed in a tile, at most kTileDepth / 32 + 17 roundings each, and added one after the other.
#pragma once

#include "float_products.h"
#include "integer_vectors.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define HALVE_AMX 1
#define HALVE_BF16_PRODUCTS 1

namespace halve {
namespace {

constexpr int64_t kTileSide = 16;            // rows of activations, and outputs
constexpr int64_t kTileBytes = 64;           // of a row of a tile
constexpr int64_t kTileDepth = 256;          // 32 KB of bf16 weights
constexpr int64_t kTileStride = kBlock * 4;  // bytes: a quad or a pair of all outputs, or their sums
constexpr int64_t kTilePanel = 256;          // inputs that are unpacked together: 16 KB

// From so many rows on tiles are faster than integer_stream.h, which unpacks nothing and reads memory more evenly.
inline int64_t fewest_tiled(const Packed& w) { return !w.group ? 24 : w.group < kTileBytes ? 10 : 8; }

// The instructions; gcc 12's own intrinsics do not say which memory they read.
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// sums += signed activations * unsigned weights.
template <int sums, int activations, int weights>
inline void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(activations), "i"(weights));
}
// The same with signed weights.
template <int sums, int activations, int weights>
inline void multiply_signed_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(activations), "i"(weights));
}
template <int sums, int activations, int weights>
inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(activations), "i"(weights));
}

// Sets up registers 0 to 3 for sums, 4 and 5 for activations of so many rows, 6 and 7 for weights. That takes some 70
// ns, and letting them go more than that, so both are done rarely.
class Tiles {
   public:
    // input_bytes: of a row of activations; weights have a row for every 4.
    explicit Tiles(int64_t input_bytes) : input_bytes_(input_bytes) {}

    // rows: of activations, 1 to 16.
    void set_rows(int64_t rows) {
        if (rows == rows_) return;
        rows_ = rows;
        struct {
            uint8_t palette = 1, start = 0, zeros[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } setup;
        static_assert(sizeof setup == 64, "the processor reads 64 bytes");
        for (int i = 0; i < 8; ++i) {
            const bool activations = i == 4 || i == 5, weights = i > 5;
            setup.row_bytes[i] = static_cast<uint16_t>(activations ? input_bytes_ : kTileBytes);
            setup.rows[i] = static_cast<uint8_t>(weights ? input_bytes_ / 4 : rows);
        }
        asm volatile("ldtilecfg %0" : : "m"(setup));
    }

    ~Tiles() { asm volatile("tilerelease"); }

    Tiles(const Tiles&) = delete;

   private:
    int64_t input_bytes_, rows_ = 0;
};

// Memory to fetch while tiles are multiplied: the stream of the panel after this one, in even parts.
class Ahead {
   public:
    Ahead(const uint8_t* from, int64_t bytes, int64_t parts) : at_(from), part_(ceil_div(bytes, parts * 64) * 64) {}

    void fetch() {
        for (const uint8_t* end = at_ + part_; at_ < end; at_ += 64) __builtin_prefetch(at_, 0, 2);
    }

   private:
    const uint8_t* at_;
    int64_t part_;
};

constexpr int kTileRuns = 4;  // runs that are multiplied, then stored, then scaled: one alone waits for each of these

// What a strip of rows multiplies: unpacked codes of a panel.
struct PanelStrip {
    const uint8_t* codes;  // of 16 outputs or of all; rows of quads, kTileStride apart
    const uint8_t* activations;
    int64_t row_bytes;  // from one row of activations to the next
    int64_t runs;       // groups with scales of their own,
    int64_t steps;      // each of so many steps
    int64_t depth;      // of so many inputs
    int32_t* whole;     // [kTileRuns][16][16] for sums on their way to being scaled
};

// Whole numbers of run `run` in register `sums`.
template <int sums>
__attribute__((always_inline)) inline void multiply_run(const PanelStrip& s, int64_t run) {
    constexpr int rows = 4 + sums % 2, weights = 6 + sums % 2;
    clear_tile<sums>();
    for (int64_t i = run * s.steps; i < (run + 1) * s.steps; ++i) {
        load_tile<rows>(s.activations + i * s.depth, s.row_bytes);
        load_tile<weights>(s.codes + i * s.depth / 4 * kTileStride, kTileStride);
        multiply_signed_bytes<sums, rows, weights>();
    }
}

// total [rows][16] += runs [first, first + runs) of a strip times a panel, each scaled.
template <int rows, int runs>
__attribute__((always_inline)) inline void scaled_runs(const PanelStrip& s, int64_t first, const float* scales,
                                                       int32_t* whole, Lanes (&total)[rows]) {
    constexpr int64_t sums = kTileSide * kTileSide;
    multiply_run<0>(s, first);
    if constexpr (runs > 1) multiply_run<1>(s, first + 1);
    if constexpr (runs > 2) multiply_run<2>(s, first + 2);
    if constexpr (runs > 3) multiply_run<3>(s, first + 3);
    store_tile<0>(whole, kTileBytes);
    if constexpr (runs > 1) store_tile<1>(whole + sums, kTileBytes);
    if constexpr (runs > 2) store_tile<2>(whole + 2 * sums, kTileBytes);
    if constexpr (runs > 3) store_tile<3>(whole + 3 * sums, kTileBytes);
#pragma GCC unroll 4
    for (int run = 0; run < runs; ++run) {
        const Lanes scale = load(scales + (first + run) * kBlock);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            total[r] = fma(to_floats(load_vec(whole + run * sums + r * kTileSide)), scale, total[r]);
        }
    }
}

// sums [rows][64], 16 outputs of them, += a strip times a panel, scaled run by run (scales: [runs][64]) as the ends of
// integer_stream.h do.
template <int rows>
HALVE_HOT void hot_scaled_strip(const PanelStrip& s, const float* scales, Ahead& ahead, float* sums) {
    Lanes total[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) total[r] = load(sums + r * kBlock);
    int64_t run = 0;
    for (; run + kTileRuns <= s.runs; run += kTileRuns) {
        ahead.fetch();
        scaled_runs<rows, kTileRuns>(s, run, scales, s.whole, total);
    }
    if (run + 2 <= s.runs) {
        ahead.fetch();
        scaled_runs<rows, 2>(s, run, scales, s.whole, total);
        run += 2;
    }
    if (run < s.runs) {
        ahead.fetch();
        scaled_runs<rows, 1>(s, run, scales, s.whole, total);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) store(sums + r * kBlock, total[r]);
}

// sums [rows][64] of whole numbers += a strip times a panel.
inline void add_strip(const PanelStrip& s, Ahead& ahead, void* sums) {
    uint8_t* at = static_cast<uint8_t*>(sums);
    load_tile<0>(at, kTileStride);
    load_tile<1>(at + kTileBytes, kTileStride);
    load_tile<2>(at + 2 * kTileBytes, kTileStride);
    load_tile<3>(at + 3 * kTileBytes, kTileStride);
    for (int64_t i = 0; i < s.steps; ++i) {
        const uint8_t* codes = s.codes + i * s.depth / 4 * kTileStride;
        ahead.fetch();
        load_tile<4>(s.activations + i * s.depth, s.row_bytes);
        load_tile<6>(codes, kTileStride);
        load_tile<7>(codes + kTileBytes, kTileStride);
        multiply_bytes<0, 4, 6>();
        multiply_bytes<1, 4, 7>();
        load_tile<6>(codes + 2 * kTileBytes, kTileStride);
        load_tile<7>(codes + 3 * kTileBytes, kTileStride);
        multiply_bytes<2, 4, 6>();
        multiply_bytes<3, 4, 7>();
    }
    store_tile<0>(at, kTileStride);
    store_tile<1>(at + kTileBytes, kTileStride);
    store_tile<2>(at + 2 * kTileBytes, kTileStride);
    store_tile<3>(at + 3 * kTileBytes, kTileStride);
}

// The quads of a chunk as rows of tiles; centred: codes less their zero point, as signed bytes.
template <int bits, bool centred, int q = 0>
inline void unpack_chunk(const uint8_t* from, uint8_t* to) {
    if constexpr (q < 8) {
#pragma GCC unroll 4
        for (int c = 0; c < kVecs; ++c) {
            Vec quad = quad_of<bits, q>(from + lane_offset(bits, c * kVecOutputs));
            if constexpr (centred) quad = _mm512_sub_epi8(quad, _mm512_set1_epi8(static_cast<char>(1 << (bits - 1))));
            store_vec(to + q * kTileStride + c * sizeof(Vec), quad);
        }
        unpack_chunk<bits, centred, q + 1>(from, to);
    }
}

// sums [rows][64] of a block, as integer_sums gives.
template <int bits, bool raw>
void tiled_sums(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows, float* sums) {
    typedef void (*Strip)(const PanelStrip&, const float*, Ahead&, float*);
    static constexpr Strip strips[kTileSide] = {
        hot_scaled_strip<1>,  hot_scaled_strip<2>,  hot_scaled_strip<3>,  hot_scaled_strip<4>,
        hot_scaled_strip<5>,  hot_scaled_strip<6>,  hot_scaled_strip<7>,  hot_scaled_strip<8>,
        hot_scaled_strip<9>,  hot_scaled_strip<10>, hot_scaled_strip<11>, hot_scaled_strip<12>,
        hot_scaled_strip<13>, hot_scaled_strip<14>, hot_scaled_strip<15>, hot_scaled_strip<16>};
    alignas(64) uint8_t codes[kTilePanel * kBlock];
    alignas(64) float scales[kTilePanel / kChunk * kBlock];
    const int64_t inputs = padded_inputs(w), count = ceil_div(rows, kTileSide);
    alignas(64) int32_t whole[kTileRuns * kTileSide * kTileSide];
    PanelStrip s = {};
    s.whole = whole;
    s.depth = raw || w.group % kTileBytes == 0 ? kTileBytes : kChunk;
    s.row_bytes = x.code_stride;
    Tiles tiles(s.depth);
    for (int64_t input = 0; input < inputs; input += kTilePanel) {
        const int64_t span = least(kTilePanel, inputs - input), chunk = input / kChunk;
        for (int64_t i = 0; i < span; i += kChunk) {
            unpack_chunk<bits, !raw>(block + chunk_offset(w, chunk + i / kChunk), codes + i / 4 * kTileStride);
        }
        // A last chunk alone: rows of codes go on with zeros, which meet these.
        if (span % s.depth) memset(codes + span / 4 * kTileStride, 0, kChunk / 4 * kTileStride);
        s.runs = raw ? 1 : span / w.group;
        s.steps = ceil_div(raw ? span : w.group, s.depth);
        for (int64_t run = 0; run < s.runs && !raw; ++run) {
            read_scales(w, block + scale_offset(w, chunk + run * w.group / kChunk), scales + run * kBlock);
        }
        const int64_t bytes = span / kChunk * chunk_bytes(w) + (raw ? 0 : s.runs * head_bytes(w));
        Ahead ahead(block + chunk_offset(w, chunk) + bytes, bytes,
                    count * (raw ? s.steps : 4 * ceil_div(s.runs, kTileRuns)));
        for (int64_t row = 0; row < rows;) {
            const bool whole = rows - row >= kTileSide;
            const int64_t now = whole ? kTileSide : rows - row, end = whole ? rows / kTileSide * kTileSide : rows;
            tiles.set_rows(now);
            for (; row < end; row += now) {
                s.activations = codes_at(x, false, first + row, input);
                s.codes = codes;
                if constexpr (raw) {
                    add_strip(s, ahead, sums + row * kBlock);
                } else {
                    for (int64_t output = 0; output < kBlock; output += kTileSide) {
                        s.codes = codes + output * 4;
                        strips[now - 1](s, scales + output, ahead, sums + row * kBlock + output);
                    }
                }
            }
        }
    }
}

// sums [rows][64]: the products of one block with rows [first, first + rows) of bf16 activations.
void bf16_block(const Packed& w, int64_t index, const Activations& x, int64_t first, int64_t rows, float* sums) {
    const uint8_t* block = w.data + index * w.block_bytes;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(x.wide) + first * x.code_stride;
    memset(sums, 0, static_cast<size_t>(rows * kBlock) * sizeof(float));
    constexpr int64_t kInputs = kTileBytes / 2, kStepBytes = kInputs * 2 * kBlock;
    alignas(64) float part[kTileSide * kBlock];
    alignas(64) uint8_t last[kStepBytes];
    const uint8_t* stream = block + head_bytes(w);
    const int64_t whole = w.in_features / kInputs * kInputs, stride = x.code_stride * 2;
    // The inputs after the last whole tile; of weights nothing lies behind them.
    memset(last, 0, sizeof last);
    memcpy(last, stream + whole * 2 * kBlock, static_cast<size_t>(ceil_div(w.in_features - whole, 2) * kTileStride));
    Tiles tiles(kTileBytes);
    for (int64_t row = 0; row < rows;) {
        const bool strips = rows - row >= kTileSide;
        const int64_t side = strips ? kTileSide : rows - row, end = strips ? rows / kTileSide * kTileSide : rows;
        tiles.set_rows(side);
        for (int64_t begin = 0; begin < w.in_features; begin += kTileDepth) {
            const int64_t to = least(begin + kTileDepth, w.in_features), steps = ceil_div(to - begin, kInputs);
            Ahead ahead(stream + to * 2 * kBlock, steps * kStepBytes, steps * ceil_div(end - row, side));
            for (int64_t at = row; at < end; at += side) {
                clear_tile<0>();
                clear_tile<1>();
                clear_tile<2>();
                clear_tile<3>();
                for (int64_t i = begin; i < to; i += kInputs) {
                    const uint8_t* weights = i < whole ? stream + i * 2 * kBlock : last;
                    load_tile<4>(halves + at * x.code_stride + i, stride);
                    load_tile<6>(weights, kTileStride);
                    load_tile<7>(weights + kTileBytes, kTileStride);
                    multiply_bf16<0, 4, 6>();
                    multiply_bf16<1, 4, 7>();
                    load_tile<6>(weights + 2 * kTileBytes, kTileStride);
                    load_tile<7>(weights + 3 * kTileBytes, kTileStride);
                    multiply_bf16<2, 4, 6>();
                    multiply_bf16<3, 4, 7>();
                    ahead.fetch();
                }
                store_tile<0>(part, kTileStride);
                store_tile<1>(part + kTileSide, kTileStride);
                store_tile<2>(part + 2 * kTileSide, kTileStride);
                store_tile<3>(part + 3 * kTileSide, kTileStride);
                for (int64_t i = 0; i < side * kBlock; i += kLanes) {
                    float* sum = sums + at * kBlock + i;
                    store(sum, load(sum) + load(part + i));
                }
            }
        }
        row = end;
    }
    scale_rows(w, block, rows, sums);
}

}  // namespace
}  // namespace halve

#endif
