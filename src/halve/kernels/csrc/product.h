// One unit of a product: a block of 64 outputs for up to kRowsTogether rows, then bias, gate and residual.
#pragma once

#include "amx_tiles.h"
#include "bf16_products.h"
#include "float_products.h"
#include "integer_products.h"
#include "likeliest.h"

namespace halve {
namespace {

// sums [rows][64] of one block, by the loops that this instruction set has for its weights and activations.
inline void multiply_block(const Packed& w, Rounding rounding, int64_t block, const Activations& x, int64_t first,
                           int64_t rows, float* sums) {
#if defined(HALVE_INTEGER_VECTORS)
    if (rounding == Rounding::kInt8 && w.kind == Kind::kInt) return integer_block(w, block, x, first, rows, sums);
#endif
#if defined(HALVE_BF16_PRODUCTS)
    if (rounding == Rounding::kBfloat16 && w.kind == Kind::kBfloat16) return bf16_block(w, block, x, first, rows, sums);
#endif
    (void)rounding;
    float_block(w, block, x, first, rows, sums);
}

inline void block_sums(const Product& p, int member, int64_t block, int64_t first, int64_t rows, float* sums) {
    const Packed& w = *p.weight[member];
    multiply_block(w, p.rounding, block, p.x, first, rows, sums);
    const float* bias = p.bias[member];
    if (!bias) return;
    const int64_t outputs = least(kBlock, w.out_features - block * kBlock);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < outputs; ++n) sums[r * kBlock + n] += bias[block * kBlock + n];
    }
}

inline Lanes silu(Lanes x) { return x / (exp(-x) + 1.0f); }

inline Lanes clamped(Lanes gate, Lanes up, float alpha, float limit) {
    const Lanes most = broadcast(limit), lowest = -most;
    gate = gate > most ? most : gate;
    up = up > most ? most : up;
    up = up < lowest ? lowest : up;
    return gate / (exp(-alpha * gate) + 1.0f) * (up + 1.0f);
}

void product(const Product& p, int64_t unit) {
    const int64_t parts = ceil_div(p.rows, kRowsTogether), first = unit % parts * kRowsTogether;
    const int64_t rows = least(kRowsTogether, p.rows - first);
    int64_t block = unit / parts;
    int member = 0;
    while (!p.gated && block >= blocks_of(*p.weight[member])) block -= blocks_of(*p.weight[member++]);
    alignas(64) float sums[kRowsTogether * kBlock];
    block_sums(p, member, block, first, rows, sums);
    if (p.gated) {
        alignas(64) float up[kRowsTogether * kBlock];
        block_sums(p, 1, block, first, rows, up);
        for (int64_t i = 0; i < rows * kBlock; i += kLanes) {
            const Lanes gate = load(sums + i), beside = load(up + i);
            store(sums + i, p.limit > 0.0f ? clamped(gate, beside, p.alpha, p.limit) : silu(gate) * beside);
        }
    }
    const int64_t outputs = least(kBlock, p.weight[member]->out_features - block * kBlock);
    if (p.likeliest.lists) return keep_likeliest(p, block, first, rows, outputs, sums);
    for (int64_t r = 0; r < rows; ++r) {
        float* y = p.y[member] + (first + r) * p.y_stride[member] + block * kBlock;
        const float* from = sums + r * kBlock;
        if (p.add) {
            for (int64_t n = 0; n < outputs; ++n) y[n] += from[n];
        } else {
            memcpy(y, from, static_cast<size_t>(outputs) * sizeof(float));
        }
    }
}

void grouped(const Grouped& g, int64_t unit) {
    const Product* expert = g.experts;
    while (unit >= product_units(*expert)) unit -= product_units(*expert++);
    product(*expert, unit);
}

}  // namespace
}  // namespace halve
