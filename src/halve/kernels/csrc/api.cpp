// The C interface that halve.kernels.native calls through ctypes: addresses and counts, nothing allocated, nothing
// thrown. Shapes, element types and indices were checked by the caller. Functions of an instruction set return 0, or
// 1 when it was not compiled into this library.
#include "attention_units.h"
#include "kv_layout.h"
#include "pool.h"
#include "rows.h"

namespace halve {
namespace {

constexpr int64_t kWorthThread = 1 << 15;  // multiply-adds, about; below, waking another thread costs more

const Rows* const kIsas[] = {
    &rows_baseline,
#ifdef HALVE_HAS_AVX2
    &rows_avx2,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_AVX512
    &rows_avx512,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_AVX512BF16
    &rows_avx512bf16,
#else
    nullptr,
#endif
};
constexpr int kNumIsas = sizeof kIsas / sizeof *kIsas;

const Rows* rows_of(int32_t isa) { return isa >= 0 && isa < kNumIsas ? kIsas[isa] : nullptr; }

// Run one operation of an instruction set, block by block.
template <class Work>
int32_t spread(int32_t isa, void (*Rows::*operation)(const Work&, int64_t), const Work& work, int64_t blocks,
               int64_t cost, int32_t threads) {
    const Rows* rows = rows_of(isa);
    if (!rows) return 1;
    struct Context {
        void (*operation)(const Work&, int64_t);
        const Work& work;
    };
    const Context context{rows->*operation, work};
    run(
        [](const void* of, int64_t block) {
            const Context& c = *static_cast<const Context*>(of);
            c.operation(c.work, block);
        },
        &context, blocks, cost < kWorthThread ? 1 : threads);
    return 0;
}

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
    int64_t cost = 0;
    for (int i = 0; i < work->members; ++i) {
        cost += work->rows * work->weight[i]->out_features * work->weight[i]->in_features;
    }
    return spread(isa, &Rows::product, *work, product_units(*work), cost, threads);
}

HALVE_API int32_t halve_embed(int32_t isa, const Packed* table, const int32_t* ids, float* y, int64_t tokens,
                              int32_t threads) {
    return spread(isa, &Rows::embed, {table, ids, y}, tokens, tokens * table->in_features, threads);
}

HALVE_API int32_t halve_rms_norm(int32_t isa, const float* x, const float* gain, float* y, int64_t rows, int64_t width,
                                 float eps, int32_t threads) {
    return spread(isa, &Rows::rms_norm, {x, gain, y, width, eps}, rows, rows * width, threads);
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

HALVE_API int32_t halve_kv_write(int32_t isa, const KvCache* cache, const StepBatch* batch, const float* k,
                                 const float* v, int32_t threads) {
    const int64_t width = cache->num_kv_heads * cache->head_dim;
    const KvWrite work = {k, v, width, width, nullptr, nullptr, cache, batch};
    return spread(isa, &Rows::kv_write, work, kv_write_units(work), batch->num_tokens * width, threads);
}

HALVE_API int32_t halve_copy_blocks(int32_t isa, const KvCache* cache, const int32_t* pairs, int64_t num_pairs,
                                    int32_t threads) {
    const int64_t cost = num_pairs * cache->block_size * cache->num_kv_heads * cache->head_dim;
    return spread(isa, &Rows::copy_block, {cache, pairs}, num_pairs, cost, threads);
}

HALVE_API int64_t halve_attention_scratch(const KvCache* cache, const StepBatch* batch, int64_t num_heads) {
    Attention work = {};
    work.cache = cache;
    work.batch = batch;
    work.num_heads = num_heads;
    return attention_scratch_bytes(work);
}

HALVE_API int32_t halve_attention(int32_t isa, const KvCache* cache, const StepBatch* batch, const float* q,
                                  const float* sinks, float* out, float* scratch, int64_t num_heads, int64_t window,
                                  int32_t threads) {
    const int64_t width = num_heads * cache->head_dim;
    const Attention work = {q, width, nullptr, nullptr, cache, batch, sinks, out, width, num_heads, window, scratch};
    int64_t seen = 0;
    for (int64_t t = 0; t < batch->num_tokens; ++t) seen += batch->positions[t] + 1;
    const int32_t absent = spread(isa, &Rows::attention, work, attention_units(work), seen * width, threads);
    const int64_t sums = attention_combine_units(work);
    return absent || !sums ? absent
                           : spread(isa, &Rows::attention_combine, work, sums, batch->num_tokens * width, threads);
}

// Scratch that `halve_sample` needs for each thread, in KiB.
HALVE_API int32_t halve_sampling_kib(int64_t vocab) {
    return static_cast<int32_t>((sampling_bytes(vocab) + 1023) / 1024);
}

HALVE_API int32_t halve_sample(int32_t isa, const Sampling* work, int32_t threads) {
    const int64_t shares = work->rows < threads ? work->rows : threads;
    return spread(isa, &Rows::sample, *work, shares, work->rows * work->vocab, threads);
}
