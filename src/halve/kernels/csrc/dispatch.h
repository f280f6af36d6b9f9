// From an instruction set's number to its rows, and one operation spread over threads. For api.cpp and program.cpp,
// which are compiled once, for any processor.
#pragma once

#include "pool.h"
#include "rows.h"

namespace halve {

constexpr int64_t kWorthThread = 1 << 15;  // multiply-adds, about; below, waking another thread costs more

inline const Rows* const kIsas[] = {
    &rows_baseline,
#ifdef HALVE_HAS_AVX2
    &rows_avx2,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_AVX512
    &rows_avx512,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_AVX512BF16
    &rows_avx512bf16,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_AVXVNNI
    &rows_avxvnni,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_AMX
    &rows_amx,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_NEON_DOTPROD
    &rows_neon_dotprod,
#else
    nullptr,
#endif
#ifdef HALVE_HAS_NEON_I8MM
    &rows_neon_i8mm,
#else
    nullptr,
#endif
};
constexpr int kNumIsas = sizeof kIsas / sizeof *kIsas;

inline const Rows* rows_of(int32_t isa) { return isa >= 0 && isa < kNumIsas ? kIsas[isa] : nullptr; }

// Run one operation of an instruction set, block by block.
template <class Work>
int32_t spread(int32_t isa, void (*Rows::*operation)(const Work&, int64_t), const Work& work, int64_t blocks,
               int64_t cost, int32_t threads) {
    const Rows* rows = rows_of(isa);
    if (!rows) return 1;
    struct Context {
        void (*operation)(const Work&, int64_t);
        const Work& work;
    };
    const Context context{rows->*operation, work};
    run(
        [](const void* of, int64_t block) {
            const Context& c = *static_cast<const Context*>(of);
            c.operation(c.work, block);
        },
        &context, blocks, cost < kWorthThread ? 1 : threads);
    return 0;
}

}  // namespace halve
