// What the checks of the self-test share: numbers that are the same everywhere, and a line for each check.
#pragma once

#include <stdarg.h>
#include <stdint.h>

#include <cmath>
#include <string>
#include <vector>

#include "guarded.h"
#include "rows.h"

namespace halve {

// The rows under test, and the count of checks so far.
class Report {
   public:
    Report(const char* isa, const Rows& rows) : isa(isa), rows(rows) {}

    // One line for values that may differ by `bound`, element by element. NaN agrees with NaN alone.
    void close(const std::string& what, const Buffer<float>& got, const Buffer<float>& wanted,
               const std::vector<double>& bound);

    // One line for values that may not differ.
    template <class Values>
    void same(const std::string& what, const Values& got, const Values& wanted) {
        size_t different = 0, first = 0;
        for (size_t i = got.size(); i-- > 0;) {
            if (memory(got[i]) == memory(wanted[i])) continue;
            ++different;
            first = i;
        }
        const std::string detail = different ? std::to_string(different) + " of " + std::to_string(got.size()) +
                                                   " differ, the first at " + std::to_string(first)
                                             : "equal";
        line(!different && got.size() == wanted.size(), what, detail);
    }

    // The summary, and the exit status of the program.
    int finish() const;

    const char* const isa;
    const Rows& rows;

   private:
    template <class T>
    static uint64_t memory(const T& value) {
        uint64_t bits = 0;
        __builtin_memcpy(&bits, &value, sizeof value);
        return bits;
    }

    void line(bool ok, const std::string& what, const std::string& detail);

    int passed_ = 0;
    int failed_ = 0;
};

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// xorshift64* (arXiv:1402.6246).
class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    uint32_t bits() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1du >> 32);
    }

    // Uniform in [-1, 1).
    float value() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }

    Buffer<float> values(int64_t size, float scale = 1.0f) {
        Buffer<float> out(static_cast<size_t>(size));
        for (float& x : out) x = value() * scale;
        return out;
    }

   private:
    uint64_t state_;
};

void check_guards(Report& report);

// One function for each entry of the table of rows.
void check_prepare(Report& report);
void check_product(Report& report);
void check_likeliest(Report& report);  // and reduce
void check_embed(Report& report);
void check_rms_norm(Report& report);
void check_rope(Report& report);
void check_elementwise(Report& report);
void check_attention(Report& report);  // and kv_write, attention_combine
void check_copy_block(Report& report);
void check_sample(Report& report);

}  // namespace halve
