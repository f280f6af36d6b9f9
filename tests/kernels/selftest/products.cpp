// Rounding of activations, products with packed matrices, and rows of packed tables.
#include <string.h>

#include "report.h"

namespace halve {
namespace {

constexpr double kEps = 0x1p-24;

// A matrix as a file holds it, packed, and as the doubles that it means.
struct Weight {
    Buffer<uint8_t> codes, scales;
    Buffer<uint8_t, 64> packed;
    std::vector<double> values;  // [N, K]
    Packed matrix{};
};

struct WeightShape {
    StoredKind kind;
    int bits;  // of integers
    int64_t group;
    StoredKind scale;  // kInt: none
    int64_t outputs, inputs;
};

const char* name_of(StoredKind kind) {
    constexpr const char* names[] = {"int", "bf16", "fp16", "fp32", "fp8"};
    return names[static_cast<int>(kind)];
}

std::string describe(const WeightShape& s) {
    std::string text = name_of(s.kind) + (s.kind == StoredKind::kInt ? std::to_string(s.bits) : "");
    if (s.scale != StoredKind::kInt) text += format(" group=%d %s scales", static_cast<int>(s.group), name_of(s.scale));
    return text + format(" N=%d K=%d", static_cast<int>(s.outputs), static_cast<int>(s.inputs));
}

template <class T>
void put(Buffer<uint8_t>& bytes, int64_t index, T value) {
    memcpy(bytes.data() + index * static_cast<int64_t>(sizeof value), &value, sizeof value);
}

// A float below 2 in the kind's own bits at an index, and what it means. fp16 and fp8 get normal numbers only.
double put_float(Buffer<uint8_t>& bytes, int64_t index, StoredKind kind, Random& random) {
    const float sign = random.bits() & 1 ? -1.0f : 1.0f;
    const uint32_t mantissa = random.bits();
    if (kind == StoredKind::kFloat32) {
        const float value = sign * static_cast<float>(mantissa >> 8) * 0x1p-23f;
        put(bytes, index, value);
        return value;
    }
    const int width = kind == StoredKind::kBfloat16 ? 7 : kind == StoredKind::kFloat16 ? 10 : 3;
    const uint32_t low = mantissa & ((1u << width) - 1), down = random.bits() % 6;
    const double value = sign * std::ldexp(1.0 + std::ldexp(low, -width), -static_cast<int>(down));
    const uint32_t bias = kind == StoredKind::kBfloat16 ? 127 : kind == StoredKind::kFloat16 ? 15 : 7;
    const uint32_t bits = (bias - down) << width | low;
    if (kind == StoredKind::kFloat8) {
        put(bytes, index, static_cast<uint8_t>(bits | (sign < 0 ? 0x80 : 0)));
    } else {
        put(bytes, index, static_cast<uint16_t>(bits | (sign < 0 ? 0x8000 : 0)));
    }
    return value;
}

int64_t size_of(StoredKind kind) {
    return kind == StoredKind::kFloat32 ? 4 : kind == StoredKind::kFloat8 || kind == StoredKind::kInt ? 1 : 2;
}

// The lowest and the highest codes come often: with activations of 127 they are what overflows first.
uint32_t code_of(int bits, Random& random) {
    const uint32_t top = (1u << bits) - 1, draw = random.bits();
    return draw % 8 == 0 ? 0 : draw % 8 == 1 ? top : draw >> 8 & top;
}

void put_codes(Weight& w, const WeightShape& s, Random& random) {
    const int64_t row_bytes = s.bits == 8 ? s.inputs : ceil_div(s.inputs * s.bits, 32) * 4;
    w.codes.assign(static_cast<size_t>(s.outputs * row_bytes), 0);
    const int zero = 1 << (s.bits - 1);
    for (int64_t n = 0; n < s.outputs; ++n) {
        uint8_t* row = w.codes.data() + n * row_bytes;
        for (int64_t k = 0; k < s.inputs; ++k) {
            const uint32_t code = code_of(s.bits, random);
            w.values[static_cast<size_t>(n * s.inputs + k)] = static_cast<int>(code) - zero;
            if (s.bits == 8) {
                row[k] = static_cast<uint8_t>(code ^ 0x80);
                continue;
            }
            for (int bit = 0; bit < s.bits; ++bit) {
                const int64_t at = k * s.bits + bit;
                row[at / 8] = static_cast<uint8_t>(row[at / 8] | (code >> bit & 1) << at % 8);
            }
        }
    }
}

Weight make_weight(const WeightShape& s, Random& random) {
    Weight w;
    w.values.resize(static_cast<size_t>(s.outputs * s.inputs));
    if (s.kind == StoredKind::kInt) {
        put_codes(w, s, random);
    } else {
        w.codes.resize(static_cast<size_t>(s.outputs * s.inputs * size_of(s.kind)));
        for (size_t i = 0; i < w.values.size(); ++i)
            w.values[i] = put_float(w.codes, static_cast<int64_t>(i), s.kind, random);
    }
    if (s.scale != StoredKind::kInt) {
        const int64_t groups = s.group ? s.inputs / s.group : 1, each = s.inputs / groups;
        w.scales.resize(static_cast<size_t>(s.outputs * groups * size_of(s.scale)));
        for (int64_t i = 0; i < s.outputs * groups; ++i) {
            const double scale = put_float(w.scales, i, s.scale, random);
            for (int64_t k = 0; k < each; ++k) w.values[static_cast<size_t>(i * each + k)] *= scale;
        }
    }
    const Stored stored{s.outputs,
                        s.inputs,
                        s.group,
                        w.codes.data(),
                        w.scales.empty() ? nullptr : w.scales.data(),
                        static_cast<int>(s.kind),
                        s.bits,
                        static_cast<int>(s.scale)};
    const int64_t bytes = plan_packing(stored, &w.matrix);
    w.packed.resize(static_cast<size_t>(bytes));
    pack_blocks(stored, w.matrix, w.packed.data(), 0, blocks_of(w.matrix));
    w.matrix.data = w.packed.data();
    return w;
}

// How the tiles of an instruction set take int8 activations for weights of so many bits: what native.py's `Isa` says.
struct Codes {
    int bits = 8;
    int64_t run = 0;     // inputs summed as integers before they are scaled; 0 for all
    bool pairs = false;  // bytes are multiplied in pairs, into 16 bits
};

Codes codes_for(const Rows& rows, int bits, int64_t group) {
#ifdef HALVE_HAS_AVX2
    if (&rows == &rows_avx2) {
        const int64_t most = bits == 6 ? 16 : bits == 5 ? 32 : 64;
        return {bits, bits == 8 || group < most ? group : most, true};
    }
#endif
    (void)rows;
    return {bits, group, false};
}

// Room for prepared rows. Without codes, int8 rounding leaves floats.
struct Prepared {
    Buffer<float> values, scale;
    Buffer<int8_t> codes;
    Buffer<int16_t> wide;
    Buffer<int32_t> starts;
    Activations record{};

