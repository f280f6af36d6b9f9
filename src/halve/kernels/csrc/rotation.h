// The rotation of keys and queries of an int4 cache: the orthonormal Walsh-Hadamard matrix. Source: arXiv:2404.00456.
//
// It is taken in log2(n) stages of sums and differences, i and i + 1 first, then twice as far apart; the factor
// 1 / sqrt(n) comes last. The order is that of halve/kernels/reference.py, so that both round the same numbers, and
// every instruction set gives the same bits.
#pragma once

#include "lanes.h"

namespace halve {
namespace {

// A stage within vectors: each lane and the one `apart` from it, by a power of two.
inline Lanes butterfly(Lanes x, int apart) {
    Lanes sign;
#if defined(__clang__)
    Lanes other;
    for (int j = 0; j < kLanes; ++j) other[j] = x[j ^ apart];
#else
    Ints from;
    for (int j = 0; j < kLanes; ++j) from[j] = j ^ apart;
    const Lanes other = __builtin_shuffle(x, from);
#endif
    for (int j = 0; j < kLanes; ++j) sign[j] = j & apart ? -1.0f : 1.0f;
    return x * sign + other;  // the product is exact
}

// Rotate dim numbers in place, in runs of the largest power of two that divides dim.
inline void hadamard(float* x, int64_t dim) {
    const int64_t n = dim & -dim;
    int64_t apart = 1;
    if (n >= kLanes) {
        for (int64_t i = 0; i < dim; i += kLanes) {
            Lanes v = load(x + i);
#pragma GCC unroll 4
            for (int step = 1; step < kLanes; step *= 2) v = butterfly(v, step);
            store(x + i, v);
        }
        apart = kLanes;
    }
    for (; apart < n; apart *= 2) {
        for (int64_t i = 0; i < dim; i += 2 * apart) {
            for (int64_t j = i; j < i + apart; ++j) {
                const float first = x[j], second = x[j + apart];
                x[j] = first + second;
                x[j + apart] = first - second;
            }
        }
    }
    const float scale = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(n)));
    for (int64_t i = 0; i < dim; ++i) x[i] *= scale;
}

}  // namespace
}  // namespace halve
