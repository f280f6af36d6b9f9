// out[t, n] = sum_k x[t, k] * weight[n, k] for at most 8 tokens, every weight read once, as fast as memory gives it.
//
// A program takes tiles of 16 * TALL outputs; its warps share a tile's inputs and add their sums at its end, in
// order, so that a product is the same to the bit each time. Weights are the left operand of the tensor cores' 16 x 8
// x 16 product, the tokens are the eight columns of the right one. 64 bytes of each of 16 rows are one step of a warp:
// a lane has 16 of these bytes of rows g and g + 8 (g = lane / 4), and the cells' layout makes every field of such a
// register a pair of neighbouring inputs, so that it fits an operand as it is and nothing moves between lanes.
//
// Weights travel through a ring of copies in flight that belongs to one warp. The copies may begin before the kernel
// before this one has ended (programmatic dependent launch), whatever kernel that is: until `after_the_kernel_before`
// only codes and groups' scales are read, which no kernel of a graph writes, and nothing is written but shared memory.
// Tokens, bias, what is added, rows' scales and the output, which may be what is added, are touched after it. Every
// thread passes it, so that a kernel that waited for this one has waited for all before it, too.
//
// A code u of B bits becomes bf16 by a shift and an and-or: 1 + u / 2^B, exactly. The product with all of a group's
// weights - 3/2 is a second, constant left operand, shared by all rows, and 2^B multiplies the row's sum at its end.
//
// Where tokens are rounded to the kind of the weights, to int8 or fp8, both operands are bytes as they are stored: the
// 64 inputs of a step are two products of 16 x 8 x 32, and which input a lane has is the same for both operands.
//
// Of one token or two, codes of 4 bits are multiplied as they lie (PLANES): making bf16 of them takes as long as reading
// them. Numbers of a token become whole numbers of 15 bits under a scale for each group, which is finer than bf16 but
// for those below a 64th of their group's largest, and these become two columns of bytes, 128 * high + low. Two of
// the four fields of a cell are the upper halves of bytes; left where they are they count 16 times, in sums of their
// own. Sums begin at 1.5 * 2^23 as a float has it, so that they are that float plus the sum, and none is converted.
// Such a product takes a norm along (NORM): out = x * gain / sqrt(mean(x^2) + eps) times the weights; the division is
// left for the end.
//
// What a compilation fixes: KIND (0 int, 1 fp8, 2 bf16; 3 int8 and 4 fp8 with tokens of that kind), BITS, GROUP (inputs under one scale, 0: rows), SCALES (bytes
// of a scale, 0: none), TOKENS (1, 2, 4 or 8), TALL, WARPS, RING (steps in flight), BLOCKS (programs that a
// multiprocessor must hold at once), PLANES, NORM, WIDE (output float32), HAS_BIAS, HAS_ADD.

struct __align__(16) Quad {
    u32 at[4];
};

constexpr bool BYTES = KIND >= 3;                       // of both operands
constexpr int FIELDS = KIND >= 2 ? 1 : 16 / BITS;      // of a cell
constexpr int INPUTS = BYTES ? 64 : 32 * FIELDS;        // of one row in a step
constexpr int X_BYTES = BYTES ? 1 : 2;                  // of one number of a token
constexpr int SPAN = GROUP > 0 ? GROUP : 1;             // to divide by
constexpr int GROUPS = GROUP == 0 ? 0 : GROUP >= INPUTS ? 1 : INPUTS / SPAN;  // scales of one row in a step
constexpr int SCALE_BYTES = GROUPS * 16 * SCALES;       // of 16 rows in a step
constexpr int STEP_BYTES = TALL * (1024 + SCALE_BYTES);
constexpr bool OFFSET = KIND == 0 && BITS < 8;
// Sums that begin anew within a row: those of a group, and in e4m3 those of a step, since tensor cores may keep fewer
// bits of them than a register does.
constexpr bool PARTS = GROUP > 0 || KIND == 4;

template <bool WHOLE> struct Number {
    typedef float type;
};
template <> struct Number<true> {
    typedef int type;
};
typedef Number<KIND == 3>::type Part;                // sums of int8 are whole numbers until a scale meets them
typedef Number<KIND == 3 && GROUP == 0>::type Sum;   // of a row

template <int BY> __device__ __forceinline__ u32 shifted(u32 v) {
    if constexpr (BY >= 0)
        return v << BY;
    else
        return v >> -BY;
}