    Prepared(int64_t rows, int64_t width) {
        values.assign(static_cast<size_t>(rows * width), -7.0f);
        record.values = values.data();
        record.value_stride = width;
    }

    Prepared(int64_t rows, int64_t width, const Codes& how) : Prepared(rows, width) {
        const int64_t padded = ceil_div(width, kChunk) * kChunk;
        const bool is_wide = how.pairs && how.bits == 8;
        record.code_stride = padded + 2 * kChunk;
        record.start_stride = how.run ? padded / how.run : 1;
        record.run = static_cast<int32_t>(how.run);
        record.bits = how.bits;
        record.split = how.pairs && how.bits < 8;
        codes.assign(is_wide ? 0 : static_cast<size_t>(rows * record.code_stride), 77);
        wide.assign(is_wide ? static_cast<size_t>(rows * record.code_stride) : 0, 77);
        scale.assign(static_cast<size_t>(rows), -7.0f);
        starts.assign(static_cast<size_t>(rows * record.start_stride), 77);
        record.codes = is_wide ? nullptr : codes.data();
        record.wide = is_wide ? wide.data() : nullptr;
        record.scale = scale.data();
        record.starts = starts.data();
    }
};

// Floats, and beside them their bits in bf16 where the rows multiply those.
Prepared with_bf16(int64_t rows, int64_t width) {
    Prepared prepared(rows, width);
    prepared.record.code_stride = ceil_div(width, kChunk) * kChunk + 2 * kChunk;
    prepared.wide.assign(static_cast<size_t>(rows * prepared.record.code_stride), 77);
    prepared.record.wide = prepared.wide.data();
    return prepared;
}

bool takes_bf16(const Rows& rows, Rounding rounding, StoredKind kind) {
    bool multiplies = false;
#ifdef HALVE_HAS_AVX512BF16
    multiplies |= &rows == &rows_avx512bf16;
#endif
#ifdef HALVE_HAS_AMX
    multiplies |= &rows == &rows_amx;
#endif
#ifdef HALVE_HAS_NEON_I8MM
    multiplies |= &rows == &rows_neon_i8mm;
#endif
    (void)rows;
    return multiplies && rounding == Rounding::kBfloat16 &&
           (kind == StoredKind::kBfloat16 || kind == StoredKind::kFloat8);
}

const char* name_of(Rounding rounding) {
    constexpr const char* names[] = {"fp32", "bf16", "int8"};
    return names[static_cast<int>(rounding)];
}

// The baseline multiplies floats whatever the rounding; other rows multiply bytes.
bool takes_codes(const Rows& rows, Rounding rounding) { return rounding == Rounding::kInt8 && &rows != &rows_baseline; }

void prepare_rows(const Rows& rows, const Buffer<float>& x, const float* gain, int64_t width, Rounding rounding,
                  const Prepared& to) {
    Prepare work{};
    work.x = x.data();
    work.gain = gain;
    work.out = to.record;
    work.x_stride = width;
    work.width = width;
    work.eps = 1e-5f;
    work.rounding = rounding;
    for (int64_t row = 0; row * width < static_cast<int64_t>(x.size()); ++row) rows.prepare(work, row);
}

template <class T>
Buffer<float> floats_of(const Buffer<T>& from) {
    return Buffer<float>(from.begin(), from.end());
}

// Rows of activations: of size 1; the first often at the largest magnitude, the last all zeros where `odd`, with a NaN
// in the one before it.
Buffer<float> make_rows(int64_t rows, int64_t width, bool odd, Random& random) {
    Buffer<float> x = random.values(rows * width);
    for (int64_t i = 0; i < width; i += 1 + random.bits() % 3)
        x[static_cast<size_t>(i)] = random.bits() & 1 ? 1.0f : -1.0f;
    if (!odd) return x;
    for (int64_t i = 0; i < width; ++i) x[static_cast<size_t>((rows - 1) * width + i)] = 0.0f;
    x[static_cast<size_t>((rows - 2) * width + width / 2)] = __builtin_nanf("");
    return x;
}

struct Case {
    WeightShape weight;
    Rounding rounding;
    int64_t rows;
    int members;
    bool bias, add, gated;
};

// What a product of a case gives, [rows, outputs of every member].
Buffer<float> run_product(const Rows& rows, const Case& c, const Buffer<float>& x, const std::vector<Weight>& weights,
                          const Buffer<float>& bias, const Buffer<float>& before) {
    const int64_t k = c.weight.inputs, n = c.weight.outputs, stride = n + 3;
    const bool integers = c.weight.kind == StoredKind::kInt && takes_codes(rows, c.rounding);
    const Prepared prepared = integers ? Prepared(c.rows, k, codes_for(rows, c.weight.bits, c.weight.group))
                              : takes_bf16(rows, c.rounding, c.weight.kind) ? with_bf16(c.rows, k)
                                                                            : Prepared(c.rows, k);
    prepare_rows(rows, x, nullptr, k, c.rounding, prepared);
    Buffer<float> y = before;
    Product work{};
    work.x = prepared.record;
    for (int i = 0; i < c.members; ++i) {
        work.weight[i] = &weights[static_cast<size_t>(i)].matrix;
        work.bias[i] = c.bias ? bias.data() : nullptr;
        work.y[i] = y.data() + i * c.rows * stride;
        work.y_stride[i] = stride;
    }
    work.rows = c.rows;
    work.members = c.members;
    work.add = c.add;
    work.gated = c.gated;
    work.rounding = c.rounding;
    for (int64_t unit = product_units(work); unit-- > 0;) rows.product(work, unit);  // in any order
    return y;
}

// Every sum of K products is off by at most K roundings of its size; a chain of products keeps that bound (Higham,
// Accuracy and Stability, section 3.1). Both sides may be off, the inputs of int8 by one rounding more.
std::vector<double> bounds(const Case& c, const Buffer<float>& x, const std::vector<Weight>& weights) {
    const int64_t k = c.weight.inputs, n = c.weight.outputs, stride = n + 3;
    std::vector<double> sizes(static_cast<size_t>(c.members * c.rows * stride), 0.0);
    for (int i = 0; i < c.members; ++i) {
        for (int64_t r = 0; r < c.rows; ++r) {
            for (int64_t o = 0; o < n; ++o) {
                double size = 2.0;  // bias and what lay there before are below 1
                for (int64_t j = 0; j < k; ++j) {
                    size += std::fabs(weights[static_cast<size_t>(i)].values[static_cast<size_t>(o * k + j)] *
                                      static_cast<double>(x[static_cast<size_t>(r * k + j)]));
                }
                sizes[static_cast<size_t>((i * c.rows + r) * stride + o)] = size;
            }
        }
    }
    const double steps = 2.0 * static_cast<double>(k + 6) * kEps;
    std::vector<double> out(sizes.size(), 1e-300);
    const size_t half = sizes.size() / 2;
    for (size_t i = 0; i < sizes.size(); ++i) {
        if (c.gated && i < half) out[i] = 1.2 * steps * sizes[i] * sizes[i + half] + 1e-5 * sizes[i] * kEps;
        if (!c.gated && sizes[i] > 0.0) out[i] = steps * sizes[i];
    }
    return out;
}

constexpr int kManyRows = 50;  // three strips of 16 and two rows, eight of 6 and two

Buffer<float> row_of(const Buffer<float>& values, int64_t row, int64_t width) {
    return Buffer<float>(values.begin() + row * width, values.begin() + (row + 1) * width);
}

// Rows that were multiplied with others have the bits that they have by themselves.
void check_alone(Report& report, const std::string& what, const Case& c, const Buffer<float>& x,
                 const std::vector<Weight>& weights, const Buffer<float>& bias, const Buffer<float>& before,
                 const Buffer<float>& together) {
    const int64_t stride = c.weight.outputs + 3;
    Case one = c;
    one.rows = 1;
    Buffer<float> got, wanted;
    for (const int64_t row : {int64_t{0}, int64_t{33}, c.rows - 1}) {
        const Buffer<float> alone =
            run_product(report.rows, one, row_of(x, row, c.weight.inputs), weights, bias, row_of(before, row, stride));
        const Buffer<float> among = row_of(together, row, stride);
        got.insert(got.end(), among.begin(), among.end());
        wanted.insert(wanted.end(), alone.begin(), alone.end());
    }
    report.same(what, got, wanted);
}

void check_case(Report& report, const Case& c) {
    Random random(static_cast<uint64_t>(c.weight.inputs * 1000 + c.weight.bits * 100 + c.rows));
    std::vector<Weight> weights;
    for (int i = 0; i < c.members; ++i) weights.push_back(make_weight(c.weight, random));
    const Buffer<float> x = make_rows(c.rows, c.weight.inputs, false, random);
    const Buffer<float> bias = random.values(c.weight.outputs);
    const Buffer<float> before = random.values(c.members * c.rows * (c.weight.outputs + 3));
    const std::string what = format("product %s rows=%d%s%s%s%s", name_of(c.rounding), static_cast<int>(c.rows),
                                    c.members > 1 && !c.gated ? " members=2" : "", c.bias ? " bias" : "",
                                    c.add ? " add" : "", c.gated ? " gated" : "");
    const Buffer<float> got = run_product(report.rows, c, x, weights, bias, before);
    report.close(what + " " + describe(c.weight), got, run_product(rows_baseline, c, x, weights, bias, before),
                 bounds(c, x, weights));
    if (c.rows == kManyRows)
        check_alone(report, what + " alone " + describe(c.weight), c, x, weights, bias, before, got);
}

// Codes of activations, and where the sums of their runs begin.
void check_codes(Report& report, const Buffer<float>& x, const float* gain, int64_t width, const Codes& how) {
    const int64_t rows = static_cast<int64_t>(x.size()) / width;
    const Prepared got(rows, width, how), wanted(rows, width, how);
    prepare_rows(report.rows, x, gain, width, Rounding::kInt8, got);
    prepare_rows(rows_baseline, x, gain, width, Rounding::kInt8, wanted);
    const std::string what =
        format("prepare int8%s width=%d bits=%d run=%d%s ", gain ? " normed" : "", static_cast<int>(width), how.bits,
               static_cast<int>(how.run), how.pairs ? " pairs" : "");
    if (!gain) {
        report.same(what + "codes", got.codes, wanted.codes);
        report.same(what + "wide codes", got.wide, wanted.wide);
        report.same(what + "scale", got.scale, wanted.scale);
        report.same(what + "starts", got.starts, wanted.starts);
        return;
    }
    // A norm's last bit may move a code to its neighbour; starts follow the codes, as seen without a norm.
    const bool wide = got.codes.empty();
    const Buffer<float> codes = wide ? floats_of(got.wide) : floats_of(got.codes);
    report.close(what + "codes", codes, wide ? floats_of(wanted.wide) : floats_of(wanted.codes),
                 std::vector<double>(codes.size(), 1.0));
    report.close(what + "scale", got.scale, wanted.scale, std::vector<double>(got.scale.size(), 1e-6));
}

constexpr StoredKind kNoScale = StoredKind::kInt;
constexpr StoredKind kBf16 = StoredKind::kBfloat16;
constexpr int kWidths[] = {2, 3, 4, 5, 6, 8};

}  // namespace

void check_prepare(Report& report) {
    for (const int64_t width : {1, 31, 32, 33, 64, 100, 576}) {
        const int64_t rows = 5;
        Random random(static_cast<uint64_t>(width));
        const Buffer<float> x = make_rows(rows, width, true, random), gain = random.values(width);
        const int w = static_cast<int>(width);
        for (const Rounding rounding : {Rounding::kNone, Rounding::kBfloat16, Rounding::kInt8}) {
            const Prepared got(rows, width), wanted(rows, width);
            prepare_rows(report.rows, x, nullptr, width, rounding, got);
            prepare_rows(rows_baseline, x, nullptr, width, rounding, wanted);
            std::vector<double> bound;
            for (const float value : wanted.values)
                bound.push_back(std::fabs(static_cast<double>(value)) * 2 * kEps + 1e-37);
            report.close(format("prepare %s width=%d as floats", name_of(rounding), w), got.values, wanted.values,
                         bound);
        }
        for (const Codes& how :
             {Codes{8, 0, false}, Codes{8, 0, true}, Codes{4, 32, false}, Codes{4, 32, true}, Codes{6, 16, true}}) {
            check_codes(report, x, nullptr, width, how);
            check_codes(report, x, gain.data(), width, how);
        }
    }
}

void check_product(Report& report) {
    for (const Rounding rounding : {Rounding::kInt8, Rounding::kBfloat16, Rounding::kNone}) {
        for (const int bits : kWidths) {
            for (const int64_t group : {0, 32, 64, 128}) {
                if (!group && bits < 8) continue;           // no format has one scale a row below 8 bits
                const int64_t k = group ? group * 3 : 419;  // one scale a row: any K
                const StoredKind scale = group == 64    ? StoredKind::kFloat32
                                         : group == 128 ? StoredKind::kFloat16
                                                        : kBf16;
                const WeightShape shape{StoredKind::kInt, bits, group, scale, 70, k};
                if (rounding != Rounding::kInt8) {
                    check_case(report, {shape, rounding, group == 32 ? 1 : 5, 1, false, false, false});
                    continue;
                }
                for (const int64_t rows : {1, 2, 3, 4, 5, 6, 13, kManyRows})
                    check_case(report, {shape, rounding, rows, 1, rows == 3, rows == 5, false});
            }
        }
        for (const StoredKind kind :
             {StoredKind::kBfloat16, StoredKind::kFloat16, StoredKind::kFloat32, StoredKind::kFloat8}) {
            const StoredKind scale = kind == StoredKind::kFloat8 ? StoredKind::kFloat32 : kNoScale;
            for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, kManyRows}) {
                check_case(report, {{kind, 16, 0, scale, 70, 131}, rounding, rows, 1, rows == 2, rows == 7, false});
            }
        }
    }
    // Several matrices, a gated pair, widths past a panel, rows past kRowsTogether.
    const WeightShape wide{StoredKind::kInt, 4, 32, kBf16, 130, 640}, bytes{StoredKind::kInt, 8, 0, kBf16, 65, 1100};
    const WeightShape halves{kBf16, 16, 0, kNoScale, 129, 1100};
    for (const WeightShape& shape : {wide, bytes, halves}) {
        for (const Rounding rounding : {Rounding::kInt8, Rounding::kBfloat16}) {
            check_case(report, {shape, rounding, 2, 2, true, false, false});
            check_case(report, {shape, rounding, 7, 2, false, false, true});
        }
    }
    check_case(report,
               {{StoredKind::kInt, 4, 32, kBf16, 3, 64}, Rounding::kInt8, kRowsTogether + 9, 1, false, false, false});
    check_case(report,
               {{kBf16, 16, 0, kNoScale, 3, 64}, Rounding::kBfloat16, kRowsTogether + 9, 1, false, false, false});
}

