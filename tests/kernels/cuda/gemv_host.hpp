// Stands in for `gemv_machine.cuh` on a CPU, so that `gemv.cu` itself runs there: threads of a program are fibers, and
// the words of the machine are said in C++. Copies arrive as late as they may: when they are waited for.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n, blocks)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

struct Copy {
    u32 to;
    const u8 *from;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
    u32 operands[6];
    int barriers = 0;       // of the warp that this thread came to
    int program_barriers = 0;
    bool done = false;
};

struct Index {
    int x;
};

alignas(16) u8 shared[256 << 10];
static std::vector<std::unique_ptr<Fiber>> fibers;
static ucontext_t outside;
static int current;
static Index threadIdx, blockIdx, gridDim;

static void pause() {
    swapcontext(&fibers[current]->context, &outside);
}

static void together(int first, int last, int Fiber::*count) {
    const int mine = ++(fibers[current].get()->*count);
    for (bool all = false; !all;) {
        all = true;
        for (int i = first; i < last; ++i) all &= fibers[i]->done || fibers[i].get()->*count >= mine;
        if (!all) pause();
    }
}

static void __syncwarp() {
    together(current / 32 * 32, current / 32 * 32 + 32, &Fiber::barriers);
}
static void __syncthreads() {
    together(0, (int)fibers.size(), &Fiber::program_barriers);
}

static float __uint_as_float(u32 bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}
static u32 __float_as_uint(float v) {
    u32 bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

static u32 shared_address(const void *at) { return (u32)((const u8 *)at - shared); }
static void copy16(u32 to, const u8 *from) {
    if (to % 16 || (uintptr_t)from % 16 || to + 16 > sizeof shared) std::abort();
    fibers[current]->open.push_back({to, from});
}
static void commit() {
    fibers[current]->groups.push_back(std::move(fibers[current]->open));
    fibers[current]->open.clear();
}
template <int N> static void arrived() {
    auto &groups = fibers[current]->groups;
    for (; groups.size() > N; groups.pop_front())
        for (auto &copy : groups.front()) std::memcpy(shared + copy.to, copy.from, 16);
}
static void bring_near(const void *) {}
static void after_the_kernel_before() {}

static u16 to_bf16(float v) {
    const u32 bits = __float_as_uint(v);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static float half_of(u32 pair, int high) { return __uint_as_float(high ? pair & 0xffff0000u : pair << 16); }
static u32 fma2(u32 a, u32 b, u32 c) {
    const u32 low = to_bf16(std::fmaf(half_of(a, 0), half_of(b, 0), half_of(c, 0)));
    return low | (u32)to_bf16(std::fmaf(half_of(a, 1), half_of(b, 1), half_of(c, 1))) << 16;
}
template <u32 MASK> static u32 and_or(u32 v, u32 bits) { return (v & MASK) | bits; }

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
static void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(fibers[current]->operands, mine, sizeof mine);
    __syncwarp();
    const int warp = current / 32 * 32, lane = current % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const u32 *a = fibers[warp + row % 8 * 4 + k % 8 / 2]->operands;
            const u32 *b = fibers[warp + column * 4 + k % 8 / 2]->operands;
            sum[i] += half_of(a[row / 8 + 2 * (k / 8)], k % 2) * half_of(b[4 + k / 8], k % 2);
        }
    }
    __syncwarp();
}

static float number_of(u8 code, float) {  // e4m3
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp((float)fraction, -9);
    return code & 128 ? -size : size;
}
static int number_of(u8 code, int) { return (signed char)code; }

// PTX ISA, "Matrix fragments for mma.m16n8k32". left: what a byte of `a` is.
template <typename Sum, typename Left>
static void multiply_in(Sum (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Left left) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(fibers[current]->operands, mine, sizeof mine);
    __syncwarp();
    const int warp = current / 32 * 32, lane = current % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k) {
            const u32 *a = fibers[warp + row % 8 * 4 + k % 16 / 4]->operands;
            const u32 *b = fibers[warp + column * 4 + k % 16 / 4]->operands;
            const int at = 8 * (k % 4);
            sum[i] += left(a[row / 8 + 2 * (k / 16)] >> at) * number_of(b[4 + k / 16] >> at, Sum());
        }
    }
    __syncwarp();
}

template <typename Sum>
static void multiply_bytes(Sum (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_in(sum, a0, a1, a2, a3, b0, b1, [](u8 code) { return number_of(code, Sum()); });
}
static void multiply_codes(int (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_in(sum, a0, a1, a2, a3, b0, b1, [](u8 code) { return (int)code; });
}
template <u32 PICK> static u32 picked(u32 a, u32 b) {
    const uint64_t both = (uint64_t)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) d |= (u32)(both >> 8 * (PICK >> 4 * i & 7) & 255) << 8 * i;
    return d;
}
static u32 across(u32 v, int by) {
    fibers[current]->operands[0] = v;
    __syncwarp();
    const u32 found = fibers[current ^ by]->operands[0];
    __syncwarp();
    return found;
}
static u32 largest_of_all(u32 v) {
    for (int by = 1; by < 32; by *= 2) {
        const u32 other = across(v, by);
        v = other > v ? other : v;
    }
    return v;
}
static int sum_of_all(int v) {
    for (int by = 1; by < 32; by *= 2) v += (int)across((u32)v, by);
    return v;
}
static float rsqrtf(float v) { return 1 / std::sqrt(v); }
static int nearest(float v) { return (int)std::nearbyint(v); }

static std::function<void()> body;
static void enter() {
    body();
    fibers[current]->done = true;
    pause();
}

extern "C" void gemv(const u8 *, const u8 *, const float *, const u8 *, const float *, const float *, const u16 *, void *,
                     int, int, int, i64, i64, i64, i64, float);

extern "C" void run(int programs, int threads, const u8 *codes, const u8 *scales, const float *bias, const u8 *x,
                    const float *x_scales, const float *gain, const u16 *add, void *out, int T, int N, int K,
                    i64 code_row, i64 x_row, i64 add_row, i64 out_row, float eps) {
    body = [=] { gemv(codes, scales, bias, x, x_scales, gain, add, out, T, N, K, code_row, x_row, add_row, out_row, eps); };
    gridDim = {programs};
    for (int p = 0; p < programs; ++p) {
        blockIdx = {p};
        std::memset(shared, 0xff, sizeof shared);  // NaN, to be seen where it is read
        fibers.clear();
        for (int t = 0; t < threads; ++t) {
            auto &fiber = *fibers.emplace_back(std::make_unique<Fiber>());
            getcontext(&fiber.context);
            fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            makecontext(&fiber.context, enter, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (current = 0; current < threads; ++current)
                if (!fibers[current]->done) {
                    threadIdx = {current};
                    left = true;
                    swapcontext(&outside, &fibers[current]->context);
                }
        }
    }
}
