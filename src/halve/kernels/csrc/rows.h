// What the rows of every instruction set have in common: the records they take and the table they fill.
//
// Letters: M activation rows, N outputs, K inputs; T tokens, H query heads, G key-value heads, D head size, B blocks
// of the cache, P tokens a block. Everything is C-contiguous. The records are laid out as ctypes sees them.
#pragma once

#include <cstdint>

#include "products.h"

namespace halve {

// Bumped whenever a record or a signature below changes; native.py refuses a library of another version.
constexpr int32_t kAbiVersion = 9;

constexpr int64_t kElements = 4096;  // elements of an elementwise operation that are handed out together
constexpr int64_t kMaxHeadDim = 1024;

struct Embed {
    const Packed* table;
    const int32_t* ids;  // [T], each in [0, N)
    float* y;            // [T, K]
};

// Rows of `parts` vectors that lie side by side, each normed by itself; y may be x.
struct Norm {
    const float* x;     // [T, x_stride], of which parts * width
    const float* gain;  // [width]
    float* y;           // [T, y_stride]
    int64_t x_stride;
    int64_t y_stride;
    int64_t parts;
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

enum class KvFormat : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

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
    int64_t chunk;   // a token sees those of its own chunk of so many positions; 0 for all
    float* scratch;  // attention_scratch_bytes(...)
};

struct BlockCopies {
    const KvCache* cache;
    const int32_t* pairs;  // [n, 2]: from, to; no block is both
};

// How the next token of R rows is chosen; halve/kernels/sampling.py tells what each means. Histories and biases are
// ragged: row r owns ids[offsets[r]] to ids[offsets[r + 1]]; null where nothing counts.
struct Sampling {
    const float* logits;  // [R, vocab]
    int64_t rows;         // R
    int64_t vocab;
    const float* temperature;  // [R], as all below
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const float* typical_p;
    const uint64_t* seed;
    const int64_t* step;
    const float* presence_penalty;
    const float* frequency_penalty;
    const float* repetition_penalty;
    const int32_t* num_logprobs;
    const int32_t* prompt_ids;
    const int64_t* prompt_offsets;  // [R + 1]
    const int32_t* output_ids;
    const int64_t* output_offsets;
    const int32_t* bias_ids;
    const int64_t* bias_offsets;
    const float* bias_values;
    const uint32_t* allowed;  // [R, ceil(vocab / 32)] or null
    int64_t most_logprobs;    // width of the two below
    int32_t* token_ids;       // [R]
    float* logprobs;          // [R]
    int32_t* top_ids;         // [R, most_logprobs]
    float* top_logprobs;
    int32_t* status;  // [R], 0 where a token was chosen
    int64_t* next;    // 0: the next row that no thread has
    void* scratch;    // sampling_bytes for each thread, zero at first and then left alone
};

constexpr int64_t kStretch = 64;  // logits that share a maximum; a multiple of every vector
constexpr int kBinBits = 11;      // of the histogram that finds a cut

inline int64_t whole_stretches(int64_t vocab) { return (vocab + kStretch - 1) / kStretch * kStretch; }

// Memory that one thread works in: four doubles, four words and a share of a maximum for each token, and the histogram.
inline int64_t sampling_bytes(int64_t vocab) {
    const int64_t n = whole_stretches(vocab);
    return (n * 48 + n / kStretch * 4 + (8 << kBinBits) + 63) / 64 * 64;
}

// Each function does one block of the work; blocks are independent and may run in any order on any thread.
struct Rows {
    void (*prepare)(const Prepare&, int64_t row);
    void (*product)(const Product&, int64_t unit);
    void (*grouped)(const Grouped&, int64_t unit);
    void (*reduce)(const Reduce&, int64_t row);
    void (*embed)(const Embed&, int64_t token);      //
    void (*rms_norm)(const Norm&, int64_t part);     // part % parts of row part / parts
    void (*rope)(const Rope&, int64_t token);        //
    void (*add)(const Elementwise&, int64_t block);  // elements [block * kElements, ...)
    void (*silu_mul)(const Elementwise&, int64_t block);
    void (*round_bf16)(const Elementwise&, int64_t block);  // x rounded to nearest even, widened again
    // Units of these: attention_units.h. Whoever runs attention runs attention_combine after it, if that has units.
    void (*kv_write)(const KvWrite&, int64_t unit);
    void (*attention)(const Attention&, int64_t unit);
    void (*attention_combine)(const Attention&, int64_t unit);
    void (*copy_block)(const BlockCopies&, int64_t pair);
    void (*sample)(const Sampling&, int64_t thread);  // rows from `next` until none is left
};

extern const Rows rows_baseline;
extern const Rows rows_avx2;
extern const Rows rows_avx512;
extern const Rows rows_avx512bf16;
extern const Rows rows_avxvnni;
extern const Rows rows_amx;
extern const Rows rows_neon_dotprod;
extern const Rows rows_neon_i8mm;

}  // namespace halve
