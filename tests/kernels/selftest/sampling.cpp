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

struct Chosen {
    std::vector<int32_t> tokens, status, top_ids;
    std::vector<float> logprobs, top_logprobs;
};

Chosen choose(const Rows& rows, const std::vector<float>& logits, int64_t vocab) {
    std::vector<float> temperature, top_p, min_p, typical_p, presence, frequency, repetition;
    std::vector<int32_t> top_k, num_logprobs, history;
    std::vector<uint64_t> seed;
    std::vector<int64_t> step, offsets{0};
    for (int64_t r = 0; r < kRows; ++r) {
        const Choice& c = kChoices[r];
        temperature.push_back(c.temperature);
        top_k.push_back(c.top_k);
        top_p.push_back(c.top_p);
        min_p.push_back(c.min_p);
        typical_p.push_back(c.typical_p);
        presence.push_back(c.presence);
        frequency.push_back(c.frequency);
        repetition.push_back(c.repetition);
        num_logprobs.push_back(static_cast<int32_t>(r % (kMost + 1)));
        seed.push_back(static_cast<uint64_t>(r) * 77 + 5);
        step.push_back(r);
        for (int64_t i = 0; i < kHistory; ++i) history.push_back(static_cast<int32_t>((r * 5 + i * i) % vocab));
        offsets.push_back(static_cast<int64_t>(history.size()));
    }
    Chosen out;
    out.tokens.assign(kRows, -7);
    out.status.assign(kRows, -7);
    out.top_ids.assign(kRows * kMost, -7);
    out.logprobs.assign(kRows, -7.0f);
    out.top_logprobs.assign(kRows * kMost, -7.0f);
    std::vector<uint8_t> scratch(static_cast<size_t>(sampling_bytes(vocab)) + 64, 0);
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
    work.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    rows.sample(work, 0);
    return out;
}

}  // namespace

void check_sample(Report& report) {
    for (const int64_t vocab : {2, 33, 64, 1000, 5003}) {
        Random random(static_cast<uint64_t>(vocab));
        std::vector<float> logits = random.values(kRows * vocab, 6.0f);
        const Chosen got = choose(report.rows, logits, vocab), wanted = choose(rows_baseline, logits, vocab);
        const std::string what = format("sample vocab=%d ", static_cast<int>(vocab));
        report.same(what + "tokens", got.tokens, wanted.tokens);
        report.same(what + "status", got.status, std::vector<int32_t>(kRows, 0));
        report.same(what + "likeliest tokens", got.top_ids, wanted.top_ids);
        report.close(what + "logprobs", got.logprobs, wanted.logprobs, std::vector<double>(got.logprobs.size(), 4e-6));
        report.close(what + "likeliest logprobs", got.top_logprobs, wanted.top_logprobs,
                     std::vector<double>(got.top_logprobs.size(), 4e-6));
    }
}

}  // namespace halve
