// A block of 64 outputs of any matrix times rows of float activations: exact weights, float32 sums.
//
// A weight is widened to what `Weight.dequantize` means, exactly so where the scale is bf16 (8 bits times 8). Sums have
// one order whatever the rows beside it: stretches of kDepth inputs are summed one input after the other, and stretches
// are added one after the other.
#pragma once

#include "packed_scales.h"
#include "products.h"
#include "simd.h"

namespace halve {
namespace {

constexpr int kDepth = 64;  // inputs of a stretch: 16 KB of floats, which stay in the first-level cache
constexpr int kBlockLanes = static_cast<int>(kBlock) / kLanes;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kFloatRows = 6, kFloatVecs = 4;
#else
constexpr int kFloatRows = 6, kFloatVecs = 2;
#endif

inline Bits load_bits(const uint8_t* p) {
    Bits v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Lanes as_floats(Bits v) {
    Lanes x;
    memcpy(&x, &v, sizeof x);
    return x;
}

// Codes of quad q of a chunk for the outputs of one vector, a byte each; `at` is the chunk's first step there.
inline Bits quad_codes(const uint8_t* at, int bits, int q) {
    if (bits == 8) return load_bits(at + q * kStep);
    Bits codes = {};
    int low = 0;
    if (bits & 4) {
        codes = load_bits(at + q / 2 * kStep) >> (q % 2 * 4) & 0x0f0f0f0fu;
        at += 4 * kStep;
        low = 4;
    }
    if (bits & 2) {
        codes |= (load_bits(at + q / 4 * kStep) >> (q % 4 * 2) & 0x03030303u) << low;
        at += 2 * kStep;
        low += 2;
    }
    if (bits & 1) codes |= (load_bits(at) >> q & 0x01010101u) << low;
    return codes;
}

// Inputs [first, first + depth) of a block of integers, widened to [depth][64] floats; `first` begins a chunk.
template <int bits>
void widen_integers(const Packed& w, const uint8_t* block, int64_t first, int64_t depth, float* out) {
    alignas(64) float scales[kBlock];
    for (int64_t i = 0; i < depth; i += kChunk) {
        const int64_t chunk = (first + i) / kChunk;
        read_scales(w, block + scale_offset(w, chunk), scales);
        const uint8_t* stream = block + chunk_offset(w, chunk);
        const int64_t quads = ceil_div(least(kChunk, depth - i), 4);
        for (int c = 0; c < kBlockLanes; ++c) {
            const Lanes scale = load(scales + c * kLanes);
            for (int64_t q = 0; q < quads; ++q) {
                const Bits codes = quad_codes(stream + lane_offset(bits, c * kLanes), bits, static_cast<int>(q));
                float* to = out + (i + 4 * q) * kBlock + c * kLanes;
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const Ints code = reinterpret_cast<Ints>(codes >> (8 * j) & 0xffu) - (1 << (bits - 1));
                    store(to + j * kBlock, __builtin_convertvector(code, Lanes) * scale);
                }
            }
        }
    }
}

void widen_bf16(const Packed& w, const uint8_t* block, int64_t first, int64_t depth, float* out) {
    const uint8_t* pairs = block + head_bytes(w) + first * 2 * kBlock;
    for (int64_t i = 0; i < depth; i += 2, pairs += 4 * kBlock) {
        for (int c = 0; c < kBlockLanes; ++c) {
            const Bits pair = load_bits(pairs + c * sizeof(Lanes));
            store(out + i * kBlock + c * kLanes, as_floats(pair << 16));
            store(out + (i + 1) * kBlock + c * kLanes, as_floats(pair & 0xffff0000u));
        }
    }
}

// Inputs [first, first + depth) of a block as [depth][64] floats (a row more where depth is odd); one scale a row of
// bf16 matrices is left to the end.
inline void widen_block(const Packed& w, const uint8_t* block, int64_t first, int64_t depth, float* out) {
    switch (w.kind) {
        case Kind::kBfloat16:
            return widen_bf16(w, block, first, depth, out);
        case Kind::kFloat16:
            for (int64_t i = 0; i < depth * kBlock; ++i) {
                uint16_t half;
                memcpy(&half, block + 2 * (first * kBlock + i), sizeof half);
                out[i] = from_half(half);
            }
            return;
        case Kind::kFloat32:
            memcpy(out, block + 4 * first * kBlock, static_cast<size_t>(depth * kBlock) * 4);
            return;
        case Kind::kInt:
            break;
    }
    switch (w.bits) {
        case 2:
            return widen_integers<2>(w, block, first, depth, out);
        case 3:
            return widen_integers<3>(w, block, first, depth, out);
        case 4:
            return widen_integers<4>(w, block, first, depth, out);
        case 5:
            return widen_integers<5>(w, block, first, depth, out);
        case 6:
            return widen_integers<6>(w, block, first, depth, out);
        default:
            return widen_integers<8>(w, block, first, depth, out);
    }
}

// sums [rows][64] += x [rows, stride] times weights [depth][64], `vecs` vectors of outputs.
template <int rows, int vecs>
__attribute__((noinline)) void hot_floats(const float* weights, const float* x, int64_t stride, int64_t depth,
                                          float* sums) {
    Lanes total[rows][vecs];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) total[r][c] = Lanes{};
    }
    for (int64_t k = 0; k < depth; ++k, weights += kBlock) {
        Lanes w[vecs];
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) w[c] = load(weights + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Lanes asked = broadcast(x[r * stride + k]);
#pragma GCC unroll 8
            for (int c = 0; c < vecs; ++c) total[r][c] += w[c] * asked;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < vecs; ++c) {
            float* at = sums + r * kBlock + c * kLanes;
            store(at, load(at) + total[r][c]);
        }
    }
}

