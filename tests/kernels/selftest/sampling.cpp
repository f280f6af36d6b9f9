// The choice of tokens from logits.
#include "report.h"

namespace halve {
namespace {

// What is set for each row: every cut alone, then together.
struct Choice {
    float temperature;
    int32_t top_k;
    float top_p, min_p, typical_p;
    float presence, frequency, repetition;
};
constexpr Choice kChoices[] = {
    {0.0f, 0, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 1.0f},  {1.0f, 0, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 1.0f},
    {0.7f, 5, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 1.0f},  {1.3f, 0, 0.8f, 0.0f, 1.0f, 0.0f, 0.0f, 1.0f},
    {1.0f, 0, 1.0f, 0.05f, 1.0f, 0.0f, 0.0f, 1.0f}, {1.0f, 0, 1.0f, 0.0f, 0.6f, 0.0f, 0.0f, 1.0f},
    {0.9f, 0, 1.0f, 0.0f, 1.0f, 0.5f, 0.25f, 1.2f}, {0.8f, 20, 0.9f, 0.02f, 0.9f, 0.1f, 0.1f, 1.1f},
};
constexpr int64_t kRows = sizeof kChoices / sizeof *kChoices, kMost = 3, kHistory = 6;

template <class T>
Buffer<T> column(T Choice::* field) {
    Buffer<T> out;
    for (const Choice& choice : kChoices) out.push_back(choice.*field);
    out.shrink_to_fit();
    return out;
}

struct Chosen {
    Buffer<int32_t> tokens, status, top_ids;
    Buffer<float> logprobs, top_logprobs;
};

Chosen choose(const Rows& rows, const Buffer<float>& logits, int64_t vocab) {
    const Buffer<float> temperature = column(&Choice::temperature), top_p = column(&Choice::top_p);
    const Buffer<float> min_p = column(&Choice::min_p), typical_p = column(&Choice::typical_p);
    const Buffer<float> presence = column(&Choice::presence), frequency = column(&Choice::frequency);
    const Buffer<float> repetition = column(&Choice::repetition);
    const Buffer<int32_t> top_k = column(&Choice::top_k);
    Buffer<int32_t> num_logprobs(kRows), history(kRows * kHistory);
    Buffer<uint64_t> seed(kRows);
    Buffer<int64_t> step(kRows), offsets(kRows + 1);
    for (int64_t r = 0; r < kRows; ++r) {
        num_logprobs[r] = static_cast<int32_t>(r % (kMost + 1));
        seed[r] = static_cast<uint64_t>(r) * 77 + 5;
        step[r] = r;
        for (int64_t i = 0; i < kHistory; ++i)
            history[r * kHistory + i] = static_cast<int32_t>((r * 5 + i * i) % vocab);
        offsets[r + 1] = (r + 1) * kHistory;
    }
    Chosen out;
    out.tokens.assign(kRows, -7);
    out.status.assign(kRows, -7);
    out.top_ids.assign(kRows * kMost, -7);
    out.logprobs.assign(kRows, -7.0f);
    out.top_logprobs.assign(kRows * kMost, -7.0f);
    Buffer<uint8_t, 64> scratch(static_cast<size_t>(sampling_bytes(vocab)), 0);
    int64_t next = 0;
    Sampling work{};
    work.logits = logits.data();
    work.rows = kRows;
    work.vocab = vocab;
    work.temperature = temperature.data();
    work.top_k = top_k.data();
    work.top_p = top_p.data();
    work.min_p = min_p.data();
    work.typical_p = typical_p.data();
    work.seed = seed.data();
    work.step = step.data();
    work.presence_penalty = presence.data();
    work.frequency_penalty = frequency.data();
    work.repetition_penalty = repetition.data();
    work.num_logprobs = num_logprobs.data();
    work.prompt_ids = history.data();
    work.prompt_offsets = offsets.data();
    work.output_ids = history.data();
    work.output_offsets = offsets.data();
    work.most_logprobs = kMost;
    work.token_ids = out.tokens.data();
    work.logprobs = out.logprobs.data();
    work.top_ids = out.top_ids.data();
    work.top_logprobs = out.top_logprobs.data();
    work.status = out.status.data();
    work.next = &next;
    work.scratch = scratch.data();
    rows.sample(work, 0);
    return out;
}

}  // namespace

void check_sample(Report& report) {
    for (const int64_t vocab : {2, 33, 64, 1000, 5003}) {
        Random random(static_cast<uint64_t>(vocab));
        Buffer<float> logits = random.values(kRows * vocab, 6.0f);
        const Chosen got = choose(report.rows, logits, vocab), wanted = choose(rows_baseline, logits, vocab);
        const std::string what = format("sample vocab=%d ", static_cast<int>(vocab));
        report.same(what + "tokens", got.tokens, wanted.tokens);
        report.same(what + "status", got.status, Buffer<int32_t>(kRows, 0));
        report.same(what + "likeliest tokens", got.top_ids, wanted.top_ids);
        report.close(what + "logprobs", got.logprobs, wanted.logprobs, std::vector<double>(got.logprobs.size(), 4e-6));
        report.close(what + "likeliest logprobs", got.top_logprobs, wanted.top_logprobs,
                     std::vector<double>(got.top_logprobs.size(), 4e-6));
    }
}

}  // namespace halve
