"""`halve.load(path).generate(...)`."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import halve
from halve.core.errors import RequestError, TextError
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


def test_text_ends_before_a_stop_string(story_teller):
    whole = story_teller.generate(PROMPT, max_tokens=30)
    made = story_teller.generate(PROMPT, max_tokens=30, stop=["."])
    assert "." in whole.text
    assert made.text == whole.text[: whole.text.index(".")]
    assert made.finish_reason == "stop"
    assert story_teller.generate(PROMPT, max_tokens=30, stop=".").text == made.text


def test_streamed_text_adds_up_to_the_completion(story_teller):
    from halve.engine import SamplingParams

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