__device__ __forceinline__ float scale_at(const u8 *at) {
    if constexpr (SCALES == 2)
        return __uint_as_float((u32) * (const u16 *)at << 16);
    else
        return *(const float *)at;
}

constexpr int COLUMNS = 2 * TOKENS;                    // of planes
constexpr u32 MAGIC = 0x4b400000u;                      // 1.5 * 2^23

__device__ __forceinline__ float less_magic(int sum) { return __uint_as_float((u32)sum) - 12582912.0f; }

struct __align__(8) Pair {
    u32 at[2];
};

// Tokens of a warp's steps as planes [count][COLUMNS][INPUTS] of bytes; `of_x` gets [count][GROUPS][TOKENS] pairs: the
// group's scale, and 8 times its sum, which codes that are 8 too large bring. Below 1e-30 there is nothing; infinity
// and NaN make the scale NaN. With a norm numbers are multiplied by their gain, and `squares` gets the sum of their
// squares before that for each token.
__device__ __forceinline__ void to_planes(const u8 *x, i64 x_row, const float *gain, int T, int count, int lane,
                                          u8 *planes, float *of_x, float *squares) {
    constexpr int SHARE = GROUP > 0 && GROUP < INPUTS ? GROUP / 4 : 32;  // lanes of a group: each has 4 inputs
    constexpr int AHEAD = 4;                                             // steps that are loaded at once
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const u8 *row = x + (t < T ? t : T - 1) * x_row * 2 + lane * 8;
        float square = 0;
#pragma unroll 1
        for (int from = 0; from < count; from += AHEAD) {
            Pair pair[AHEAD];
            Quad gains[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int s = from + i < count ? from + i : count - 1;
                pair[i] = *(const Pair *)(row + s * INPUTS * 2);
                if constexpr (NORM) gains[i] = *(const Quad *)(gain + s * INPUTS + lane * 4);
            }
#pragma unroll
            for (int step = 0; step < AHEAD; ++step) {
                const int s = from + step;
                if (s >= count) break;
                float value[4];
                u32 largest = 0;  // bits of floats without a sign are ordered as these are; NaN comes last
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 two = pair[step].at[i / 2];
                    value[i] = __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
                    if constexpr (NORM) {
                        square += value[i] * value[i];
                        value[i] *= __uint_as_float(gains[step].at[i]);
                    }
                    const u32 size = __float_as_uint(value[i]) & 0x7fffffffu;
                    largest = size > largest ? size : largest;
                }
                if constexpr (SHARE == 32)
                    largest = largest_of_all(largest);
                else
#pragma unroll
                    for (int by = 1; by < SHARE; by *= 2) {
                        const u32 other = across(largest, by);
                        largest = other > largest ? other : largest;
                    }
                const bool finite = largest < 0x7f800000u;
                const float most = __uint_as_float(largest);
                const bool some = finite && most >= 1e-30f;
                const float steps = some ? 16256.0f / most : 0;
                u32 high = 0, low = 0;
                int total = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int whole = some ? nearest(value[i] * steps) : 0, upper = (whole + 64) >> 7;
                    high |= (u32)(upper & 255) << 8 * i;
                    low |= (u32)((whole - 128 * upper) & 255) << 8 * i;
                    total += whole;
                }
                if constexpr (SHARE == 32)
                    total = sum_of_all(total);
                else
#pragma unroll
                    for (int by = 1; by < SHARE; by *= 2) total += (int)across((u32)total, by);
                u8 *to = planes + (s * COLUMNS + 2 * t) * INPUTS + lane * 4;
                *(u32 *)to = high;
                *(u32 *)(to + INPUTS) = low;
                if (lane % SHARE == 0) {
                    float *of = of_x + ((s * GROUPS + lane / SHARE) * TOKENS + t) * 2;
                    of[0] = !finite ? __uint_as_float(0x7fc00000u) : some ? most / 16256.0f : 0;
                    of[1] = 8.0f * (float)total;
                }
            }
        }
        if constexpr (NORM) {
#pragma unroll
            for (int by = 1; by < 32; by *= 2) square += __uint_as_float(across(__float_as_uint(square), by));
            if (lane == 0) squares[t] = square;
        }
    }
    __syncwarp();
}

