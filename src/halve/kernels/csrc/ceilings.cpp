// What the machine can do at most: loops of one instruction sequence whose operands never leave the registers, and a
// loop that reads memory and does nothing else. They run on the team that the kernels run on.
//
// The arithmetic loops are inline assembly, so that no compiler drops, hoists or spills any of them. A round is a fixed
// number of instructions on independent accumulators, more of them than latency times issue rate of the processors
// that have the instruction (4 or 5 cycles times 2 a cycle), and needs none beyond register 15.
#include <cstdint>
#include <cstring>

#include "pool.h"

namespace halve {
namespace {

constexpr int64_t kReadBlock = 2 << 20;  // bytes handed out together: one huge page
constexpr int64_t kRounds = 10000;       // of one block: some 20 to 100 microseconds
constexpr int64_t kStreams = 4;          // places of a block that are read in turn: one alone leaves prefetchers idle
constexpr int64_t kLine = 64;

enum class Loop : int32_t {
    kRead = 0,
    kDotZmm = 1,         // vpdpbusd, 12 x 64 multiply-adds a round
    kDotYmm = 2,         // vpdpbusd, 12 x 32
    kMaddBytes = 3,      // vpmaddubsw, vpmaddwd, vpaddd, 5 x 32
    kMaddNibbles = 4,    // 8 x vpmaddubsw, 7 x vpaddw, vpmaddwd, vpaddd, twice, 16 x 32
    kDotBfloat16 = 5,    // vdpbf16ps, 12 x 32
    kFmaZmm = 6,         // vfmadd231ps, 12 x 16
    kFmaYmm = 7,         // 12 x 8
    kMulAddVector = 8,   // multiply and add of four floats as this library is compiled, 12 x 4
    kTileBytes = 9,      // tdpbssd, 4 x 16 x 16 x 64
    kTileBfloat16 = 10,  // tdpbf16ps, 4 x 16 x 16 x 32
};

typedef uint64_t Words __attribute__((vector_size(16)));

void read_block(const void* arena, int64_t block) {
    const char* start = static_cast<const char*>(arena) + block * kReadBlock;
    constexpr int64_t apart = kReadBlock / kStreams;
    Words seen[kStreams] = {};
    for (int64_t at = 0; at < apart; at += kLine) {
        for (int64_t stream = 0; stream < kStreams; ++stream) {
            const char* line = start + stream * apart + at;
            for (int64_t i = 0; i < kLine; i += sizeof(Words)) {
                Words words;
                memcpy(&words, line + i, sizeof words);
                seen[stream] ^= words;
            }
        }
    }
    const Words all = (seen[0] ^ seen[1]) ^ (seen[2] ^ seen[3]);
    asm volatile("" : : "g"(all[0] ^ all[1]));  // used, for all that the compiler knows
}

#if defined(__x86_64__)

#define HALVE_TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define HALVE_CLOBBERS                                                                                               \
    "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15"
// All registers zero, then `body` kRounds times.
#define HALVE_LOOP(body)                                                                                          \
    int64_t rounds = kRounds;                                                                                     \
    asm volatile("vzeroall\n1:\n\t" body "dec %0\n\tjnz 1b\n\tvzeroupper\n\t" : "+r"(rounds) : : HALVE_CLOBBERS); \
    (void)rounds

#define HALVE_DOT_ZMM(r) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #r "\n\t"
void dot_zmm(const void*, int64_t) { HALVE_LOOP(HALVE_TWELVE(HALVE_DOT_ZMM)); }

#define HALVE_DOT_YMM(r) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #r "\n\t"
void dot_ymm(const void*, int64_t) { HALVE_LOOP(HALVE_TWELVE(HALVE_DOT_YMM)); }

// Products of a byte and a byte in pairs of 16 bits, pairs of those in 32 bits, added. Register 13 is for the ones.
#define HALVE_MADD_BYTES(sum, t)              \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #t   \
    "\n\t"                                    \
    "vpmaddwd %%ymm13, %%ymm" #t ", %%ymm" #t \
    "\n\t"                                    \
    "vpaddd %%ymm" #t ", %%ymm" #sum ", %%ymm" #sum "\n\t"
void madd_bytes(const void*, int64_t) {
    HALVE_LOOP(HALVE_MADD_BYTES(0, 5) HALVE_MADD_BYTES(1, 6) HALVE_MADD_BYTES(2, 7) HALVE_MADD_BYTES(3, 8)
                   HALVE_MADD_BYTES(4, 9));
}

// Codes of 4 bits leave room for eight such pairs in 16 bits (8 * 2 * 15 * 127 < 2^15), widened together. Two chains
// side by side: each addition waits for the one before.
#define HALVE_MADD_FIRST "vpmaddubsw %%ymm14, %%ymm15, %%ymm11\n\t vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n\t"
#define HALVE_MADD_NEXT(t, u)                                                            \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #t "\n\t vpmaddubsw %%ymm14, %%ymm15, %%ymm" #u \
    "\n\t"                                                                               \
    "vpaddw %%ymm" #t ", %%ymm11, %%ymm11\n\t vpaddw %%ymm" #u ", %%ymm12, %%ymm12\n\t"
#define HALVE_MADD_WIDEN                                                                                     \
    "vpmaddwd %%ymm13, %%ymm11, %%ymm11\n\t vpmaddwd %%ymm13, %%ymm12, %%ymm12\n\t vpaddd %%ymm11, %%ymm0, " \
    "%%ymm0\n\t vpaddd %%ymm12, %%ymm1, %%ymm1\n\t"
void madd_nibbles(const void*, int64_t) {
    HALVE_LOOP(HALVE_MADD_FIRST HALVE_MADD_NEXT(2, 3) HALVE_MADD_NEXT(4, 5) HALVE_MADD_NEXT(6, 7) HALVE_MADD_NEXT(8, 9)
                   HALVE_MADD_NEXT(2, 3) HALVE_MADD_NEXT(4, 5) HALVE_MADD_NEXT(6, 7) HALVE_MADD_WIDEN);
}

#define HALVE_DOT_BFLOAT16(r) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #r "\n\t"
void dot_bfloat16(const void*, int64_t) { HALVE_LOOP(HALVE_TWELVE(HALVE_DOT_BFLOAT16)); }

#define HALVE_FMA_ZMM(r) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #r "\n\t"
void fma_zmm(const void*, int64_t) { HALVE_LOOP(HALVE_TWELVE(HALVE_FMA_ZMM)); }

#define HALVE_FMA_YMM(r) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #r "\n\t"
void fma_ymm(const void*, int64_t) { HALVE_LOOP(HALVE_TWELVE(HALVE_FMA_YMM)); }

// Full tiles of zeros; four sums, as many as one latency takes.
#define HALVE_TILES(multiply)                                                                         \
    struct {                                                                                          \
        uint8_t palette = 1, start = 0, zeros[14] = {};                                               \
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};                                    \
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};                                          \
    } setup;                                                                                          \
    static_assert(sizeof setup == 64, "the processor reads 64 bytes");                                \
    asm volatile("ldtilecfg %0" : : "m"(setup));                                                      \
    for (int64_t round = 0; round < kRounds; ++round) {                                               \
        asm volatile(multiply " %tmm6, %tmm4, %tmm0\n\t" multiply " %tmm7, %tmm4, %tmm1\n\t" multiply \
                              " %tmm6, %tmm5, %tmm2\n\t" multiply " %tmm7, %tmm5, %tmm3");            \
    }                                                                                                 \
    asm volatile("tilerelease")