void check_likeliest(Report& report) {
    for (const int64_t outputs : {1, 70, 1100}) {
        for (const int64_t k : {1, 5, 64}) {
            const int64_t rows = outputs == 70 ? kRowsTogether + 3 : 3, inputs = 33;
            Random random(static_cast<uint64_t>(outputs + k));
            const Weight weight = make_weight({kBf16, 16, 0, kNoScale, outputs, inputs}, random);
            const Prepared prepared(rows, inputs);
            prepare_rows(report.rows, make_rows(rows, inputs, false, random), nullptr, inputs, Rounding::kNone,
                         prepared);
            Buffer<float> y(static_cast<size_t>(rows * outputs)), floors(static_cast<size_t>(rows), -3.40282347e38f);
            Buffer<float> logits(static_cast<size_t>(rows * k), -7.0f), wanted_logits;
            Buffer<int32_t> ids(logits.size(), -7), wanted_ids;
            Product all{};
            all.x = prepared.record;
            all.weight[0] = &weight.matrix;
            all.y[0] = y.data();
            all.y_stride[0] = outputs;
            all.rows = rows;
            all.members = 1;
            Product few = all;
            constexpr int64_t kPlaces = 2;
            Buffer<Best> lists(static_cast<size_t>(kPlaces * rows * k));
            Buffer<int32_t> held(static_cast<size_t>(kPlaces * rows)), taken(kPlaces);
            few.y[0] = nullptr;
            few.likeliest = {lists.data(), held.data(), floors.data(), taken.data(), kPlaces, k};
            for (int64_t unit = product_units(all); unit-- > 0;) report.rows.product(all, unit);
            for (int64_t unit = product_units(few); unit-- > 0;) {
                taken[0] = static_cast<int32_t>(unit % 2);  // as if another thread were there
                report.rows.product(few, unit);
            }
            const Reduce work{few.likeliest, rows, logits.data(), ids.data()};
            for (int64_t row = 0; row < rows; ++row) {
                report.rows.reduce(work, row);
                const float* x = y.data() + row * outputs;
                for (int64_t n = 0; n < outputs; ++n) {
                    int64_t before = 0;
                    for (int64_t m = 0; m < outputs; ++m) before += x[m] > x[n] || (x[m] == x[n] && m < n);
                    if (before >= k) continue;
                    wanted_ids.push_back(static_cast<int32_t>(n));
                    wanted_logits.push_back(x[n]);
                }
                for (int64_t n = outputs; n < k; ++n) {
                    wanted_ids.push_back(0);
                    wanted_logits.push_back(-__builtin_inff());
                }
            }
            const std::string what = format("likeliest %d of %d ", static_cast<int>(k), static_cast<int>(outputs));
            report.same(what + "tokens", ids, wanted_ids);
            report.same(what + "logits", logits, wanted_logits);
            report.same(what + "left for the next", held, Buffer<int32_t>(held.size(), 0));
            report.same(what + "floors for the next", floors, Buffer<float>(floors.size(), -3.40282347e38f));
        }
    }
}

