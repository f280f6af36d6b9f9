#include "program.h"

#include <math.h>

#include "attention_units.h"
#include "dispatch.h"
#include "scratch.h"

namespace halve {
namespace {

thread_local Scratch scratch;  // attention's partial sums

void angles(const Angles& a, const StepBatch& batch) {
    for (int64_t t = 0; t < batch.num_tokens; ++t) {
        for (int64_t i = 0; i < a.half; ++i) {
            const float angle = static_cast<float>(batch.positions[t]) * a.frequencies[i];
            a.cos[t * a.half + i] = cosf(angle) * a.factor;
            a.sin[t * a.half + i] = sinf(angle) * a.factor;
        }
    }
}

int32_t attend(int32_t isa, Attention work, const StepBatch& batch, int32_t threads) {
    work.batch = &batch;
    const int64_t wanted = attention_scratch_bytes(work), width = work.num_heads * work.cache->head_dim;
    if (!scratch.holds(wanted)) return 2;
    work.scratch = static_cast<float*>(scratch.data);
    int64_t seen = 0;
    for (int64_t t = 0; t < batch.num_tokens; ++t) seen += batch.positions[t] + 1;
    spread(isa, &Rows::attention, work, attention_units(work), seen * width, threads);
    const int64_t sums = attention_combine_units(work);
    if (sums) spread(isa, &Rows::attention_combine, work, sums, batch.num_tokens * width, threads);
    return 0;
}

int32_t run_one(int32_t isa, const Instruction& instruction, const StepInput& input, int32_t threads) {
    const StepBatch& batch = *input.batch;
    const int64_t rows = instruction.of_rows ? input.num_rows : batch.num_tokens * instruction.per_token;
    switch (instruction.operation) {
        case Operation::kEmbed: {
            Embed work = *static_cast<const Embed*>(instruction.record);
            work.ids = input.token_ids;
            return spread(isa, &Rows::embed, work, rows, rows * work.table->in_features, threads);
        }
        case Operation::kAngles:
            angles(*static_cast<const Angles*>(instruction.record), batch);
            return 0;
        case Operation::kPrepare: {
            Prepare work = *static_cast<const Prepare*>(instruction.record);
            work.rows = instruction.of_rows ? input.rows : nullptr;
            return spread(isa, &Rows::prepare, work, rows, rows * work.width, threads);
        }
        case Operation::kProduct: {
            Product work = *static_cast<const Product*>(instruction.record);
            work.rows = rows;
            work.likeliest.k = input.num_candidates;
            return spread(isa, &Rows::product, work, product_units(work), product_cost(work), threads);
        }
        case Operation::kReduce: {
            Reduce work = *static_cast<const Reduce*>(instruction.record);
            work.from.k = input.num_candidates;
            work.rows = rows;
            return spread(isa, &Rows::reduce, work, rows, rows * work.from.places * work.from.k, threads);
        }
        case Operation::kSiluMul: {
            const Gate& gate = *static_cast<const Gate*>(instruction.record);
            const Elementwise work = {gate.gate, gate.up, gate.out, rows * gate.width};
            return spread(isa, &Rows::silu_mul, work, ceil_div(work.size, kElements), work.size, threads);
        }
        case Operation::kKvWrite: {
            KvWrite work = *static_cast<const KvWrite*>(instruction.record);
            work.batch = &batch;
            const int64_t cost = rows * work.cache->num_kv_heads * work.cache->head_dim;
            return spread(isa, &Rows::kv_write, work, kv_write_units(work), cost, threads);
        }
        case Operation::kAttention:
            return attend(isa, *static_cast<const Attention*>(instruction.record), batch, threads);
        case Operation::kNorm: {
            const Norm& work = *static_cast<const Norm*>(instruction.record);
            return spread(isa, &Rows::rms_norm, work, rows * work.parts, rows * work.parts * work.width, threads);
        }
        case Operation::kRoute:
            return route(*static_cast<const Route*>(instruction.record), rows, threads);
        case Operation::kExperts:
            return run_experts(isa, *static_cast<const Experts*>(instruction.record), threads);
        case Operation::kCombine:
            return combine(*static_cast<const Combine*>(instruction.record), rows, threads);
    }
    return 1;
}

}  // namespace

int32_t run_program(int32_t isa, const Instruction* instructions, int64_t count, const StepInput& input,
                    int32_t threads) {
    for (int64_t i = 0; i < count; ++i) {
        if (const int32_t failed = run_one(isa, instructions[i], input, threads)) return failed;
    }
    return 0;
}

}  // namespace halve
