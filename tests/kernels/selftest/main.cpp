// Compare the rows of one instruction set with the baseline rows:
//
//     halve_selftest [--unchecked] [--before] ISA [part ...]
//
// Exits 0 when every check agrees, 1 when one does not, 2 for unknown arguments, 77 where the processor (or the build)
// lacks the instruction set. --unchecked does not ask the processor: an emulated one may run more than its CPUID says.
// Nothing may be touched behind a buffer, or with --before in front of it (guarded.h): that ends the program.
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "report.h"

namespace halve {

std::string format(const char* pattern, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    return text;
}

void Report::line(bool ok, const std::string& what, const std::string& detail) {
    (ok ? passed_ : failed_) += 1;
    printf("%s %s %s: %s\n", ok ? "ok" : "FAIL", isa, what.c_str(), detail.c_str());
}

void Report::close(const std::string& what, const Buffer<float>& got, const Buffer<float>& wanted,
                   const std::vector<double>& bound) {
    double worst = 0.0;
    size_t where = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        if (std::isnan(got[i]) && std::isnan(wanted[i])) continue;
        double error = got[i] == wanted[i] ? 0.0 : std::fabs(static_cast<double>(got[i]) - wanted[i]) / bound[i];
        if (std::isnan(error)) error = HUGE_VAL;
        if (error <= worst) continue;
        worst = error;
        where = i;
    }
    const bool ok = worst <= 1.0 && !got.empty() && got.size() == wanted.size();
    std::string detail = format("worst %.3f of the bound", worst);
    if (worst > 1.0) {
        detail +=
            format(", %g for %g at %zu", static_cast<double>(got[where]), static_cast<double>(wanted[where]), where);
    }
    line(ok, what, detail);
}

int Report::finish() const {
    printf("%d checks of %s agree with baseline, %d do not\n", passed_, isa, failed_);
    return failed_ || !passed_ ? 1 : 0;
}

namespace {

struct Isa {
    const char* name;
    const Rows* rows;
    bool runs;
};

// What the processor has; the operating system's part (saved registers) is in these answers too.
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// A bit of a register of CPUID's leaf 7 (Intel's manual, volume 2, CPUID): `of` 0 to 3 for EAX to EDX.
bool leaf7(unsigned subleaf, int of, int bit) {
    unsigned r[4] = {};
    return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[of] >> bit & 1);
}

bool has_avxvnni() { return has_avx2() && leaf7(1, 0, 4); }

// Linux lends tile registers to who asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool has_amx() {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 && has_avx512bf16() && leaf7(0, 3, 22) && leaf7(0, 3, 24) &&
           leaf7(0, 3, 25);
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
// A feature by Linux's bit of AT_HWCAP (or of AT_HWCAP2), and by macOS's name.
bool has_arm(bool second, int bit, const char* name) {
#if defined(__linux__)
    (void)name;
    return getauxval(second ? AT_HWCAP2 : AT_HWCAP) >> bit & 1;
#elif defined(__APPLE__)
    (void)second, (void)bit;
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has;
#else
    (void)second, (void)bit, (void)name;
    return false;
#endif
}

bool has_neon_dotprod() { return has_arm(false, 20, "hw.optional.arm.FEAT_DotProd"); }

bool has_neon_i8mm() {
    return has_neon_dotprod() && has_arm(true, 13, "hw.optional.arm.FEAT_I8MM") &&
           has_arm(true, 14, "hw.optional.arm.FEAT_BF16");
}
#endif

struct Part {
    const char* name;
    void (*check)(Report&);
};

constexpr Part kParts[] = {
    {"guards", check_guards},       {"prepare", check_prepare},
    {"product", check_product},     {"likeliest", check_likeliest},
    {"embed", check_embed},         {"rms_norm", check_rms_norm},
    {"rope", check_rope},           {"elementwise", check_elementwise},
    {"attention", check_attention}, {"copy_block", check_copy_block},
    {"sample", check_sample},
};

int run(int count, char** arguments) {
    const Isa isas[] = {
        {"baseline", &rows_baseline, true},
#ifdef HALVE_HAS_AVX2
        {"avx2", &rows_avx2, has_avx2()},
#endif
#ifdef HALVE_HAS_AVX512
        {"avx512", &rows_avx512, has_avx512()},
#endif
#ifdef HALVE_HAS_AVX512BF16
        {"avx512bf16", &rows_avx512bf16, has_avx512bf16()},
#endif
#ifdef HALVE_HAS_AVXVNNI
        {"avxvnni", &rows_avxvnni, has_avxvnni()},
#endif
#ifdef HALVE_HAS_AMX
        {"amx", &rows_amx, has_amx()},
#endif
#ifdef HALVE_HAS_NEON_DOTPROD
        {"neon_dotprod", &rows_neon_dotprod, has_neon_dotprod()},
#endif
#ifdef HALVE_HAS_NEON_I8MM
        {"neon_i8mm", &rows_neon_i8mm, has_neon_i8mm()},
#endif
    };
    const auto flag = [&](const char* name) {
        const bool given = count > 1 && !strcmp(arguments[1], name);
        if (given) --count, ++arguments;
        return given;
    };
    const bool unchecked = flag("--unchecked");
    if (flag("--before")) guarded_side = Side::kBefore;
    const Isa* chosen = nullptr;
    for (const Isa& isa : isas) {
        if (count > 1 && !strcmp(isa.name, arguments[1])) chosen = &isa;
    }
    if (!chosen) {
        fprintf(stderr,
                "usage: halve_selftest [--unchecked] [--before] ISA [part ...]; instruction sets of this build:");
        for (const Isa& isa : isas) fprintf(stderr, " %s", isa.name);
        fprintf(stderr, "; parts:");
        for (const Part& part : kParts) fprintf(stderr, " %s", part.name);
        fprintf(stderr, "\n");
        return 2;
    }
    if (!chosen->runs && !unchecked) {
        printf("not run: this processor lacks what %s needs\n", chosen->name);
        return 77;
    }
    for (int i = 2; i < count; ++i) {
        bool known = false;
        for (const Part& part : kParts) known |= !strcmp(part.name, arguments[i]);
        if (known) continue;
        fprintf(stderr, "unknown part %s\n", arguments[i]);
        return 2;
    }
    Report report(chosen->name, *chosen->rows);
    for (const Part& part : kParts) {
        bool wanted = count == 2;
        for (int i = 2; i < count; ++i) wanted |= !strcmp(part.name, arguments[i]);
        if (wanted) part.check(report);
    }
    return report.finish();
}

}  // namespace
}  // namespace halve

int main(int count, char** arguments) { return halve::run(count, arguments); }
