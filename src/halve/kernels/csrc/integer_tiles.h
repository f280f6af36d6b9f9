// Dot products of unsigned weight codes with int8 activations: the innermost loops, for each instruction set.
//
// Outputs lie in lanes and every lane holds a quad of inputs, so that one broadcast of 4 activation codes meets
// kVecOutputs outputs and no sum crosses lanes. A run of quads is summed in integers, exactly, beginning at minus the
// zero point times the sum of its activations; then it is scaled and added to float sums, one rounding a run:
//
//   sum[r][n] = fma(float(run), scale[n], sum[r][n])
//
// Runs have the same length and order in every function below, so that a row's sums have the same bits whatever the
// rows beside it. AVX-512 VNNI adds 4 products into 32 bits, and a run is a group of weights. AVX2 multiplies pairs
// into 16 bits (vpmaddubsw) and adds there, wrapping: the final sum fits, since a run holds at most
// 2^15 / (127 * 2^(bits-1)) products a half-lane. 8-bit codes are multiplied as 16 bits instead (vpmaddwd).
#pragma once

#if defined(__AVX2__)
#define HALVE_INTEGER_TILES 1

#include "packing.h"
#include "simd.h"

namespace halve {
namespace {

// Hot loops keep a name of their own in the library: a test disassembles them and looks for spilled registers.
#define HALVE_HOT __attribute__((noinline))

#if defined(__AVX512VNNI__)

typedef __m512i Vec;
constexpr int kTileRows = 6, kTileVecs = 4;
constexpr int kPanelInputs = 256;  // 16 KB of codes: they stay in the first-level cache
constexpr bool kSixteenBit = false;

// One quad a lane.
inline Vec dot(Vec sum, Vec weights, Vec activations) { return _mm512_dpbusd_epi32(sum, weights, activations); }
inline Vec finished(Vec sum) { return sum; }

#else

typedef __m256i Vec;
constexpr int kTileRows = 6, kTileVecs = 2;
constexpr int kPanelInputs = 128;  // 8 KB of codes, twice in the first-level cache where two threads share it
constexpr bool kSixteenBit = true;

// One quad a lane, as two sums of 16 bits.
inline Vec dot(Vec sum, Vec weights, Vec activations) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, activations));
}
inline Vec finished(Vec sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
// One pair of 16-bit numbers a lane.
inline Vec dot_pair(Vec sum, Vec weights, Vec activations) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, activations));
}

#endif

static_assert(sizeof(Vec) == sizeof(Lanes), "a vector of codes has a lane for each output of a vector of floats");

inline Vec load_vec(const void* p) { return *static_cast<const Vec*>(p); }
inline void store_vec(void* p, Vec v) { *static_cast<Vec*>(p) = v; }
inline Vec broadcast_vec(int32_t x) { return (Vec)(Ints{} + x); }
inline Vec add32(Vec a, Vec b) { return (Vec)((Ints)a + (Ints)b); }
inline Lanes to_floats(Vec v) { return __builtin_convertvector((Ints)v, Lanes); }

// Every 16 bits to the right, or to the left where n is below 0.
template <int n>
inline Vec shifted_right(Vec v) {
    typedef uint16_t Halves __attribute__((vector_size(sizeof(Vec))));
    if constexpr (n < 0) return (Vec)((Halves)v << -n);
    return (Vec)((Halves)v >> (n < 0 ? 0 : n));
}

constexpr int kVecOutputs = sizeof(Vec) / 4;
constexpr int kVecs = static_cast<int>(kBlock) / kVecOutputs;  // of a block
constexpr int kPanelStep = static_cast<int>(kBlock) * 4;       // bytes, of an unpacked panel: all outputs side by side
constexpr int kMaxRuns = kPanelInputs / 16;                    // of a panel

inline int32_t int_at(const void* p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

// Quad q of a chunk for the outputs of one vector; `at` is the chunk's first step there.
template <int bits, int q>
inline Vec quad_of(const uint8_t* at) {
    if constexpr (bits == 8) return load_vec(at + q * kStep);
    Vec quad = broadcast_vec(0);
    if constexpr (bits & 4) {
        quad = shifted_right<q % 2 * 4>(load_vec(at + q / 2 * kStep)) & broadcast_vec(0x0f0f0f0f);
        at += 4 * kStep;
    }
    if constexpr (bits & 2) {
        constexpr int low = bits & 4;
        const Vec mask = broadcast_vec(low ? 0x30303030 : 0x03030303);
        quad |= shifted_right<q % 4 * 2 - low>(load_vec(at + q / 4 * kStep)) & mask;
        at += 2 * kStep;
    }
    if constexpr (bits & 1) {
        constexpr int low = bits & 6;
        quad |= shifted_right<q - low>(load_vec(at)) & broadcast_vec(0x01010101 << low);
    }
    return quad;
}

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
        tile.end(wide, scales, sums + output);
        scales += kBlock;
    }
}

}  // namespace
}  // namespace halve

#endif
