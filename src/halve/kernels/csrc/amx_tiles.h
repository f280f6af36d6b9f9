// Products of tiles by AMX: 16 rows of activations, 64 bytes each, times 16 outputs of weights.
//
// A tile of weights is what packing.h and the panels hold: row q is quad q (or pair q of bf16) of 16 outputs, 64 bytes,
// and the next quad lies 256 bytes on. Tiles are registers of a thread: whoever multiplies sets them up and lets them
// go. Linux lends them to a process that asked (hardware/detect.py does). Source: Intel 64 and IA-32 Architectures
// Software Developer's Manual, volume 1, chapter 18.
//
// Integers: exact, so that a row has the bits that the loops of integer_stream.h give it, and these take what is left
// over of 16 rows. bf16: tdpbf16ps sums even and odd inputs apart and flushes subnormal numbers, in an order that no
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

constexpr int64_t kTileSide = 16;   // rows of activations, and outputs
constexpr int64_t kTileBytes = 64;  // of a row of a tile
constexpr int64_t kTileDepth = 512;
constexpr int64_t kTileStride = kBlock * 4;  // bytes: a quad or a pair of all outputs, or their sums
constexpr int64_t kTilePanel = 256;          // inputs that are unpacked together: 16 KB

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
template <int sums, int activations, int weights>
inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(activations), "i"(weights));
}

