// Sparse feed-forwards of a step: which experts each token goes to, their products, the sum of what they give.
//
// Letters: T tokens, E experts, k experts a token. A place is one of T * k: a token at one of its experts, sorted by
// expert, then by token. Source: arXiv:1701.06538.
#pragma once

#include "rows.h"

namespace halve {

constexpr int64_t kMostChosen = 64;

// The k largest logits of each token, equals to the lower expert. Their weights are of the softmax over all experts,
// where `renormalize` over those chosen, times `scale`.
struct Route {
    const float* logits;  // [T, E]
    int64_t experts;      // E
    int64_t top_k;        // k, at most kMostChosen
    int32_t renormalize;
    float scale;
    int32_t* chosen;   // [T, k], rising
    float* weights;    // [T, k]
    int32_t* places;   // [T, k]
    int32_t* tokens;   // [T * k], whose place it is
    int32_t* offsets;  // [E + 1], where each expert's places begin
    int64_t* counted;  // [E], added to: tokens that each expert got
    int64_t* totals;   // [2], added to: steps, and experts that were read in them
    int32_t* broken;   // 1 where a logit is NaN
};

// Products of every expert that has places, but for those without members here.
struct Experts {
    const Route* route;
    const Product* each;   // [E], outputs [T * k, N] of all; input and rows come from the route
    Activations tokens;    // [T], from where rows are brought to their places; none: they are there
    Activations places;    // [T * k]
    int64_t row_bytes[5];  // of values, codes, wide, scale and starts; 0 for what products don't read
};

// x += the weighted sum over a token's experts, in the order of the experts, and what an expert for all tokens gives.
struct Combine {
    const Route* route;
    const float* y;       // [T * k, width]
    const float* shared;  // [T, width] or null
    const float* shares;  // [T], logits whose sigmoid `shared` is multiplied by, or null
    float* x;             // [T, width]
    int64_t width;
};

// Each returns what run_program returns.
int32_t route(const Route& r, int64_t num_tokens, int32_t threads);
int32_t run_experts(int32_t isa, const Experts& e, int32_t threads);
int32_t combine(const Combine& c, int64_t num_tokens, int32_t threads);

}  // namespace halve
