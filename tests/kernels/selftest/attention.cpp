// The paged cache of keys and values, and attention over it.
#include <string.h>

#include "attention_units.h"
#include "report.h"

namespace halve {
namespace {

// Aligned memory of a cache, poisoned so that unwritten bytes show.
struct Cache {
    Buffer<uint8_t, 64> bytes;
    KvCache record{};

    Cache(KvFormat format, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim) {
        record = {nullptr, blocks, block_size, kv_heads, head_dim, static_cast<int32_t>(format)};
        size = blocks * kv_block_bytes(record);
        bytes.assign(static_cast<size_t>(size), 0);
        record.data = bytes.data();
    }

    Cache(const Cache&) = delete;

    std::vector<uint8_t> contents() const { return std::vector<uint8_t>(bytes.begin(), bytes.end()); }

    int64_t size = 0;
};

// A step of sequences, of which the last `fresh` of `length` tokens are in the batch.
struct Sequence {
    int32_t length, fresh;
};

struct Step {
    Buffer<int32_t> positions, starts{0}, slots, tables;
    StepBatch record{};

    // Blocks of a sequence are taken from all over the cache.
    Step(const std::vector<Sequence>& sequences, int64_t block_size, int64_t widest) {
        const int32_t count = static_cast<int32_t>(sequences.size());
        for (int32_t s = 0; s < count; ++s) {
            const auto block = [&](int32_t page) { return page * count + (s + page) % count; };
            const Sequence& sequence = sequences[static_cast<size_t>(s)];
            for (int32_t t = sequence.length - sequence.fresh; t < sequence.length; ++t) {
                const int32_t size = static_cast<int32_t>(block_size);
                positions.push_back(t);
                slots.push_back(block(t / size) * size + t % size);
            }
            starts.push_back(static_cast<int32_t>(positions.size()));
            for (int32_t page = 0; page < widest; ++page) tables.push_back(block(page));
        }
        for (Buffer<int32_t>* each : {&positions, &starts, &slots, &tables}) each->shrink_to_fit();
        record = {static_cast<int64_t>(positions.size()),
                  count,
                  widest,
                  positions.data(),
                  starts.data(),
                  slots.data(),
                  tables.data()};
    }

