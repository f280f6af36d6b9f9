// What the rows of every instruction set have in common: the records they take and the table they fill.
//
// Letters: M activation rows, N outputs, K inputs; T tokens, H query heads, G key-value heads, D head size, B blocks
// of the cache, P tokens a block. Everything is C-contiguous. The records are laid out as ctypes sees them.
#pragma once

#include <cstdint>

namespace halve {

// Bumped whenever a record or a signature below changes; native.py refuses a library of another version.
constexpr int32_t kAbiVersion = 2;

constexpr int64_t kOutputBlock = 16;  // outputs of a product that are handed out together
constexpr int64_t kChunk = 4096;      // elements of an elementwise operation that are handed out together
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kHeadsTogether = 8;  // query heads that share one pass over their keys and values

enum class Kind : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt4 = 3, kInt8 = 4 };

// A stored matrix [N, K]. kInt4: codes + 8 as nibbles, the low one first, K / 2 bytes a row. Integer kinds have a
// bf16 scale for every `group` inputs of a row; `group` divides K.
struct Matrix {
    int64_t out_features;
    int64_t in_features;
    int64_t group;
    const void* codes;
    const uint16_t* scale;
    int32_t kind;
};

struct Linear {
    const Matrix* weight;
    const float* x;     // [M, K]
    const float* bias;  // [N] or null
    float* y;           // [M, N]
    int64_t rows;       // M
};

struct Embed {
    const Matrix* table;
    const int32_t* ids;  // [T], each in [0, N)
    float* y;            // [T, K]
};

struct Norm {
    const float* x;     // [T, width]
    const float* gain;  // [width]
    float* y;           // [T, width]
    int64_t width;
    float eps;
};

struct Rope {
    const float* x;    // [T, heads * head_dim]
    const float* cos;  // [T, head_dim / 2]
    const float* sin;
    float* y;
    int64_t heads;
    int64_t head_dim;
};

struct Elementwise {
    const float* x;
    const float* y;
    void* out;  // float, or uint16 bits of bf16
    int64_t size;
};

struct Attention {
    const float* q;               // [T, H, D]
    const void* k;                // [B, P, G, D] or, without block_tables, [T, G, D]; float, or uint16 bits of bf16
    const void* v;                // as k
    const int32_t* positions;     // [T]
    const int32_t* cu_seqlens;    // [S + 1]
    const int32_t* block_tables;  // [S, widest] or null: the batch holds whole sequences
    const float* sinks;           // [H] or null
    float* out;                   // [T, H, D]
    int64_t num_sequences;        // S
    int64_t widest;
    int64_t block_size;  // P
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t window;  // positions that a token sees, itself included; 0 for all
    int32_t bf16;
};

// Each function does one block of the work; blocks are independent and may run in any order on any thread.
struct Rows {
    void (*linear)(const Linear&, int64_t block);    // outputs [block * kOutputBlock, ...)
    void (*embed)(const Embed&, int64_t token);      //
    void (*rms_norm)(const Norm&, int64_t row);      //
    void (*rope)(const Rope&, int64_t token);        //
    void (*add)(const Elementwise&, int64_t block);  // elements [block * kChunk, ...)
    void (*silu_mul)(const Elementwise&, int64_t block);
    void (*to_bf16)(const Elementwise&, int64_t block);     // x rounded to nearest even, as 16 bits
    void (*round_bf16)(const Elementwise&, int64_t block);  // the same, widened to float again
    void (*attention)(const Attention&, int64_t block);     // block = token * head_blocks(...) + head block
};

// Query heads of one key-value head are taken kHeadsTogether at a time.
inline int64_t head_blocks(const Attention& a) {
    return a.num_kv_heads * ((a.num_heads / a.num_kv_heads + kHeadsTogether - 1) / kHeadsTogether);
}

extern const Rows rows_baseline;
extern const Rows rows_avx2;
extern const Rows rows_avx512;

}  // namespace halve
