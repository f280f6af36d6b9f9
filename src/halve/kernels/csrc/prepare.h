// Rows of activations on their way into a product: RMSNorm where there is a gain, then rounding.
//
// Int8 takes a scale for each row, absmax / 127 (arXiv:2208.07339, section 2.1, row-wise); codes are x * (127 / absmax)
// rounded to nearest, ties to even. A row whose absmax is below kSmallest counts as zeros; one that holds NaN or
// infinity gets the scale NaN, so that it is not lost.
#pragma once

#include "lanes.h"
#include "products.h"

namespace halve {
namespace {

constexpr int kHalfChunk = 16;
constexpr float kSmallest = 1e-36f;  // below, 127 / absmax would leave float's range

// The mean of squares is summed in double: squares of large floats would overflow in float.
inline float inverse_root(const float* __restrict x, int64_t width, float eps) {
    double squares[16] = {};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        for (int j = 0; j < 16; ++j) squares[j] += static_cast<double>(x[i + j]) * x[i + j];
    }
    for (int j = 0; i < width; ++i, ++j) squares[j] += static_cast<double>(x[i]) * x[i];
    double total = 0.0;
    for (int j = 0; j < 16; ++j) total += squares[j];
    return static_cast<float>(1.0 / __builtin_sqrt(total / static_cast<double>(width) + static_cast<double>(eps)));
}

// A row's scale, and what its values are multiplied by to be codes.
struct Int8Scale {
    float scale, inverse;
    bool some;  // else every code is 0

    Int8Scale(const float* x, int64_t width) {
        const float most = absmax(x, width);
        some = most >= kSmallest && most < __builtin_inff();
        inverse = some ? 127.0f / most : 0.0f;
        scale = some ? most / 127.0f : most < kSmallest ? 0.0f : __builtin_nanf("");
    }
};

inline void write_start(const Activations& out, int32_t* starts, int64_t run, int32_t even, int32_t odd) {
    const int shift = out.bits - 1;
    const uint32_t a = static_cast<uint32_t>(-even) << shift, b = static_cast<uint32_t>(-odd) << shift;
    starts[run] = static_cast<int32_t>(out.split ? (a & 0xffff) | b << 16 : a + b);
}

// Codes of a row, with zeros up to code_stride, and where the sums of its runs begin.
inline void to_int8(const float* __restrict x, int64_t width, const Activations& out, int64_t row) {
    const Int8Scale row_scale(x, width);
    const float inverse = row_scale.inverse;
    const bool some = row_scale.some;
    out.scale[row] = row_scale.scale;
    int32_t* starts = out.starts + row * out.start_stride;
    int32_t even = 0, odd = 0;
    int64_t run = 0;
    for (int64_t i = 0; i < out.code_stride; i += kHalfChunk) {
        float part[kHalfChunk] = {};
        const int64_t n = least(kHalfChunk, width - i);
        if (n == kHalfChunk) {
            for (int j = 0; j < kHalfChunk; ++j) part[j] = some ? x[i + j] * inverse : 0.0f;
        } else {
            for (int64_t j = 0; j < n; ++j) part[j] = some ? x[i + j] * inverse : 0.0f;
        }
        // Adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the low bits.
        int32_t whole[kHalfChunk];
        for (int j = 0; j < kHalfChunk; ++j) {
#if defined(__aarch64__)
            whole[j] = static_cast<int32_t>(__builtin_rintf(part[j]));  // the sum would be fused with the product
#else
            const float shifted = part[j] + 12582912.0f;
            int32_t bits;
            memcpy(&bits, &shifted, sizeof bits);
            whole[j] = bits - 0x4b400000;
#endif
        }
        if (out.wide) {
            int16_t* __restrict wide = out.wide + row * out.code_stride + i;
            for (int j = 0; j < kHalfChunk; ++j) {
                wide[j] = static_cast<int16_t>(whole[(j & ~3) | (j & 1) << 1 | (j & 2) >> 1]);
            }
        } else {
            int8_t* __restrict codes = out.codes + row * out.code_stride + i;
            for (int j = 0; j < kHalfChunk; ++j) codes[j] = static_cast<int8_t>(whole[j]);
        }
        for (int j = 0; j < kHalfChunk; j += 4) {
            even += whole[j] + whole[j + 1];
            odd += whole[j + 2] + whole[j + 3];
        }
        if (out.run && (i + kHalfChunk) % out.run == 0 && run < out.start_stride) {
            write_start(out, starts, run++, even, odd);
            even = odd = 0;
        }
    }
    if (!out.run) write_start(out, starts, 0, even, odd);
}

// The same rounding where products take floats: each value becomes its code times its scale.
inline void round_int8(const float* x, float* y, int64_t width) {
    const Int8Scale row_scale(x, width);
    for (int64_t i = 0; i < width; ++i) {
#if defined(__aarch64__)
        const float code = row_scale.some ? __builtin_rintf(x[i] * row_scale.inverse) : 1.0f;
#else
        const float code = row_scale.some ? (x[i] * row_scale.inverse + 12582912.0f) - 12582912.0f : 1.0f;
#endif
        y[i] = code * row_scale.scale;
    }
}

void prepare(const Prepare& a, int64_t row) {
    const float* __restrict x = a.x + (a.rows ? a.rows[row] : row) * a.x_stride;
    const Activations& out = a.out;
    float* y = out.values + row * out.value_stride;
    if (a.gain) {
        const float scale = inverse_root(x, a.width, a.eps);
        for (int64_t i = 0; i < a.width; ++i) y[i] = x[i] * scale * a.gain[i];
    } else if (a.rounding != Rounding::kInt8 && y != x) {
        memcpy(y, x, static_cast<size_t>(a.width) * sizeof(float));
    }
    if (a.rounding == Rounding::kBfloat16 && out.wide) {
        uint16_t* __restrict halves = reinterpret_cast<uint16_t*>(out.wide) + row * out.code_stride;
        for (int64_t i = 0; i < a.width; ++i) halves[i] = to_bf16(y[i]);
        memset(halves + a.width, 0, static_cast<size_t>(out.code_stride - a.width) * sizeof *halves);
    } else if (a.rounding == Rounding::kBfloat16) {
        for (int64_t i = 0; i < a.width; ++i) y[i] = from_bf16(to_bf16(y[i]));
    }
    if (a.rounding != Rounding::kInt8) return;
    const float* from = a.gain ? y : x;
    out.scale ? to_int8(from, a.width, out, row) : round_int8(from, y, a.width);
}

}  // namespace
}  // namespace halve
