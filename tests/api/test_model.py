"""`halve.load(path).generate(...)`."""

import asyncio
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import halve
from halve.core.errors import ConfigError, EngineError, RequestError, TextError
from halve.core.plan import KVCache, Plan
from halve.engine import EngineConfig, SamplingParams
from halve.models.embedded import embedded_model_path
from tests.api.tiny import CONTEXT, VOCABULARY, make_model, tokenizer, words

PROMPT = "Once upon a time there was a little girl named"


@pytest.fixture(scope="module")
def model(tiny):
    return halve.load(tiny)


@pytest.fixture(scope="module")
def story_teller():
    return halve.load(embedded_model_path())


def test_a_completion_counts_its_tokens(model):
    made = model.generate("dabo kuma", max_tokens=7)
    assert made.prompt_tokens == len(model.tokenizer.encode("dabo kuma"))
    assert made.completion_tokens == len(made.token_ids) == 7
    assert made.finish_reason == "length"
    assert made.text == model.tokenizer.decode(made.token_ids)


def test_greedy_is_the_default_and_repeats(model):
    assert model.generate("dabo").token_ids == model.generate("dabo").token_ids


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    texts = [model.generate("dabo", temperature=1.0, seed=seed, max_tokens=20).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_many_prompts_are_answered_together_in_their_order(story_teller):
    prompts = [PROMPT, "The", PROMPT[:20]]
    together = story_teller.generate_all(prompts, max_tokens=12)
    assert [c.text for c in together] == [story_teller.generate(p, max_tokens=12).text for p in prompts]
    group = story_teller.generate_all([PROMPT], SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12))
    assert group[0].text == story_teller.generate(PROMPT, temperature=1.0, seed=5, max_tokens=12).text
    assert len({c.text for c in group}) == 3
    with pytest.raises(RequestError, match=r"n: 2 answers can't be one completion; use generate_all"):
        story_teller.generate(PROMPT, n=2)


def test_parameters_come_as_one_record_or_as_keywords(model):
    with pytest.raises(RequestError, match="give SamplingParams, or its fields as keywords, not both"):
        model.generate("dabo", SamplingParams(), max_tokens=3)
    with pytest.raises(RequestError, match="sampling: there is no 'max_token'"):
        model.generate("dabo", max_token=3)


def test_a_prompt_seen_before_is_taken_from_the_cache(story_teller):
    prompt = story_teller.tokenizer.encode(PROMPT * 4)
    first, again = (story_teller.generate(prompt, max_tokens=8) for _ in range(2))
    assert again.num_cached_tokens == (len(prompt) - 1) // 16 * 16 > 0
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize(("count", "tokens", "blocks"), [(32, 12, 1000), (12, 40, 20)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}])
def test_deterministic_gives_a_request_alone_what_it_gets_among_others(sampling, count, tokens, blocks):
    """The C++ kernels sum each row by itself: neighbours, chunks, cached prefixes, preemption change not one bit."""
    path = embedded_model_path()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 2000, rng.integers(1, 60)).tolist() for _ in range(count)]
    each = [SamplingParams.of(max_tokens=tokens, seed=i, logprobs=1, ignore_eos=True, **sampling) for i in range(count)]
    cache_bytes = blocks * 16 * halve.inspect(path).kv_cache_bytes_per_token
    batched = halve.load(path, engine=EngineConfig(deterministic=True, max_tokens_per_step=64), cache_bytes=cache_bytes)
    together = batched.generate_all(prompts, each)
    metrics = batched.engine.metrics()
    assert metrics.num_steps < count * tokens / 2
    assert (metrics.num_preemptions > 0) == (blocks == 20)
    single = halve.load(path, engine=EngineConfig(deterministic=True, max_num_seqs=1, max_tokens_per_step=512))
    for prompt, params, among in zip(prompts, each, together, strict=True):
        alone = single.generate(prompt, params)
        assert alone.token_ids == among.token_ids
        assert alone.logprobs == among.logprobs  # to the bit