void check_embed(Report& report) {
    std::vector<WeightShape> shapes{{kBf16, 16, 0, kNoScale, 70, 131},
                                    {StoredKind::kFloat16, 16, 0, kNoScale, 70, 131},
                                    {StoredKind::kFloat32, 16, 0, kNoScale, 70, 131},
                                    {StoredKind::kFloat8, 8, 0, kBf16, 70, 131}};
    for (const int bits : kWidths) {
        shapes.push_back({StoredKind::kInt, bits, 0, kBf16, 70, 131});
        shapes.push_back({StoredKind::kInt, bits, 32, kBf16, 70, 160});
    }
    for (const WeightShape& shape : shapes) {
        Random random(static_cast<uint64_t>(shape.bits));
        const Weight weight = make_weight(shape, random);
        const Buffer<int32_t> ids{0, 69, 63, 64, 5};
        Buffer<float> got(static_cast<size_t>(5 * shape.inputs), -7.0f), wanted;
        const Embed work{&weight.matrix, ids.data(), got.data()};
        for (int64_t token = 0; token < 5; ++token) {
            report.rows.embed(work, token);
            const double* row = weight.values.data() + ids[token] * shape.inputs;
            for (int64_t k = 0; k < shape.inputs; ++k) wanted.push_back(static_cast<float>(row[k]));
        }
        report.close("embed " + describe(shape), got, wanted, std::vector<double>(got.size(), 1e-300));
    }
}

}  // namespace halve