// A step of planes. planes: this lane's column at its first input. of_x: the step's, of this lane's token.
__device__ __forceinline__ void step_of_planes(const Quad (&w)[TALL][2], const u8 *planes, const float *of_x,
                                               const u8 *scales, int g, Sum (&sum)[TALL][4]) {
    constexpr int SPANS = GROUP > 0 ? GROUP / 32 : 4;  // fields of a group
    int even[TALL][4], odd[TALL][4];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
        if (f % SPANS == 0) {
#pragma unroll
            for (int m = 0; m < TALL; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) even[m][i] = odd[m][i] = MAGIC;
        }
        const Pair x = *(const Pair *)(planes + 32 * f);
        const u32 mask = f % 2 ? 0xf0f0f0f0u : 0x0f0f0f0fu;
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Quad &of = w[m][i % 2];
                a[i] = mask & (f < 2 ? picked<0x6420>(of.at[i / 2 * 2], of.at[i / 2 * 2 + 1])
                                     : picked<0x7531>(of.at[i / 2 * 2], of.at[i / 2 * 2 + 1]));
            }
            multiply_codes(f % 2 ? odd[m] : even[m], a[0], a[1], a[2], a[3], x.at[0], x.at[1]);
        }
        if ((f + 1) % SPANS == 0) {
            const int at = f / SPANS;
            const float scale = of_x[at * TOKENS * 2], shift = of_x[at * TOKENS * 2 + 1];
#pragma unroll
            for (int m = 0; m < TALL; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float value = -shift;
                    if (SPANS > 1 || f % 2 == 0)
                        value += 128.0f * less_magic(even[m][2 * h]) + less_magic(even[m][2 * h + 1]);
                    if (SPANS > 1 || f % 2 == 1)
                        value += 8.0f * less_magic(odd[m][2 * h]) + 0.0625f * less_magic(odd[m][2 * h + 1]);
                    sum[m][2 * h] += scale_at(scales + m * SCALE_BYTES + (at * 16 + g + 8 * h) * SCALES) * scale * value;
                }
        }
    }
}

