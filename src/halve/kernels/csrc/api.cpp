// The C interface that halve.kernels.native calls through ctypes: addresses and counts, nothing allocated, nothing
// thrown. Shapes, element types and indices were checked by the caller. Functions of an instruction set return 0, or
// 1 when it was not compiled into this library.
#include "attention_units.h"
#include "dispatch.h"
#include "kv_layout.h"
#include "program.h"

namespace halve {
namespace {

int64_t chunks(int64_t size) { return (size + kElements - 1) / kElements; }

}  // namespace
}  // namespace halve

using namespace halve;

#define HALVE_API extern "C" __attribute__((visibility("default")))

HALVE_API int32_t halve_abi_version() { return kAbiVersion; }

// Bit i is set when instruction set i is in this library.
HALVE_API int32_t halve_isas() {
    int32_t mask = 0;
    for (int i = 0; i < kNumIsas; ++i) mask |= kIsas[i] ? 1 << i : 0;
    return mask;
}

HALVE_API int32_t halve_grow_team(int32_t threads) { return grow_team(threads); }

// Worker i of the team runs on cores[i % count]; count 0: wherever the system likes. 1 where that can't be had.
HALVE_API int32_t halve_pin_team(const int32_t* cores, int64_t count) { return pin_team(cores, count); }

// Fill in what a packed matrix is, all but its address; returns its bytes.
HALVE_API int64_t halve_plan_packing(const Stored* from, Packed* to) { return plan_packing(*from, to); }

HALVE_API int32_t halve_pack(const Stored* from, const Packed* to, uint8_t* out, int32_t threads) {
    struct Context {
        const Stored& from;
        const Packed& to;
        uint8_t* out;
    };
    const Context context{*from, *to, out};
    run(
        [](const void* of, int64_t block) {
            const Context& c = *static_cast<const Context*>(of);
            pack_blocks(c.from, c.to, c.out, block, block + 1);
        },
        &context, blocks_of(*to), threads);
    return 0;
}

HALVE_API int32_t halve_prepare(int32_t isa, const Prepare* work, int64_t rows, int32_t threads) {
    return spread(isa, &Rows::prepare, *work, rows, rows * work->width, threads);
}

HALVE_API int32_t halve_product(int32_t isa, const Product* work, int32_t threads) {
    return spread(isa, &Rows::product, *work, product_units(*work), product_cost(*work), threads);
}

HALVE_API int32_t halve_grouped(int32_t isa, const Product* experts, int64_t count, int32_t threads) {
    const Grouped work = {experts, count};
    int64_t cost = 0;
    for (int64_t e = 0; e < count; ++e) cost += product_cost(experts[e]);
    return spread(isa, &Rows::grouped, work, grouped_units(work), cost, threads);
}

HALVE_API int32_t halve_embed(int32_t isa, const Packed* table, const int32_t* ids, float* y, int64_t tokens,
                              int32_t threads) {
    return spread(isa, &Rows::embed, {table, ids, y}, tokens, tokens * table->in_features, threads);
}

HALVE_API int32_t halve_rms_norm(int32_t isa, const float* x, const float* gain, float* y, int64_t rows, int64_t width,
                                 float eps, int32_t threads) {
    return spread(isa, &Rows::rms_norm, {x, gain, y, width, width, 1, width, eps}, rows, rows * width, threads);
}

HALVE_API int32_t halve_rope(int32_t isa, const float* x, const float* cos, const float* sin, float* y, int64_t tokens,
                             int64_t heads, int64_t head_dim, int32_t threads) {
    return spread(isa, &Rows::rope, {x, cos, sin, y, heads, head_dim}, tokens, tokens * heads * head_dim, threads);
}

HALVE_API int32_t halve_add(int32_t isa, const float* x, const float* y, float* out, int64_t size, int32_t threads) {
    return spread(isa, &Rows::add, {x, y, out, size}, chunks(size), size, threads);
}

HALVE_API int32_t halve_silu_mul(int32_t isa, const float* gate, const float* up, float* out, int64_t size,
                                 int32_t threads) {
    return spread(isa, &Rows::silu_mul, {gate, up, out, size}, chunks(size), size, threads);
}

HALVE_API int32_t halve_round_bf16(int32_t isa, const float* x, float* out, int64_t size, int32_t threads) {
    return spread(isa, &Rows::round_bf16, {x, nullptr, out, size}, chunks(size), size, threads);
}

HALVE_API int64_t halve_kv_block_bytes(const KvCache* cache) { return kv_block_bytes(*cache); }

HALVE_API int32_t halve_kv_write(int32_t isa, const KvWrite* work, int32_t threads) {
    const int64_t cost = work->batch->num_tokens * work->cache->num_kv_heads * work->cache->head_dim;
    return spread(isa, &Rows::kv_write, *work, kv_write_units(*work), cost, threads);
}

HALVE_API int32_t halve_copy_blocks(int32_t isa, const KvCache* cache, const int32_t* pairs, int64_t num_pairs,
                                    int32_t threads) {
    const int64_t cost = num_pairs * cache->block_size * cache->num_kv_heads * cache->head_dim;
    return spread(isa, &Rows::copy_block, {cache, pairs}, num_pairs, cost, threads);
}

HALVE_API int64_t halve_attention_scratch(const Attention* work) { return attention_scratch_bytes(*work); }

HALVE_API int32_t halve_attention(int32_t isa, const Attention* work, int32_t threads) {
    const int64_t width = work->num_heads * work->cache->head_dim, tokens = work->batch->num_tokens;
    int64_t seen = 0;
    for (int64_t t = 0; t < tokens; ++t) seen += work->batch->positions[t] + 1;
    const int32_t absent = spread(isa, &Rows::attention, *work, attention_units(*work), seen * width, threads);
    const int64_t sums = attention_combine_units(*work);
    return absent || !sums ? absent : spread(isa, &Rows::attention_combine, *work, sums, tokens * width, threads);
}

// Scratch that `halve_sample` needs for each thread, in KiB.
HALVE_API int32_t halve_sampling_kib(int64_t vocab) {
    return static_cast<int32_t>((sampling_bytes(vocab) + 1023) / 1024);
}

HALVE_API int32_t halve_sample(int32_t isa, const Sampling* work, int32_t threads) {
    const int64_t shares = work->rows < threads ? work->rows : threads;
    return spread(isa, &Rows::sample, *work, shares, work->rows * work->vocab, threads);
}

HALVE_API int32_t halve_run(int32_t isa, const Instruction* instructions, int64_t count, const StepInput* input,
                            int32_t threads) {
    return run_program(isa, instructions, count, *input, threads);
}
