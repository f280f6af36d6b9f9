// Plain rows: every operation once, compiled for each instruction set by CMakeLists.txt (HALVE_ISA names it).
#include "rows.h"

#include "attention.h"
#include "lanes.h"
#include "linear.h"
#include "sampling.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "weights are stored with the low byte first");

namespace halve {
namespace {

// The mean of squares is summed in double: squares of large floats would overflow in float.
void rms_norm(const Norm& a, int64_t row) {
    const float* __restrict x = a.x + row * a.width;
    float* __restrict y = a.y + row * a.width;
    double squares[8] = {};
    int64_t i = 0;
    for (; i + 8 <= a.width; i += 8) {
        for (int j = 0; j < 8; ++j) squares[j] += static_cast<double>(x[i + j]) * x[i + j];
    }
    for (int j = 0; i < a.width; ++i, ++j) squares[j] += static_cast<double>(x[i]) * x[i];
    double total = 0.0;
    for (int j = 0; j < 8; ++j) total += squares[j];
    const double root = __builtin_sqrt(total / static_cast<double>(a.width) + static_cast<double>(a.eps));
    const float scale = static_cast<float>(1.0 / root);
    for (i = 0; i < a.width; ++i) y[i] = x[i] * scale * a.gain[i];
}

void rope(const Rope& a, int64_t token) {
    const int64_t half = a.head_dim / 2;
    const float* __restrict cos = a.cos + token * half;
    const float* __restrict sin = a.sin + token * half;
    for (int64_t h = 0; h < a.heads; ++h) {
        const float* __restrict x = a.x + (token * a.heads + h) * a.head_dim;
        float* __restrict y = a.y + (token * a.heads + h) * a.head_dim;
        for (int64_t i = 0; i < half; ++i) {
            y[i] = x[i] * cos[i] - x[i + half] * sin[i];
            y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
        }
    }
}

// Elements [begin, end) of a block.
struct Range {
    int64_t begin, end;
    Range(const Elementwise& a, int64_t block) : begin(block * kChunk), end(least(a.size, (block + 1) * kChunk)) {}
};

void add(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    float* __restrict out = static_cast<float*>(a.out);
    for (int64_t i = range.begin; i < range.end; ++i) out[i] = a.x[i] + a.y[i];
}

inline Lanes silu(Lanes x) { return x / (exp(-x) + 1.0f); }

void silu_mul(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    float* out = static_cast<float*>(a.out);
    int64_t i = range.begin;
    for (; i + kLanes <= range.end; i += kLanes) store(out + i, silu(load(a.x + i)) * load(a.y + i));
    const int64_t left = range.end - i;
    if (left) store(out + i, silu(load(a.x + i, left)) * load(a.y + i, left), left);
}

void to_bf16(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    uint16_t* __restrict out = static_cast<uint16_t*>(a.out);
    for (int64_t i = range.begin; i < range.end; ++i) out[i] = to_bf16(a.x[i]);
}

void round_bf16(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    float* __restrict out = static_cast<float*>(a.out);
    for (int64_t i = range.begin; i < range.end; ++i) out[i] = from_bf16(to_bf16(a.x[i]));
}

}  // namespace

#define HALVE_JOIN_(a, b) a##b
#define HALVE_JOIN(a, b) HALVE_JOIN_(a, b)

const Rows HALVE_JOIN(rows_, HALVE_ISA) = {linear,   embed,   rms_norm,   rope,      add,
                                           silu_mul, to_bf16, round_bf16, attention, sample};

}  // namespace halve