// Sets up registers 0 to 3 for sums, 4 and 5 for activations, 6 and 7 for weights of so many bytes of inputs a row.
class Tiles {
   public:
    Tiles(int64_t activation_rows, int64_t input_bytes) {
        struct {
            uint8_t palette = 1, start = 0, zeros[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } setup;
        static_assert(sizeof setup == 64, "the processor reads 64 bytes");
        for (int i = 0; i < 8; ++i) {
            const bool activations = i == 4 || i == 5, weights = i > 5;
            setup.row_bytes[i] = static_cast<uint16_t>(activations ? input_bytes : kTileBytes);
            setup.rows[i] = static_cast<uint8_t>(weights ? input_bytes / 4 : activation_rows);
        }
        asm volatile("ldtilecfg %0" : : "m"(setup));
    }

    ~Tiles() { asm volatile("tilerelease"); }

    Tiles(const Tiles&) = delete;
};

// Products of a strip of 16 rows with 32 outputs over `inputs` codes of a panel, in steps of `depth` codes. `raw`:
// added to the whole numbers at `sums` [16][64]; else written there.
template <bool raw>
inline void add_strip(const uint8_t* codes, const uint8_t* activations, int64_t row_bytes, int64_t inputs,
                      int64_t depth, void* sums) {
    uint8_t* at = static_cast<uint8_t*>(sums);
    if (raw) {
        load_tile<0>(at, kTileStride);
        load_tile<1>(at + kTileBytes, kTileStride);
    } else {
        clear_tile<0>();
        clear_tile<1>();
    }
    for (int64_t i = 0; i < inputs; i += depth, codes += depth / 4 * kTileStride, activations += depth) {
        load_tile<4>(activations, row_bytes);
        load_tile<6>(codes, kTileStride);
        load_tile<7>(codes + kTileBytes, kTileStride);
        multiply_bytes<0, 4, 6>();
        multiply_bytes<1, 4, 7>();
    }
    store_tile<0>(at, kTileStride);
    store_tile<1>(at + kTileBytes, kTileStride);
}

// The same for two strips at once, 32 rows: every tile that was loaded is used twice.
template <bool raw>
inline void add_two_strips(const uint8_t* codes, const uint8_t* activations, int64_t row_bytes, int64_t inputs,
                           int64_t depth, void* sums) {
    uint8_t* at = static_cast<uint8_t*>(sums);
    uint8_t* below = at + kTileSide * kTileStride;
    const uint8_t* second = activations + kTileSide * row_bytes;
    if (raw) {
        load_tile<0>(at, kTileStride);
        load_tile<1>(at + kTileBytes, kTileStride);
        load_tile<2>(below, kTileStride);
        load_tile<3>(below + kTileBytes, kTileStride);
    } else {
        clear_tile<0>();
        clear_tile<1>();
        clear_tile<2>();
        clear_tile<3>();
    }
    for (int64_t i = 0; i < inputs; i += depth, codes += depth / 4 * kTileStride) {
        load_tile<4>(activations + i, row_bytes);
        load_tile<6>(codes, kTileStride);
        load_tile<7>(codes + kTileBytes, kTileStride);
        load_tile<5>(second + i, row_bytes);
        multiply_bytes<0, 4, 6>();
        multiply_bytes<1, 4, 7>();
        multiply_bytes<2, 5, 6>();
        multiply_bytes<3, 5, 7>();
    }
    store_tile<0>(at, kTileStride);
    store_tile<1>(at + kTileBytes, kTileStride);
    store_tile<2>(below, kTileStride);
    store_tile<3>(below + kTileBytes, kTileStride);
}

// Scale one run's whole numbers and add them to float sums, as the ends of RunSums do.
inline void end_strip(const int32_t* whole, const int32_t* starts, int64_t stride, const float* scales, int64_t rows,
                      float* sums) {
    for (int64_t r = 0; r < rows; ++r) {
        const Vec start = broadcast_vec(starts[r * stride]);
        for (int c = 0; c < kVecs; ++c) {
            const int64_t at = r * kBlock + c * kVecOutputs;
            const Lanes run = to_floats(add32(load_vec(whole + at), start));
            store(sums + at, fma(run, load(scales + c * kVecOutputs), load(sums + at)));
        }
    }
}

template <int bits, int q = 0>
inline void unpack_chunk(const uint8_t* from, uint8_t* to) {
    if constexpr (q < 8) {
        for (int c = 0; c < kVecs; ++c) {
            const Vec quad = quad_of<bits, q>(from + lane_offset(bits, c * kVecOutputs));
            store_vec(to + q * kTileStride + c * sizeof(Vec), quad);
        }
        unpack_chunk<bits, q + 1>(from, to);
    }
}

// sums [rows][64] of a block, as integer_sums gives, for a whole number of strips of 16 rows.
template <int bits, bool raw>
void whole_strips(const Packed& w, const uint8_t* block, const Activations& x, int64_t first, int64_t rows,
                  float* sums) {
    alignas(64) uint8_t codes[kTilePanel * kBlock];
    alignas(64) float scales[kBlock];
    alignas(64) int32_t whole[2 * kTileSide * kBlock];
    const int64_t inputs = padded_inputs(w), depth = raw || x.run % kTileBytes == 0 ? kTileBytes : kChunk;
    const Tiles tiles(kTileSide, depth);
    for (int64_t input = 0; input < inputs; input += kTilePanel) {
        const int64_t span = least(kTilePanel, inputs - input), run = raw ? span : x.run;
        for (int64_t i = 0; i < span; i += kChunk) {
            unpack_chunk<bits>(block + chunk_offset(w, (input + i) / kChunk), codes + i / 4 * kTileStride);
        }
        // A last chunk alone: rows of codes go on with zeros, which meet these.
        if (span % depth) memset(codes + span / 4 * kTileStride, 0, kChunk / 4 * kTileStride);
        for (int64_t i = 0; i < span; i += run) {
            if (!raw) read_scales(w, block + scale_offset(w, (input + i) / kChunk), scales);
            for (int64_t row = 0; row < rows;) {
                const bool two = rows - row >= 2 * kTileSide;
                const int64_t now = two ? 2 * kTileSide : kTileSide;
                const uint8_t* from = codes_at(x, false, first + row, input + i);
                for (int64_t output = 0; output < kBlock; output += 2 * kTileSide) {
                    const uint8_t* weights = codes + i / 4 * kTileStride + output * 4;
                    void* to = raw ? static_cast<void*>(sums + row * kBlock + output) : whole + output;
                    two ? add_two_strips<raw>(weights, from, x.code_stride, run, depth, to)
                        : add_strip<raw>(weights, from, x.code_stride, run, depth, to);
                }
                if (!raw) {
                    const int32_t* starts = x.starts + (first + row) * x.start_stride + (input + i) / run;
                    end_strip(whole, starts, x.start_stride, scales, now, sums + row * kBlock);
                }
                row += now;
            }
        }
    }
}

// sums [rows][64]: the products of one block with rows [first, first + rows) of bf16 activations.
void bf16_block(const Packed& w, int64_t index, const Activations& x, int64_t first, int64_t rows, float* sums) {
    const uint8_t* block = w.data + index * w.block_bytes;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(x.wide) + first * x.code_stride;
    memset(sums, 0, static_cast<size_t>(rows * kBlock) * sizeof(float));
    constexpr int64_t kInputs = kTileBytes / 2;
    alignas(64) float part[kTileSide * kBlock];
    alignas(64) uint8_t last[kTileSide * kTileStride];
    const int64_t whole = w.in_features / kInputs * kInputs;
    // The inputs after the last whole tile; of weights nothing lies behind them.
    memset(last, 0, sizeof last);
    memcpy(last, block + head_bytes(w) + whole * 2 * kBlock,
           static_cast<size_t>(ceil_div(w.in_features - whole, 2) * kTileStride));
    const auto strip = [&](int64_t row, int64_t now) {
        const int64_t stride = x.code_stride * 2;
        for (int64_t begin = 0; begin < w.in_features; begin += kTileDepth) {
            clear_tile<0>();
            clear_tile<1>();
            clear_tile<2>();
            clear_tile<3>();
            for (int64_t i = begin; i < least(begin + kTileDepth, w.in_features); i += kInputs) {
                const uint8_t* weights = i < whole ? block + head_bytes(w) + i * 2 * kBlock : last;
                load_tile<4>(halves + row * x.code_stride + i, stride);
                load_tile<6>(weights, kTileStride);
                load_tile<7>(weights + kTileBytes, kTileStride);
                multiply_bf16<0, 4, 6>();
                multiply_bf16<1, 4, 7>();
                load_tile<6>(weights + 2 * kTileBytes, kTileStride);
                load_tile<7>(weights + 3 * kTileBytes, kTileStride);
                multiply_bf16<2, 4, 6>();
                multiply_bf16<3, 4, 7>();
            }
            store_tile<0>(part, kTileStride);
            store_tile<1>(part + kTileSide, kTileStride);
            store_tile<2>(part + 2 * kTileSide, kTileStride);
            store_tile<3>(part + 3 * kTileSide, kTileStride);
            for (int64_t i = 0; i < now * kBlock; i += kLanes) {
                float* at = sums + row * kBlock + i;
                store(at, load(at) + load(part + i));
            }
        }
    };
    const int64_t strips = rows / kTileSide * kTileSide;
    if (strips) {
        const Tiles tiles(kTileSide, kTileBytes);
        for (int64_t row = 0; row < strips; row += kTileSide) strip(row, kTileSide);
    }
    if (strips < rows) {
        const Tiles tiles(rows - strips, kTileBytes);
        strip(strips, rows - strips);
    }
    scale_rows(w, block, rows, sums);
}

}  // namespace
}  // namespace halve

#endif