void tile_bytes(const void*, int64_t) { HALVE_TILES("tdpbssd"); }
void tile_bfloat16(const void*, int64_t) { HALVE_TILES("tdpbf16ps"); }

#endif

#if defined(__aarch64__)
#define HALVE_VECTOR_REGISTER "w"
#elif defined(__x86_64__)
#define HALVE_VECTOR_REGISTER "x"
#else
#define HALVE_VECTOR_REGISTER "m"
#endif

// For every processor; the empty assembly stands for a use and a change of each operand.
void mul_add_vector(const void*, int64_t) {
    typedef float Four __attribute__((vector_size(16)));
    Four sums[12] = {}, x = {};
    const Four y = {};
    for (int64_t round = 0; round < kRounds; ++round) {
        for (Four& sum : sums) {
            sum += x * y;
            asm volatile("" : "+" HALVE_VECTOR_REGISTER(sum), "+" HALVE_VECTOR_REGISTER(x));
        }
    }
}

using Task = void (*)(const void*, int64_t);

Task task_of(Loop loop) {
    switch (loop) {
        case Loop::kRead:
            return read_block;
        case Loop::kMulAddVector:
            return mul_add_vector;
#if defined(__x86_64__)
        case Loop::kDotZmm:
            return dot_zmm;
        case Loop::kDotYmm:
            return dot_ymm;
        case Loop::kMaddBytes:
            return madd_bytes;
        case Loop::kMaddNibbles:
            return madd_nibbles;
        case Loop::kDotBfloat16:
            return dot_bfloat16;
        case Loop::kFmaZmm:
            return fma_zmm;
        case Loop::kFmaYmm:
            return fma_ymm;
        case Loop::kTileBytes:
            return tile_bytes;
        case Loop::kTileBfloat16:
            return tile_bfloat16;
#endif
        default:
            return nullptr;
    }
}

}  // namespace
}  // namespace halve

// Run blocks [0, blocks) of a loop. kRead reads block * 2 MiB of the arena; the others do 10000 rounds a block and take
// no arena. Returns 0, or 1 when this library has no such loop.
extern "C" __attribute__((visibility("default"))) int32_t halve_ceiling(int32_t loop, const void* arena, int64_t blocks,
                                                                        int32_t threads) {
    const halve::Task task = halve::task_of(static_cast<halve::Loop>(loop));
    if (!task) return 1;
    halve::run(task, arena, blocks, threads);
    return 0;
}