@pytest.mark.parametrize(
    "cache", [KVCache(format="int4"), KVCache.of_layers(["int8", "int4", "int4", "bf16"])], ids=["int4", "mixed"]
)
@pytest.mark.parametrize(("count", "tokens", "blocks"), [(32, 10, 1000), (12, 40, 20)])
def test_deterministic_holds_over_int4_and_over_layers_in_formats_of_their_own(cache, count, tokens, blocks):
    """Batch 1 and 32, chunks, preemption, prefixes found again and samples that part from one prompt."""
    path, plan = embedded_model_path(), Plan(kv_cache=cache)
    rng = np.random.default_rng(1)
    shared = rng.integers(5, 2000, 37).tolist()
    prompts = [shared[: 16 * (i % 3)] + rng.integers(5, 2000, rng.integers(1, 40)).tolist() for i in range(count)]
    params = SamplingParams.of(max_tokens=tokens, logprobs=1, ignore_eos=True)
    single = halve.load(path, plan=plan, engine=EngineConfig(deterministic=True, max_num_seqs=1))
    room = blocks * 16 * single.config.kv_cache_bytes_per_token
    config = EngineConfig(deterministic=True, max_num_seqs=32, max_tokens_per_step=64)
    batched = halve.load(path, plan=plan, engine=config, cache_bytes=room)
    together = batched.generate_all(prompts, params)
    metrics = batched.engine.metrics()
    assert metrics.num_steps < count * tokens / 2
    assert (metrics.num_preemptions > 0) == (blocks == 20)
    for prompt, among in zip(prompts, together, strict=True):
        alone = single.generate(prompt, params)
        assert alone.token_ids == among.token_ids
        assert alone.logprobs == among.logprobs  # to the bit
    prompt = [*shared, 9, 9, 9]  # ends within a block, which samples share until they write
    apart = batched.generate_all([prompt], max_tokens=8, n=3, temperature=1.0, seed=7, ignore_eos=True)
    assert (
        apart[0].token_ids == single.generate(prompt, max_tokens=8, temperature=1.0, seed=7, ignore_eos=True).token_ids
    )
    assert len({tuple(a.token_ids) for a in apart}) == 3


def test_deterministic_refuses_torch(tiny, monkeypatch):
    monkeypatch.setattr("halve.kernels.native_library.available", lambda: "not built")
    with pytest.raises(ConfigError, match="results depend on what else is in the batch"):
        halve.load(tiny, engine=EngineConfig(deterministic=True)).generate("dabo")


def test_the_cache_is_sized_by_memory_and_by_what_the_engine_can_fill(tiny):
    one = halve.load(tiny, cache_bytes=100_000)
    per_block = one.config.kv_cache_bytes_per_token * 16
    assert one.engine.metrics().blocks_free == 100_000 // per_block
    assert halve.load(tiny, engine=EngineConfig(max_num_seqs=2)).engine.metrics().blocks_free == 2 * CONTEXT // 16
    with pytest.raises(RequestError, match="100 bytes hold no block"):
        halve.load(tiny, cache_bytes=100)


def test_a_prompt_that_the_cache_cannot_hold_is_refused(tiny):
    one = halve.load(tiny, cache_bytes=20_000)
    with pytest.raises(RequestError, match=r"tokens of cache, there are \d+ in all; .* or give the cache more memory"):
        one.generate([5] * 100)


