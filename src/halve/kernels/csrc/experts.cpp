#include "experts.h"

#include <math.h>
#include <string.h>

#include "dispatch.h"
#include "scratch.h"

namespace halve {
namespace {

thread_local Scratch products;  // of experts that have places

// task(i) for i in [0, count), by one thread where the work is small.
template <class Task>
void each(int64_t count, int64_t cost, int32_t threads, const Task& task) {
    run([](const void* of, int64_t i) { (*static_cast<const Task*>(of))(i); }, &task, count,
        cost < kWorthThread ? 1 : threads);
}

// Whether all logits are numbers. Insertion keeps the best in order; most experts fail the first comparison.
bool choose(const Route& r, int64_t token) {
    const float* logits = r.logits + token * r.experts;
    int32_t* chosen = r.chosen + token * r.top_k;
    float* weights = r.weights + token * r.top_k;
    float best[kMostChosen] = {};
    int64_t held = 0;
    for (int64_t e = 0; e < r.experts; ++e) {
        const float logit = logits[e];
        if (logit != logit) return false;
        if (held == r.top_k && !(logit > best[held - 1])) continue;
        int64_t at = held < r.top_k ? held++ : held - 1;
        for (; at > 0 && logit > best[at - 1]; --at) {
            best[at] = best[at - 1];
            chosen[at] = chosen[at - 1];
        }
        best[at] = logit;
        chosen[at] = static_cast<int32_t>(e);
    }
    const float most = best[0];
    float total = 0.0f;
    if (r.renormalize) {
        for (int64_t i = 0; i < r.top_k; ++i) total += expf(best[i] - most);
    } else {
        for (int64_t e = 0; e < r.experts; ++e) total += expf(logits[e] - most);
    }
    for (int64_t i = 1; i < r.top_k; ++i) {  // in the order of the experts from here on
        const int32_t expert = chosen[i];
        int64_t at = i;
        for (; at > 0 && chosen[at - 1] > expert; --at) chosen[at] = chosen[at - 1];
        chosen[at] = expert;
    }
    for (int64_t i = 0; i < r.top_k; ++i) weights[i] = expf(logits[chosen[i]] - most) / total * r.scale;
    return true;
}

// Rows from one of them on.
Activations from_row(Activations a, int64_t row, const int64_t* row_bytes) {
    const auto moved = [row](auto* part, int64_t bytes) {
        return part ? reinterpret_cast<decltype(part)>(reinterpret_cast<uint8_t*>(part) + row * bytes) : part;
    };
    a.values = moved(a.values, row_bytes[0]);
    a.codes = moved(a.codes, row_bytes[1]);
    a.wide = moved(a.wide, row_bytes[2]);
    a.scale = moved(a.scale, row_bytes[3]);
    a.starts = moved(a.starts, row_bytes[4]);
    return a;
}

void copy_row(const Activations& from, const Activations& to, const int64_t* row_bytes) {
    const void* source[] = {from.values, from.codes, from.wide, from.scale, from.starts};
    void* target[] = {to.values, to.codes, to.wide, to.scale, to.starts};
    for (int i = 0; i < 5; ++i) {
        if (row_bytes[i]) memcpy(target[i], source[i], static_cast<size_t>(row_bytes[i]));
    }
}

}  // namespace

int32_t route(const Route& r, int64_t num_tokens, int32_t threads) {
    *r.broken = 0;
    each(num_tokens, 8 * num_tokens * r.experts, threads, [&r](int64_t token) {
        if (!choose(r, token)) __atomic_store_n(r.broken, 1, __ATOMIC_RELAXED);
    });
    if (*r.broken) return 3;
    const int64_t num_places = num_tokens * r.top_k;
    memset(r.offsets, 0, static_cast<size_t>(r.experts + 1) * sizeof *r.offsets);
    for (int64_t i = 0; i < num_places; ++i) ++r.offsets[r.chosen[i] + 1];
    int64_t reads = 0;
    for (int64_t e = 0; e < r.experts; ++e) {
        r.counted[e] += r.offsets[e + 1];
        reads += r.offsets[e + 1] > 0;
        r.offsets[e + 1] += r.offsets[e];
    }
    ++r.totals[0];
    r.totals[1] += reads;
    // offsets[e] counts up to where expert e + 1 begins, and is moved back by one expert behind it.
    for (int64_t i = 0; i < num_places; ++i) {
        const int32_t place = r.offsets[r.chosen[i]]++;
        r.places[i] = place;
        r.tokens[place] = static_cast<int32_t>(i / r.top_k);
    }
    for (int64_t e = r.experts; e > 0; --e) r.offsets[e] = r.offsets[e - 1];
    r.offsets[0] = 0;
    return 0;
}

int32_t run_experts(int32_t isa, const Experts& e, int32_t threads) {
    const Route& r = *e.route;
    if (!products.holds(r.experts * static_cast<int64_t>(sizeof(Product)))) return 2;
    Product* work = static_cast<Product*>(products.data);
    const bool brought = e.tokens.values;
    int64_t count = 0, cost = 0, several = 0;  // rows of experts that have several
    for (int64_t expert = 0; expert < r.experts; ++expert) {
        const int64_t first = r.offsets[expert], rows = r.offsets[expert + 1] - first;
        if (!rows || !e.each[expert].members) continue;
        Product& p = work[count++];
        p = e.each[expert];
        p.rows = rows;
        // The only row of an expert is read where it lies.
        p.x = brought && rows == 1 ? from_row(e.tokens, r.tokens[first], e.row_bytes)
                                   : from_row(e.places, first, e.row_bytes);
        for (int i = 0; i < p.members; ++i) {
            if (p.y[i]) p.y[i] += first * p.y_stride[i];
        }
        cost += product_cost(p);
        several += rows > 1 ? rows : 0;
    }
    if (brought && several) {
        const int64_t num_places = r.offsets[r.experts];
        int64_t bytes = 0;
        for (const int64_t part : e.row_bytes) bytes += part;
        each(num_places, num_places * bytes / 16, threads, [&](int64_t place) {
            const int64_t token = r.tokens[place];
            copy_row(from_row(e.tokens, token, e.row_bytes), from_row(e.places, place, e.row_bytes), e.row_bytes);
        });
    }
    const Grouped grouped = {work, count};
    return spread(isa, &Rows::grouped, grouped, grouped_units(grouped), cost, threads);
}

int32_t combine(const Combine& c, int64_t num_tokens, int32_t threads) {
    const Route& r = *c.route;
    each(num_tokens, num_tokens * (r.top_k + 1) * c.width, threads, [&](int64_t token) {
        float* __restrict x = c.x + token * c.width;
        const float* weights = r.weights + token * r.top_k;
        const int32_t* places = r.places + token * r.top_k;
        // Parts of a row that stay in the first-level cache; the experts' sum is added to x as a whole.
        for (int64_t at = 0; at < c.width; at += 512) {
            const int64_t n = c.width - at < 512 ? c.width - at : 512;
            float total[512] = {};
            for (int64_t i = 0; i < r.top_k; ++i) {
                const float weight = weights[i];
                const float* __restrict y = c.y + places[i] * c.width + at;
                for (int64_t j = 0; j < n; ++j) total[j] += weight * y[j];
            }
            if (c.shared) {
                const float share = c.shares ? 1.0f / (1.0f + expf(-c.shares[token])) : 1.0f;
                const float* __restrict shared = c.shared + token * c.width + at;
                for (int64_t j = 0; j < n; ++j) total[j] += share * shared[j];
            }
            for (int64_t j = 0; j < n; ++j) x[at + j] += total[j];
        }
    });
    return 0;
}

}  // namespace halve
