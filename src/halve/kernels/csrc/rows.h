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
    void (*linear)(const Linear&, int64_t block);    // outputs [block * kOutputBlock, ...)
    void (*embed)(const Embed&, int64_t token);      //
    void (*rms_norm)(const Norm&, int64_t row);      //
    void (*rope)(const Rope&, int64_t token);        //
    void (*add)(const Elementwise&, int64_t block);  // elements [block * kChunk, ...)
    void (*silu_mul)(const Elementwise&, int64_t block);
    void (*to_bf16)(const Elementwise&, int64_t block);     // x rounded to nearest even, as 16 bits
    void (*round_bf16)(const Elementwise&, int64_t block);  // the same, widened to float again
    void (*attention)(const Attention&, int64_t block);     // block = token * head_blocks(...) + head block
    void (*sample)(const Sampling&, int64_t thread);        // rows from `next` until none is left
};

// Query heads of one key-value head are taken kHeadsTogether at a time.
inline int64_t head_blocks(const Attention& a) {
    return a.num_kv_heads * ((a.num_heads / a.num_kv_heads + kHeadsTogether - 1) / kHeadsTogether);
}

extern const Rows rows_baseline;
extern const Rows rows_avx2;
extern const Rows rows_avx512;

}  // namespace halve