def test_a_file_of_prompts_is_answered(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": str(i), "prompt": words(i, 4)}) + "\n" for i in range(5)))
    assert model.run_file(source, out, max_tokens=3).num_completed == 5
    texts = {r["id"]: r["completions"][0]["text"] for r in map(json.loads, out.read_text().splitlines())}
    assert texts["3"] == model.generate(words(3, 4), max_tokens=3).text


def test_an_event_loop_reads_a_stream(story_teller):
    async def read():
        return "".join([output.text async for output in story_teller.stream(PROMPT, max_tokens=10)])

    assert asyncio.run(read()) == story_teller.generate(PROMPT, max_tokens=10).text


def test_a_closed_model_answers_no_more(tiny):
    one = halve.load(tiny)
    one.close()
    one.generate("dabo", max_tokens=1)
    one.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        one.generate("dabo")


def test_text_ends_before_a_stop_string(story_teller):
    whole = story_teller.generate(PROMPT, max_tokens=30)
    made = story_teller.generate(PROMPT, max_tokens=30, stop=["."])
    assert "." in whole.text
    assert made.text == whole.text[: whole.text.index(".")]
    assert made.finish_reason == "stop"
    assert story_teller.generate(PROMPT, max_tokens=30, stop=".").text == made.text


def test_streamed_text_adds_up_to_the_completion(story_teller):
    pieces = [output.text for output in story_teller.stream(PROMPT, SamplingParams(max_tokens=20))]
    assert "".join(pieces) == story_teller.generate(PROMPT, max_tokens=20).text


def test_greedy_tokens_of_the_embedded_model_are_those_of_transformers(story_teller):
    """bf16 weights are exact in float32 and the cache of a plain checkpoint is float32, so both differ by sums' order.

    Where the two best logits lie within 1e-4 either may come first.
    """
    prompt = story_teller.tokenizer.encode(PROMPT)
    made = story_teller.generate(prompt, max_tokens=40).token_ids
    peer = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = peer(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    for token, values, indices in zip(made, best.values, best.indices, strict=True):
        assert token == indices[0] or values[0] - values[1] < 1e-4
    np.testing.assert_allclose(story_teller.logits([*prompt, *made])[len(prompt) - 1 : -1], logits, atol=1e-4)


def test_a_prompt_longer_than_the_context_says_both_numbers(model):
    with pytest.raises(RequestError, match=f"the prompt has 200 tokens, the context holds {CONTEXT} for prompt and"):
        model.generate([5] * 200)


def test_text_ends_where_the_context_does(model):
    made = model.generate([5] * (CONTEXT - 3), max_tokens=50)
    assert made.completion_tokens <= 4
    assert made.finish_reason == "length"


def test_an_empty_prompt_starts_from_the_token_that_the_tokenizer_puts_in_front(model):
    assert model.generate("", max_tokens=3).prompt_tokens == 1


def test_an_empty_prompt_without_such_a_token_is_refused(tmp_path):
    path = make_model(tmp_path / "bare")
    tokenizer(bos=False).save(str(path / "tokenizer.json"))
    with pytest.raises(RequestError, match="prompt: it is empty, and this model's tokenizer puts no token in front"):
        halve.load(path).generate("")


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 2}])
def test_parameters_out_of_range_are_named_with_their_rule(model, change):
    (name,) = change
    with pytest.raises(RequestError, match=rf"{name}: \S+ must be"):
        model.generate("dabo", **change)


def test_token_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(RequestError, match=f"the vocabulary ends at {VOCABULARY - 1}"):
        model.generate([VOCABULARY])
    with pytest.raises(RequestError, match=f"must lie in 0 to {VOCABULARY - 1}"):
        model.logits([VOCABULARY])


def test_logits_of_an_empty_or_too_long_prompt_are_refused(model):
    for prompt in ([], [5] * (CONTEXT + 1)):
        with pytest.raises(RequestError, match=f"this model takes 1 to {CONTEXT}"):
            model.logits(prompt)


def test_logits_come_for_every_token(model):
    assert model.logits("dabo kuma").shape == (len(model.tokenizer.encode("dabo kuma")), VOCABULARY)


def test_text_that_is_no_unicode_is_refused(model):
    with pytest.raises(TextError, match="without lone surrogates"):
        model.generate("\udc80")


def test_a_device_that_is_not_there_is_refused(tiny):
    with pytest.raises(RequestError, match=r"device 'nonsense' can't be used: .*; take cpu"):
        halve.load(tiny, device="nonsense")


def test_progress_tells_every_layer(tiny):
    seen = []
    halve.load(tiny, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] >= 2


def test_a_bundle_runs_on_the_kernels_of_its_formats(passed):
    model = halve.load(passed.path)
    assert any("int8" in what for what in model.kernels)
    assert model.generate(words(1, 5), max_tokens=4).completion_tokens == 4


def test_without_the_native_kernels_torch_runs_the_model_and_says_so(tiny, monkeypatch, caplog):
    monkeypatch.setattr("halve.kernels.native_library.available", lambda: "not built")
    model = halve.load(tiny)
    assert model.ops.name == "torch"
    assert "running on torch instead of the C++ kernels: not built" in caplog.text
