// How a matrix [N, K] lies in memory while it is computed with: one layout for every instruction set and row count.
//
// Outputs come in blocks of 64, and a block is one linear stream, so that a thread reads memory in one direction.
//
// Integers. Inputs come in chunks of 32, that is 8 quads of 4 inputs, and a chunk holds the block's outputs 16 by 16,
// so that whoever takes 8 or 16 outputs at a time reads on without leaps. Of 16 outputs, a step is 64 bytes, 4 for
// each: where an output's byte j holds quad q, it belongs to input 4 q + j. Codes are unsigned (code + 2^(bits-1)), and
// cut into planes of 4, 2 and 1 bits, which unpack by one shift and one mask whatever the width:
//
//   8 bits: 8 steps, quad 0 .. 7
//   else    4-bit plane (4, 5 and 6 bits hold their low bits in it): 4 steps, quad 2s in the low nibble, 2s + 1 high
//           2-bit plane (2, 3 and 6 bits): 2 steps, quads 4s .. 4s + 3 from the low bits up
//           1-bit plane (3 and 5 bits): 1 step, quads 0 .. 7 from the low bit up
//
// A plane holds the bits above those of the plane before it. A group of inputs that share a scale begins with the 64
// scales of the block; a matrix with one scale a row has them at the head of each block. K is padded to a multiple of
// 32 with zeros (code 0), N to a multiple of 64.
//
// Floats. bf16 (and fp8, widened to it): pairs of inputs, [ceil(K / 2)][64][2]. fp16 and fp32: [K][64].
#pragma once

#include <stdint.h>

namespace halve {

constexpr int64_t kBlock = 64;  // outputs
constexpr int64_t kChunk = 32;  // inputs
constexpr int64_t kStep = 64;   // bytes: 16 outputs
constexpr int64_t kStepOutputs = 16;

enum class Kind : int32_t { kInt = 0, kBfloat16 = 1, kFloat16 = 2, kFloat32 = 3 };

// A packed matrix. Laid out as ctypes sees it.
struct Packed {
    int64_t out_features;  // N
    int64_t in_features;   // K
    int64_t group;         // inputs that share a scale, a multiple of 32; 0 for one scale a row or none
    int64_t block_bytes;   // from one block of outputs to the next
    const uint8_t* data;   // 64-byte aligned
    Kind kind;
    int32_t bits;         // of kInt: 2 to 6, or 8
    int32_t scale_bytes;  // of one scale: 2 (bf16), 4 (float), 0 for none
};

// A matrix as a file holds it: rows one after the other.
struct Stored {
    int64_t out_features;
    int64_t in_features;
    int64_t group;       // 0 for one scale a row
    const void* codes;   // int8 [N, K]; words [N, ceil(K bits / 32)] below 8 bits; floats [N, K]
    const void* scale;   // [N, K / group] or [N, 1], or null
    int32_t kind;        // of the codes: StoredKind
    int32_t bits;        // of integers
    int32_t scale_kind;  // StoredKind of the scales: bf16, fp16 or fp32
};

enum class StoredKind : int32_t { kInt = 0, kBfloat16 = 1, kFloat16 = 2, kFloat32 = 3, kFloat8 = 4 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t blocks_of(const Packed& w) { return ceil_div(w.out_features, kBlock); }

inline int64_t padded_inputs(const Packed& w) { return ceil_div(w.in_features, kChunk) * kChunk; }

inline int64_t chunk_bytes(const Packed& w) { return w.bits * kBlock * 4; }

// Where, in a chunk of codes of so many bits, the first step of an output's bytes lies.
inline int64_t lane_offset(int bits, int64_t output) {
    return output / kStepOutputs * (bits * kStep) + output % kStepOutputs * 4;
}

// Bytes of the 64 scales at the head of a group, or of a block where there is one scale a row.
inline int64_t head_bytes(const Packed& w) { return kBlock * w.scale_bytes; }

// Where chunk c of a block of integers begins.
inline int64_t chunk_offset(const Packed& w, int64_t chunk) {
    if (!w.group) return head_bytes(w) + chunk * chunk_bytes(w);
    return (chunk * kChunk / w.group + 1) * head_bytes(w) + chunk * chunk_bytes(w);
}

// Where the scales of chunk c of a block of integers begin.
inline int64_t scale_offset(const Packed& w, int64_t chunk) {
    if (!w.group) return 0;
    const int64_t group = chunk * kChunk / w.group;
    return group * (head_bytes(w) + w.group / kChunk * chunk_bytes(w));
}

// Fill in all but `data` of the packed form of a matrix; returns the bytes that it takes.
int64_t plan_packing(const Stored& from, Packed* to);

// Write blocks [first, last) of the packed form to `out`, where block 0 begins.
void pack_blocks(const Stored& from, const Packed& to, uint8_t* out, int64_t first, int64_t last);

}  // namespace halve