// Field F of two cells, as two bf16.
template <int F> __device__ __forceinline__ u32 field(u32 cells) {
    if constexpr (KIND == 2)
        return cells;
    else if constexpr (KIND == 1) {
        u32 a = shifted<8 - 8 * F>(cells);
        return fma2(and_or<0x80008000u>(a, (a >> 4) & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
    } else if constexpr (BITS == 8) {
        u32 a = shifted<-8 * F>(cells);
        return fma2(and_or<0x007f007fu>(a, 0x43004300u), 0x3f803f80u, and_or<0x00800080u>(a, 0xc300c300u));
    } else {
        constexpr u32 MASK = OFFSET ? ((1u << BITS) - 1) << (OFFSET ? 7 - BITS : 0) : 0;
        return and_or<MASK * 65537u>(shifted<7 - BITS - BITS * F>(cells), 0x3f803f80u);
    }
}

template <bool FIRST, typename A, typename B> __device__ __forceinline__ auto &choose(A &a, B &b) {
    if constexpr (FIRST)
        return a;
    else
        return b;
}

// The part of a step that field F is, and all after it.
template <int F>
__device__ __forceinline__ void fields(const Quad (&w)[TALL][2], const Quad (&x)[FIELDS], const u8 *scales, int g,
                                       Sum (&sum)[TALL][4], Part (&part)[TALL][4], float (&base)[4]) {
    if constexpr (F < FIELDS) {
        if constexpr (PARTS && (F * 32) % SPAN == 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) base[i] = 0;
#pragma unroll
            for (int m = 0; m < TALL; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) part[m][i] = 0;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 b0 = x[F].at[2 * h], b1 = x[F].at[2 * h + 1];
            if constexpr (BYTES) {
#pragma unroll
                for (int m = 0; m < TALL; ++m)
                    multiply_bytes(choose<PARTS>(part[m], sum[m]), w[m][0].at[2 * h], w[m][1].at[2 * h],
                                   w[m][0].at[2 * h + 1], w[m][1].at[2 * h + 1], b0, b1);
            } else {
                if constexpr (OFFSET) multiply(base, 0xbfc0bfc0u, 0xbfc0bfc0u, 0xbfc0bfc0u, 0xbfc0bfc0u, b0, b1);
#pragma unroll
                for (int m = 0; m < TALL; ++m)
                    multiply(choose<PARTS>(part[m], sum[m]), field<F>(w[m][0].at[2 * h]), field<F>(w[m][1].at[2 * h]),
                             field<F>(w[m][0].at[2 * h + 1]), field<F>(w[m][1].at[2 * h + 1]), b0, b1);
            }
        }
        if constexpr (GROUP > 0 && (F + 1 == FIELDS || (F + 1) * 32 % SPAN == 0)) {
            constexpr int AT = GROUP >= INPUTS ? 0 : F * 32 / SPAN;
#pragma unroll
            for (int m = 0; m < TALL; ++m) {
                const u8 *of = scales + m * SCALE_BYTES + (AT * 16 + g) * SCALES;
                float low = scale_at(of), high = scale_at(of + 8 * SCALES);
                sum[m][0] += low * (part[m][0] + base[0]);
                sum[m][1] += low * (part[m][1] + base[1]);
                sum[m][2] += high * (part[m][2] + base[2]);
                sum[m][3] += high * (part[m][3] + base[3]);
            }
        }
        if constexpr (KIND == 4 && GROUP == 0) {
#pragma unroll
            for (int m = 0; m < TALL; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[m][i] += part[m][i];
        }
        fields<F + 1>(w, x, scales, g, sum, part, base);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    gemv(const u8 *codes, const u8 *scales, const float *bias, const u8 *x, const float *x_scales,
         const float *gain, const u16 *add, void *out, int T, int N, int K, i64 code_row, i64 x_row, i64 add_row,
         i64 out_row, float eps) {
    extern __shared__ __align__(16) u8 shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int tiles = N / (16 * TALL), steps = K / INPUTS;
    const int first = warp * steps / WARPS, count = (warp + 1) * steps / WARPS - first;  // this warp's of every tile
    u8 *ring = shared + warp * RING * STEP_BYTES;
    const u32 ring_at = shared_address(ring);
    Sum *sums = (Sum *)(shared + WARPS * RING * STEP_BYTES);  // [2][WARPS][16 * TALL][TOKENS]

    // What is fetched next: it runs RING - 1 steps ahead, through all tiles of this program.
    int next_tile = count ? blockIdx.x : tiles, next_step = 0;
    const u8 *codes_at = nullptr, *scales_at = nullptr;
    const int scale_piece = lane < GROUPS * SCALES ? lane : 0;  // SCALES pieces of 16 bytes for 16 rows
    auto begin = [&]() {
        const i64 row = (i64)next_tile * (16 * TALL);
        codes_at = codes + (row + g) * code_row + first * 64 + c * 16;
        if constexpr (GROUP > 0)
            scales_at = scales + ((i64)(first * INPUTS / SPAN + scale_piece / SCALES) * N + row) * SCALES +
                        scale_piece % SCALES * 16;
    };
    begin();
    const i64 tall = 16 * code_row, half = 8 * code_row, scale_row = (i64)N * SCALES;
    auto fetch = [&](u32 to) {
        if (next_tile < tiles) {
#pragma unroll
            for (int m = 0; m < TALL; ++m) {
                copy16(to + m * 1024 + lane * 16, codes_at + m * tall);
                copy16(to + m * 1024 + 512 + lane * 16, codes_at + m * tall + half);
                if constexpr (GROUP > 0)
                    if (lane < GROUPS * SCALES)
                        copy16(to + TALL * 1024 + m * SCALE_BYTES + lane * 16, scales_at + m * 16 * SCALES);
            }
            ++next_step;
            codes_at += 64;
            if constexpr (GROUP > INPUTS) {
                if ((first + next_step) % (GROUP > INPUTS ? GROUP / INPUTS : 1) == 0) scales_at += scale_row;
            } else
                scales_at += GROUPS * scale_row;
            if (next_step == count) {
                next_step = 0;
                next_tile += gridDim.x;
                begin();
            }
        }
        commit();
    };
#pragma unroll 1
    for (int s = 0; s < RING - 1; ++s) fetch(ring_at + s * STEP_BYTES);

    if constexpr (NORM)
        for (int s = 0; s < count; ++s) bring_near(gain + (first + s) * INPUTS + lane * 4);
    after_the_kernel_before();

    u8 *planes = shared + WARPS * RING * STEP_BYTES + 2 * WARPS * 16 * TALL * TOKENS * (int)sizeof(Sum);
    float *of_x = (float *)(planes + K * COLUMNS), *squares = of_x + steps * GROUPS * TOKENS * 2;  // [WARPS][TOKENS]
    of_x += first * GROUPS * TOKENS * 2;
    planes += first * INPUTS * COLUMNS;
    if constexpr (PLANES) {
        to_planes(x + first * INPUTS * 2, x_row, gain + first * INPUTS, T, count, lane, planes, of_x,
                  squares + warp * TOKENS);
        planes += g % COLUMNS * INPUTS + 8 * c;
        of_x += c % TOKENS * 2;
    }
    const int token = g < T ? g : T - 1;
    const u8 *x_at = x + token * x_row * X_BYTES + first * 64 * FIELDS + 16 * c;
    Quad next[FIELDS];
    if (!PLANES && count) {
#pragma unroll
        for (int f = 0; f < FIELDS; ++f) next[f] = *(const Quad *)(x_at + 64 * f);
    }
    u32 slot = 0, filled = (RING - 1) * STEP_BYTES;
    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        Sum sum[TALL][4];
        Part part[TALL][4];
        float base[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) base[i] = 0;
#pragma unroll
        for (int m = 0; m < TALL; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[m][i] = part[m][i] = 0;
#pragma unroll 2
        for (int s = 0; s < count; ++s) {
            arrived<RING - 2>();
            __syncwarp();  // scales come by other lanes; and all have read what is overwritten next
            const u8 *here = ring + slot;
            Quad w[TALL][2], now[FIELDS];
#pragma unroll
            for (int m = 0; m < TALL; ++m) {
                w[m][0] = *(const Quad *)(here + m * 1024 + lane * 16);
                w[m][1] = *(const Quad *)(here + m * 1024 + 512 + lane * 16);
            }
            fetch(ring_at + filled);
            filled = slot;
            slot = slot == (RING - 1) * STEP_BYTES ? 0 : slot + STEP_BYTES;
            if constexpr (PLANES) {
                step_of_planes(w, planes + s * COLUMNS * INPUTS, of_x + s * GROUPS * TOKENS * 2,
                               here + TALL * 1024, g, sum);
                continue;
            }
#pragma unroll
            for (int f = 0; f < FIELDS; ++f) now[f] = next[f];
            const u8 *from = x_at + (s + 1 == count ? 0 : s + 1) * 64 * FIELDS;
#pragma unroll
            for (int f = 0; f < FIELDS; ++f) next[f] = *(const Quad *)(from + 64 * f);
            fields<0>(w, now, here + TALL * 1024, g, sum, part, base);
        }
        Sum *mine = sums + (buffer * WARPS + warp) * (16 * TALL * TOKENS);
#pragma unroll
        for (int m = 0; m < TALL; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int t = PLANES ? i & 1 ? TOKENS : c : 2 * c + (i & 1), row = m * 16 + g + (i >> 1) * 8;
                if (t < TOKENS) mine[row * TOKENS + t] = sum[m][i];
            }
        float plus = 0;  // on its way while warps wait for each other
        if constexpr (HAS_ADD) {
            const int at = threadIdx.x;
            if (at < 16 * TALL * T)
                plus = __uint_as_float((u32)add[at / (16 * TALL) * add_row + tile * (16 * TALL) + at % (16 * TALL)] << 16);
        }
        __syncthreads();  // the other buffer is written only after the next one
#pragma unroll 1
        for (int at = threadIdx.x; at < 16 * TALL * T; at += WARPS * 32) {
            const int t = at / (16 * TALL), row = at % (16 * TALL);
            const i64 n = tile * (16 * TALL) + row;
            const Sum *from = sums + buffer * WARPS * (16 * TALL * TOKENS) + row * TOKENS + t;
            Sum total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += from[w * (16 * TALL * TOKENS)];
            float value = total;
            if constexpr (OFFSET && !PLANES) value *= 1 << BITS;
            if constexpr (GROUP == 0 && SCALES > 0) value *= scale_at(scales + n * SCALES);
            if constexpr (BYTES) value *= x_scales[t];
            if constexpr (NORM) {
                float square = 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) square += squares[w * TOKENS + t];
                value *= rsqrtf(square / K + eps);
            }
            if constexpr (HAS_BIAS) value += bias[n];
            if constexpr (HAS_ADD)
                value += at == threadIdx.x ? plus : __uint_as_float((u32)add[t * add_row + n] << 16);
            if constexpr (WIDE)
                ((float *)out)[t * out_row + n] = value;
            else
                ((u16 *)out)[t * out_row + n] = to_bf16(value);
        }
        buffer ^= 1;
    }
}