typedef void (*FloatTile)(const float*, const float*, int64_t, int64_t, float*);

template <int vecs>
inline FloatTile float_tile(int rows) {
    static constexpr FloatTile tiles[kFloatRows] = {hot_floats<1, vecs>, hot_floats<2, vecs>, hot_floats<3, vecs>,
                                                    hot_floats<4, vecs>, hot_floats<5, vecs>, hot_floats<6, vecs>};
    return tiles[rows - 1];
}

// One scale a row of fp8 weights, which lie as bf16; other scales were taken with the weights.
inline void scale_rows(const Packed& w, const uint8_t* block, int64_t rows, float* sums) {
    if (w.kind != Kind::kBfloat16 || !w.scale_bytes) return;
    alignas(64) float scales[kBlock];
    read_scales(w, block, scales);
    for (int64_t i = 0; i < rows * kBlock; ++i) sums[i] *= scales[i % kBlock];
}

// sums [rows][64]: the products of one block with rows [first, first + rows) of float activations.
void float_block(const Packed& w, int64_t index, const Activations& x, int64_t first, int64_t rows, float* sums) {
    const uint8_t* block = w.data + index * w.block_bytes;
    alignas(64) float staged[(kDepth + 2) * kBlock];
    memset(sums, 0, static_cast<size_t>(rows * kBlock) * sizeof(float));
    const float* values = x.values + first * x.value_stride;
    const int64_t strips = ceil_div(rows, kFloatRows);
    for (int64_t input = 0; input < w.in_features; input += kDepth) {
        const int64_t depth = least(kDepth, w.in_features - input);
        widen_block(w, block, input, depth, staged);
        for (int64_t strip = 0, row = 0; strip < strips; ++strip) {
            const int now = static_cast<int>(ceil_div(rows - row, strips - strip));
            const float* at = values + row * x.value_stride + input;
            if (now == 1) {
                float_tile <
                    kBlockLanes<8 ? kBlockLanes : 8>(1)(staged, at, x.value_stride, depth, sums + row * kBlock);
                if (kBlockLanes > 8) {
                    float_tile<8>(1)(staged + kBlock / 2, at, x.value_stride, depth, sums + row * kBlock + kBlock / 2);
                }
            } else {
                for (int output = 0; output < kBlock; output += kFloatVecs * kLanes) {
                    float_tile<kFloatVecs>(now)(staged + output, at, x.value_stride, depth,
                                                sums + row * kBlock + output);
                }
            }
            row += now;
        }
    }
    scale_rows(w, block, rows, sums);
}

// Row `id` of a table as the floats that its stored bits mean.
void embed_row(const Packed& w, int64_t id, float* out) {
    const uint8_t* block = w.data + id / kBlock * w.block_bytes;
    const int64_t lane = id % kBlock, k = w.in_features;
    if (w.kind == Kind::kInt) {
        for (int64_t i = 0; i < k; i += kChunk) {
            const int64_t chunk = i / kChunk;
            const float scale = scale_of(w, block + scale_offset(w, chunk), lane);
            const uint8_t* stream = block + chunk_offset(w, chunk) + lane_offset(w.bits, lane);
            for (int64_t j = 0; j < least(kChunk, k - i); ++j) {
                const int q = static_cast<int>(j / 4);
                const uint8_t* at = stream + j % 4;
                int code = 0, low = 0;
                if (w.bits == 8) {
                    code = at[q * kStep];
                } else {
                    if (w.bits & 4) {
                        code = at[q / 2 * kStep] >> (q % 2 * 4) & 15;
                        at += 4 * kStep;
                        low = 4;
                    }
                    if (w.bits & 2) {
                        code |= (at[q / 4 * kStep] >> (q % 4 * 2) & 3) << low;
                        at += 2 * kStep;
                        low += 2;
                    }
                    if (w.bits & 1) code |= (at[0] >> q & 1) << low;
                }
                out[i + j] = static_cast<float>(code - (1 << (w.bits - 1))) * scale;
            }
        }
        return;
    }
    const uint8_t* body = block + head_bytes(w);
    const float scale = w.scale_bytes ? scale_of(w, block, lane) : 1.0f;
    for (int64_t i = 0; i < k; ++i) {
        if (w.kind == Kind::kFloat32) {
            memcpy(out + i, body + 4 * (i * kBlock + lane), sizeof *out);
            continue;
        }
        uint16_t half;
        const int64_t at = w.kind == Kind::kBfloat16 ? (i / 2 * kBlock + lane) * 2 + i % 2 : i * kBlock + lane;
        memcpy(&half, body + 2 * at, sizeof half);
        out[i] = (w.kind == Kind::kBfloat16 ? from_bf16(half) : from_half(half)) * scale;
    }
}

}  // namespace
}  // namespace halve
