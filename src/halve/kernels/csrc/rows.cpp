// Plain rows: every operation once, compiled for each instruction set by CMakeLists.txt (HALVE_ISA names it).
#include "rows.h"

#include "attention.h"
#include "lanes.h"
#include "prepare.h"
#include "product.h"
#include "sampling.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "weights are stored with the low byte first");

namespace halve {
namespace {

void rms_norm(const Norm& a, int64_t part) {
    const int64_t row = part / a.parts, at = part % a.parts * a.width;
    const float* x = a.x + row * a.x_stride + at;
    float* y = a.y + row * a.y_stride + at;
    const float scale = inverse_root(x, a.width, a.eps);
    for (int64_t i = 0; i < a.width; ++i) y[i] = x[i] * scale * a.gain[i];
}

void embed(const Embed& a, int64_t token) { embed_row(*a.table, a.ids[token], a.y + token * a.table->in_features); }

void rope(const Rope& a, int64_t token) {
    const int64_t angles = token * (a.head_dim / 2);
    for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t at = (token * a.heads + h) * a.head_dim;
        rotate(a.x + at, a.cos + angles, a.sin + angles, a.head_dim, a.y + at);
    }
}

// Elements [begin, end) of a block.
struct Range {
    int64_t begin, end;
    Range(const Elementwise& a, int64_t block)
        : begin(block * kElements), end(least(a.size, (block + 1) * kElements)) {}
};

void add(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    float* __restrict out = a.out;
    for (int64_t i = range.begin; i < range.end; ++i) out[i] = a.x[i] + a.y[i];
}

void silu_mul(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    float* out = a.out;
    int64_t i = range.begin;
    for (; i + kLanes <= range.end; i += kLanes) store(out + i, silu(load(a.x + i)) * load(a.y + i));
    const int64_t left = range.end - i;
    if (left) store(out + i, silu(load(a.x + i, left)) * load(a.y + i, left), left);
}

void round_bf16(const Elementwise& a, int64_t block) {
    const Range range(a, block);
    float* __restrict out = a.out;
    for (int64_t i = range.begin; i < range.end; ++i) out[i] = from_bf16(to_bf16(a.x[i]));
}

}  // namespace

#define HALVE_JOIN_(a, b) a##b
#define HALVE_JOIN(a, b) HALVE_JOIN_(a, b)

const Rows HALVE_JOIN(rows_, HALVE_ISA) = {
    prepare,  product,   grouped,           reduce,     embed,  rms_norm, rope, add, silu_mul, round_bf16,
    kv_write, attention, attention_combine, copy_block, sample,
};

}  // namespace halve
