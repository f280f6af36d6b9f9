// Norms, rotations and elementwise operations.
#include "report.h"

namespace halve {
namespace {

std::vector<double> relative(const Buffer<float>& of, double bound) {
    std::vector<double> out(of.size());
    for (size_t i = 0; i < of.size(); ++i) out[i] = std::fabs(static_cast<double>(of[i])) * bound + 1e-37;
    return out;
}

// Values of every kind: ordinary, large, tiny, halfway between two bf16, infinite and NaN.
Buffer<float> awkward(int64_t size, Random& random) {
    const float odd[] = {0.0f,    -0.0f,     0x1.01p0f,       0x1.03p0f,          -0x1.01p0f,       1e-42f,
                         3.3e38f, -88.0f,    89.0f,           -1000.0f,           __builtin_inff(), -__builtin_inff(),
                         1e-30f,  0x1p-149f, 0x1.fffffep127f, __builtin_nanf(""), 12582912.0f};
    Buffer<float> out = random.values(size, 8.0f);
    const int64_t kinds = sizeof odd / sizeof *odd;
    for (int64_t i = 0; i < size; i += 5) out[i] = odd[i / 5 % kinds];
    return out;
}

constexpr int64_t kSizes[] = {1, 15, 17, 33, 100, kElements, kElements + 7, 2 * kElements + 31};

int64_t blocks(int64_t size) { return (size + kElements - 1) / kElements; }

}  // namespace

void check_rms_norm(Report& report) {
    for (const int64_t width : {1, 7, 16, 33, 576, 1000}) {
        Random random(static_cast<uint64_t>(width));
        const int64_t tokens = 3;
        const Buffer<float> x = random.values(tokens * width, 4.0f), gain = random.values(width);
        Buffer<float> got(x.size(), -7.0f), wanted(x.size());
        const Norm mine{x.data(), gain.data(), got.data(), width, width, 1, width, 1e-5f},
            base{x.data(), gain.data(), wanted.data(), width, width, 1, width, 1e-5f};
        for (int64_t t = 0; t < tokens; ++t) report.rows.rms_norm(mine, t);
        for (int64_t t = 0; t < tokens; ++t) rows_baseline.rms_norm(base, t);
        report.close(format("rms_norm width=%d", static_cast<int>(width)), got, wanted, relative(wanted, 5e-7));
    }
}

void check_rope(Report& report) {
    for (const int64_t head_dim : {2, 10, 64, 80, 128}) {
        Random random(static_cast<uint64_t>(head_dim));
        const int64_t tokens = 3, heads = 5;
        const Buffer<float> x = random.values(tokens * heads * head_dim, 4.0f);
        const Buffer<float> cos = random.values(tokens * head_dim / 2), sin = random.values(tokens * head_dim / 2);
        Buffer<float> got(x.size(), -7.0f), wanted(x.size());
        const Rope mine{x.data(), cos.data(), sin.data(), got.data(), heads, head_dim};
        const Rope base{x.data(), cos.data(), sin.data(), wanted.data(), heads, head_dim};
        for (int64_t t = 0; t < tokens; ++t) report.rows.rope(mine, t);
        for (int64_t t = 0; t < tokens; ++t) rows_baseline.rope(base, t);
        // Two products below 4 and their sum, each rounded once or not at all.
        report.close(format("rope head_dim=%d", static_cast<int>(head_dim)), got, wanted,
                     std::vector<double>(x.size(), 8 * 0x1p-22));
    }
}

void check_elementwise(Report& report) {
    for (const int64_t size : kSizes) {
        Random random(static_cast<uint64_t>(size));
        const Buffer<float> x = awkward(size, random), y = random.values(size, 2.0f);
        const auto run = [&](void (*operation)(const Elementwise&, int64_t), float* out) {
            const Elementwise work{x.data(), y.data(), out, size};
            for (int64_t block = 0; block < blocks(size); ++block) operation(work, block);
        };
        const int n = static_cast<int>(size);
        Buffer<float> got(x.size(), -7.0f), wanted(x.size());
        run(report.rows.add, got.data());
        run(rows_baseline.add, wanted.data());
        report.close(format("add size=%d", n), got, wanted, std::vector<double>(x.size(), 1e-300));
        run(report.rows.silu_mul, got.data());
        run(rows_baseline.silu_mul, wanted.data());
        report.close(format("silu_mul size=%d", n), got, wanted, relative(wanted, 1e-6));
        run(report.rows.round_bf16, got.data());
        run(rows_baseline.round_bf16, wanted.data());
        report.same(format("round_bf16 size=%d", n), got, wanted);
    }
}

}  // namespace halve