    Step(const Step&) = delete;
};

struct Shape {
    KvFormat format;
    int64_t heads, kv_heads, head_dim, window, block_size;
    bool sinks, rotated;
    std::vector<Sequence> sequences;
};

std::string describe(const Shape& s) {
    constexpr const char* names[] = {"fp32", "bf16", "int8", "int4"};
    return format("%s heads=%d/%d head_dim=%d block=%d window=%d%s%s contexts to %d", names[static_cast<int>(s.format)],
                  static_cast<int>(s.heads), static_cast<int>(s.kv_heads), static_cast<int>(s.head_dim),
                  static_cast<int>(s.block_size), static_cast<int>(s.window), s.sinks ? " sinks" : "",
                  s.rotated ? " rotated" : "", s.sequences.back().length);
}

int64_t widest_of(const Shape& s) { return parts(s.sequences.back().length, s.block_size); }

void write(const Rows& rows, const Cache& cache, const Step& step, const Buffer<float>& k, const Buffer<float>& v,
           const float* cos, const float* sin) {
    const int64_t stride = cache.record.num_kv_heads * cache.record.head_dim;
    const KvWrite work{k.data(), v.data(), stride, stride, cos, sin, &cache.record, &step.record};
    for (int64_t unit = kv_write_units(work); unit-- > 0;) rows.kv_write(work, unit);
}

Buffer<float> attend(const Rows& rows, const Shape& s, const Cache& cache, const Step& step, const Buffer<float>& q,
                     const float* sinks, const float* cos, const float* sin) {
    const int64_t width = s.heads * s.head_dim;
    Buffer<float> out(q.size(), -7.0f);
    Attention work{q.data(), width,   cos,      sin, &cache.record, &step.record, sinks, out.data(),
                   width,    s.heads, s.window, 0,   nullptr};
    Buffer<uint8_t, 64> scratch(static_cast<size_t>(attention_scratch_bytes(work)));
    work.scratch = reinterpret_cast<float*>(scratch.data());
    for (int64_t unit = attention_units(work); unit-- > 0;) rows.attention(work, unit);
    for (int64_t unit = attention_combine_units(work); unit-- > 0;) rows.attention_combine(work, unit);
    return out;
}

void check_shape(Report& report, const Shape& s) {
    Random random(static_cast<uint64_t>(s.head_dim * 100 + s.heads + s.window));
    std::vector<Sequence> whole = s.sequences;
    for (Sequence& sequence : whole) sequence.fresh = sequence.length;
    const int64_t widest = widest_of(s), blocks = widest * static_cast<int64_t>(whole.size());
    const Step history(whole, s.block_size, widest), step(s.sequences, s.block_size, widest);
    const int64_t held = history.record.num_tokens * s.kv_heads * s.head_dim;
    const Buffer<float> k = random.values(held), v = random.values(held), sinks = random.values(s.heads, 3.0f);
    const bool int4 = s.format == KvFormat::kInt4;
    const float most = int4 ? 0.3f : 3.0f;  // so that what int4 rounds of a query hides nothing else
    const Buffer<float> q = random.values(step.record.num_tokens * s.heads * s.head_dim, most);
    const Buffer<float> cos = random.values(history.record.num_tokens * s.head_dim / 2);
    const Buffer<float> sin = random.values(history.record.num_tokens * s.head_dim / 2);
    const float *c = s.rotated ? cos.data() : nullptr, *d = s.rotated ? sin.data() : nullptr;
    const Cache wanted(s.format, blocks, s.block_size, s.kv_heads, s.head_dim);
    write(rows_baseline, wanted, history, k, v, c, d);
    if (!s.rotated) {  // a rotation may be contracted, and then rounds in another way
        const Cache got(s.format, blocks, s.block_size, s.kv_heads, s.head_dim);
        write(report.rows, got, history, k, v, nullptr, nullptr);
        report.same("kv_write " + describe(s), got.contents(), wanted.contents());
    }
    const float* sunk = s.sinks ? sinks.data() : nullptr;
    // Means of values below 1. A score is a sum of head_dim products below 3 (6 and 2 where rotated), over
    // sqrt(head_dim); int8 rounds queries and weights to 16 bits (attention_int8.h), int4 queries to 8
    // (attention_int4.h) after a rotation, which leaves numbers of twice their size at most here, and keys of 0.6 on
    // average (1.2).
    const double root = std::sqrt(static_cast<double>(s.head_dim)), query = (s.rotated ? 4.0 : 1.0) * most;
    double bound = 16 * 0x1p-24 * (8.0 + query * root);
    if (s.format == KvFormat::kInt8) bound += (2 * query * root + kSegment) / 65534;
    if (int4) bound += 4 * query * root * (s.rotated ? 1.2 : 0.6) / 254 + kSegment / 65534.0;
    report.close("attention " + describe(s), attend(report.rows, s, wanted, step, q, sunk, c, d),
                 attend(rows_baseline, s, wanted, step, q, sunk, c, d), std::vector<double>(q.size(), bound));
}

}  // namespace

void check_attention(Report& report) {
    const std::vector<Sequence> mixed{{1, 1}, {33, 9}, {70, 1}, {150, 1}}, prefill{{1, 1}, {7, 7}, {90, 90}};
    const std::vector<Sequence> deep{{3, 1}, {2100, 1}};  // two splits and a part
    for (const KvFormat kind : {KvFormat::kFloat32, KvFormat::kBfloat16, KvFormat::kInt8, KvFormat::kInt4}) {
        const Shape shapes[] = {
            {kind, 4, 2, 64, 0, 16, false, false, prefill}, {kind, 4, 4, 34, 5, 16, true, false, prefill},
            {kind, 8, 1, 128, 0, 16, false, false, mixed},  {kind, 9, 3, 64, 0, 16, true, true, mixed},
            {kind, 12, 1, 80, 20, 16, false, false, mixed}, {kind, 2, 2, 16, 1, 16, false, false, mixed},
            {kind, 6, 2, 128, 64, 16, true, false, mixed},  {kind, 2, 1, 32, 0, 8, false, false, mixed},
            {kind, 2, 1, 64, 0, 16, false, false, deep},
        };
        for (const Shape& shape : shapes) check_shape(report, shape);
    }
}

void check_copy_block(Report& report) {
    const Cache cache(KvFormat::kInt8, 4, 16, 2, 64);
    uint8_t* data = static_cast<uint8_t*>(cache.record.data);
    Random random(1);
    for (int64_t i = 0; i < cache.size; ++i) data[i] = static_cast<uint8_t>(random.bits());
    std::vector<uint8_t> wanted = cache.contents();
    const int64_t bytes = kv_block_bytes(cache.record);
    memcpy(wanted.data() + 3 * bytes, wanted.data() + bytes, static_cast<size_t>(bytes));
    memcpy(wanted.data(), wanted.data() + 2 * bytes, static_cast<size_t>(bytes));
    const int32_t pairs[] = {1, 3, 2, 0};
    const BlockCopies work{&cache.record, pairs};
    for (int64_t pair = 0; pair < 2; ++pair) report.rows.copy_block(work, pair);
    report.same("copy_block", cache.contents(), wanted);
}

}  // namespace halve
