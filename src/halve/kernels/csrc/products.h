// The records of products: activations in, packed weights beside them, outputs.
//
// Letters: T activation rows, N outputs, K inputs.
#pragma once

#include "packing.h"

namespace halve {

// How the input of a product is rounded before it.
enum class Rounding : int32_t { kNone = 0, kBfloat16 = 1, kInt8 = 2 };

// Rows of activations as products take them; K' is K padded to a multiple of 32.
//
// Floats: `values` [T, value_stride]; for bf16 weights, where the rows multiply bf16, their bits in `wide` [T,
// code_stride], and beyond K zeros. Int8 (one scale a row, x ~ code * scale): `codes` [T, code_stride] and beyond K
// zeros, or for 8-bit weights on AVX2, which multiplies them as 16 bits, `wide` [T, code_stride]: those of a quad in
// the order 0, 2, 1, 3; `scale` [T]; and `starts` [T, start_stride]: for each run of `run` inputs, minus the weights'
// zero point times the sum of its codes, which is where the integer sums of the run begin. With run = 0 a row has one
// start, of all its inputs. AVX2 multiplies narrower weights in pairs into 16 bits, and there a start is two int16, of
// the even and of the odd pairs (`bits` and `split` say so to csrc/prepare.h).
struct Activations {
    float* values;
    int8_t* codes;
    int16_t* wide;
    float* scale;
    int32_t* starts;
    int64_t value_stride;
    int64_t code_stride;
    int64_t start_stride;
    int32_t run;    // inputs, a multiple of 16
    int32_t bits;   // of the weights that the codes will meet
    int32_t split;  // a start is two int16
};

// RMSNorm (arXiv:1910.07467) where there is a gain, then rounding.
struct Prepare {
    const float* x;       // [T, x_stride]
    const float* gain;    // [K], or null: no norm
    const int32_t* rows;  // [T] which rows of x, or null: all in order
    Activations out;
    int64_t x_stride;
    int64_t width;  // K
    float eps;
    Rounding rounding;
};

constexpr int kMaxMembers = 4;

// A token and its logit. value +infinity: the logits are broken; -infinity: there is none.
struct Best {
    float value;
    int32_t id;
};

constexpr int64_t kMostCandidates = 64;

// The k likeliest tokens of each row, kept in place of all its logits. Each thread that works on the product has a
// place with a list for each row. `floors` tells the places of each other: where one holds k tokens of a row, what is
// below the last of them is not among the k likeliest. A floor spares work and changes no answer, so it may be seen
// late.
struct Likeliest {
    Best* lists;     // [places, T, k], or null
    int32_t* held;   // [places, T], tokens in each list; 0 before the product, and `reduce` leaves it so
    float* floors;   // [T], the lowest float before the product, and `reduce` leaves it so
    int32_t* taken;  // [places], 0 while no thread is there
    int64_t places;  // at least as many as threads
    int64_t k;       // of a step, at most kMostCandidates
};

// Products of one input with several matrices, or one gated pair.
struct Product {
    Activations x;
    const Packed* weight[kMaxMembers];
    const float* bias[kMaxMembers];  // [N] or null
    float* y[kMaxMembers];           // [T, y_stride]
    int64_t y_stride[kMaxMembers];
    Likeliest likeliest;  // in y[0]'s place
    int64_t rows;         // T
    int32_t members;      // matrices
    int32_t add;          // y += product: the residual stream
    int32_t gated;        // two members, y[0] = silu(x W0) * (x W1) (arXiv:2002.05202)
    Rounding rounding;
    // Of a gate that is not silu: g * sigmoid(alpha * g) * (u + 1) of g = min(x W0, limit) and u = x W1 within +-limit
    // (arXiv:2508.10925); limit 0 for silu.
    float alpha;
    float limit;
};

// Rows of a product are taken this many at a time, so that a block's sums stay in the second-level cache.
constexpr int64_t kRowsTogether = 256;

inline int64_t product_blocks(const Product& p) {
    if (p.gated) return blocks_of(*p.weight[0]);
    int64_t blocks = 0;
    for (int i = 0; i < p.members; ++i) blocks += blocks_of(*p.weight[i]);
    return blocks;
}

// Units of a product: blocks of outputs, each for every kRowsTogether rows.
inline int64_t product_units(const Product& p) {
    return p.rows ? product_blocks(p) * ceil_div(p.rows, kRowsTogether) : 0;
}

// Multiply-adds, for deciding how many threads are worth waking.
inline int64_t product_cost(const Product& p) {
    int64_t cost = 0;
    for (int i = 0; i < p.members; ++i) cost += p.rows * p.weight[i]->out_features * p.weight[i]->in_features;
    return cost;
}

// Products of rows that were sorted by expert: each expert's own rows with its own matrices, in one go, so that a step
// reads every active expert's weights once and no thread waits for another expert's rows.
struct Grouped {
    const Product* experts;
    int64_t count;
};

inline int64_t grouped_units(const Grouped& g) {
    int64_t units = 0;
    for (int64_t e = 0; e < g.count; ++e) units += product_units(g.experts[e]);
    return units;
}

// The k likeliest tokens of a row from those of all places.
struct Reduce {
    Likeliest from;
    int64_t rows;   // T
    float* logits;  // [T, k], by id; -infinity where there are fewer, and one is +infinity where logits are broken
    int32_t* ids;   // [T, k]
};

}  // namespace halve
