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
    float* out;
    int64_t size;
};

enum class KvFormat : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// Keys and values of one layer: num_blocks blocks of kv_block_bytes(...), laid out as kv_cache.h says.
struct KvCache {
    void* data;
    int64_t num_blocks;
    int64_t block_size;  // P
    int64_t num_kv_heads;
    int64_t head_dim;
    int32_t format;  // KvFormat
};

// The tokens of one step: sequence s owns tokens cu_seqlens[s] to cu_seqlens[s + 1], their positions count up by one.
struct StepBatch {
    int64_t num_tokens;           // T
    int64_t num_sequences;        // S
    int64_t widest;               //
    const int32_t* positions;     // [T]
    const int32_t* cu_seqlens;    // [S + 1]
    const int32_t* slot_mapping;  // [T], block * P + offset
    const int32_t* block_tables;  // [S, widest]
};

// Strides are floats from one token to the next; heads lie side by side.
struct KvWrite {
    const float* k;  // [T, G, D]
    const float* v;
    int64_t k_stride;
    int64_t v_stride;
    const float* cos;  // [T, D / 2], by which keys are rotated before they are rounded; null: they are not
    const float* sin;
    const KvCache* cache;
    const StepBatch* batch;
};

struct Attention {
    const float* q;  // [T, H, D]
    int64_t q_stride;
    const float* cos;  // [T, D / 2], by which queries are rotated; null: they are not
    const float* sin;
    const KvCache* cache;  // holds the batch's own keys and values too
    const StepBatch* batch;
    const float* sinks;  // [H] or null
    float* out;          // [T, H, D]
    int64_t out_stride;
    int64_t num_heads;
    int64_t window;  // positions that a token sees, itself included; 0 for all
    float* scratch;  // attention_scratch_bytes(...)
};

struct BlockCopies {
    const KvCache* cache;
    const int32_t* pairs;  // [n, 2]: from, to; no block is both
};

// Each function does one block of the work; blocks are independent and may run in any order on any thread.
struct Rows {
    void (*linear)(const Linear&, int64_t block);    // outputs [block * kOutputBlock, ...)
    void (*embed)(const Embed&, int64_t token);      //
    void (*rms_norm)(const Norm&, int64_t row);      //
    void (*rope)(const Rope&, int64_t token);        //
    void (*add)(const Elementwise&, int64_t block);  // elements [block * kChunk, ...)
    void (*silu_mul)(const Elementwise&, int64_t block);
    void (*round_bf16)(const Elementwise&, int64_t block);  // x rounded to nearest even, widened again
    // Units of these: attention_units.h. Whoever runs attention runs attention_combine after it, if that has units.
    void (*kv_write)(const KvWrite&, int64_t unit);
    void (*attention)(const Attention&, int64_t unit);
    void (*attention_combine)(const Attention&, int64_t unit);
    void (*copy_block)(const BlockCopies&, int64_t pair);
};

extern const Rows rows_baseline;
extern const Rows rows_avx2;
extern const Rows rows_avx512;

}  // namespace halve
