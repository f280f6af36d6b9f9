// Attention over whole sequences and over a paged cache.
#include "report.h"

namespace halve {
namespace {

struct Shape {
    int64_t heads, kv_heads, head_dim, window;
    bool bf16, paged, sinks;
};

// Sequences of these lengths, of which the last `fresh` tokens ask.
struct Sequence {
    int32_t length, fresh;
};
constexpr Sequence kWhole[] = {{1, 1}, {7, 7}, {40, 40}}, kPaged[] = {{1, 1}, {70, 1}, {150, 1}, {33, 9}};

std::vector<uint16_t> halves_of(const std::vector<float>& from) {
    std::vector<uint16_t> out;
    for (const float x : from) out.push_back(bf16_of(x));
    return out;
}

void check_shape(Report& report, const Shape& s) {
    constexpr int64_t kPage = 16, kWidest = 10;
    Random random(static_cast<uint64_t>(s.head_dim * 100 + s.heads + s.window));
    std::vector<int32_t> positions, starts{0}, tables;
    const Sequence* from = s.paged ? kPaged : kWhole;
    const int sequences = s.paged ? 4 : 3;
    for (int i = 0; i < sequences; ++i) {
        for (int32_t t = from[i].length - from[i].fresh; t < from[i].length; ++t) positions.push_back(t);
        starts.push_back(static_cast<int32_t>(positions.size()));
        for (int32_t page = 0; page < kWidest; ++page) tables.push_back((page * 7 + i * 3 + 5) % (kWidest * sequences));
    }
    const int64_t tokens = static_cast<int64_t>(positions.size());
    const int64_t stored = s.paged ? kWidest * sequences * kPage : tokens;
    const std::vector<float> q = random.values(tokens * s.heads * s.head_dim, 3.0f),
                             sinks = random.values(s.heads, 3.0f);
    const std::vector<float> k = random.values(stored * s.kv_heads * s.head_dim),
                             v = random.values(stored * s.kv_heads * s.head_dim);
    const std::vector<uint16_t> k_halves = halves_of(k), v_halves = halves_of(v);
    std::vector<float> got(q.size(), -7.0f), wanted(q.size());
    const auto run = [&](const Rows& rows, std::vector<float>& out) {
        Attention a{};
        a.q = q.data();
        a.k = s.bf16 ? static_cast<const void*>(k_halves.data()) : k.data();
        a.v = s.bf16 ? static_cast<const void*>(v_halves.data()) : v.data();
        a.positions = positions.data();
        a.cu_seqlens = starts.data();
        a.block_tables = s.paged ? tables.data() : nullptr;
        a.sinks = s.sinks ? sinks.data() : nullptr;
        a.out = out.data();
        a.num_sequences = sequences;
        a.widest = kWidest;
        a.block_size = kPage;
        a.num_heads = s.heads;
        a.num_kv_heads = s.kv_heads;
        a.head_dim = s.head_dim;
        a.window = s.window;
        a.bf16 = s.bf16;
        for (int64_t block = 0; block < tokens * head_blocks(a); ++block) rows.attention(a, block);
    };
    run(report.rows, got);
    run(rows_baseline, wanted);
    // Means of values below 1; a score is a sum of head_dim products below 3 / sqrt(head_dim).
    const double bound = 8 * 0x1p-24 * (8.0 + 3.0 * std::sqrt(static_cast<double>(s.head_dim)));
    report.close(format("attention heads=%d/%d head_dim=%d window=%d%s%s%s", static_cast<int>(s.heads),
                        static_cast<int>(s.kv_heads), static_cast<int>(s.head_dim), static_cast<int>(s.window),
                        s.bf16 ? " bf16" : "", s.paged ? " paged" : "", s.sinks ? " sinks" : ""),
                 got, wanted, std::vector<double>(q.size(), bound));
}

}  // namespace

void check_attention(Report& report) {
    constexpr Shape shapes[] = {
        {4, 2, 64, 0, false, false, false}, {4, 4, 33, 5, false, false, true},   {8, 1, 128, 0, true, true, false},
        {9, 3, 64, 0, true, true, true},    {12, 1, 80, 20, false, true, false}, {2, 2, 16, 1, true, false, false},
        {6, 2, 128, 64, true, true, true},
    };
    for (const Shape& shape : shapes) check_shape(report, shape);
}

}  // namespace halve
