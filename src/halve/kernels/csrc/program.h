// A whole step of a model as a list of instructions over fixed memory: one call from Python a step.
//
// Addresses are fixed when the list is made; what differs from step to step (how many tokens, which cache slots) comes
// with the call. Between instructions every thread of the team has finished.
#pragma once

#include "experts.h"

namespace halve {

enum class Operation : int32_t {
    kEmbed,
    kAngles,
    kPrepare,
    kProduct,
    kReduce,
    kSiluMul,
    kKvWrite,
    kAttention,
    kNorm,
    kRoute,
    kExperts,
    kCombine,
};

struct Instruction {
    Operation operation;
    int32_t of_rows;    // over the rows whose logits are wanted, not over all tokens
    int64_t per_token;  // rows that a token has here: 1, or the experts that it goes to
    void* record;       // Embed, Angles, Prepare, Product, Reduce, Gate, KvWrite, Attention, Norm or of experts.h
};

// cos and sin of positions times frequencies: the angles of rotary embedding (arXiv:2104.09864).
struct Angles {
    const float* frequencies;  // [half], radians a position
    float* cos;                // [T, half]
    float* sin;
    int64_t half;
    float factor;  // by which both are multiplied (arXiv:2309.00071, 3.4)
};

// silu(gate) * up, elementwise, in `out`.
struct Gate {
    const float* gate;  // [T, width]
    const float* up;
    float* out;
    int64_t width;
};

struct StepInput {
    const StepBatch* batch;
    const int32_t* token_ids;  // [T]
    const int32_t* rows;       // [R]
    int64_t num_rows;          // R
    int64_t num_candidates;    // k of Likeliest
};

// Returns 0; 1 without rows for this instruction set; 2 without memory; 3 where a router's logits are NaN.
int32_t run_program(int32_t isa, const Instruction* instructions, int64_t count, const StepInput& input,
                    int32_t threads);

}  // namespace halve
