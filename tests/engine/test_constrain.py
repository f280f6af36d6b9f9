"""Texts that follow a grammar, and what else the server needs of the engine."""

import json
from pathlib import Path

import pytest

import halve
from halve.core.errors import RequestError
from halve.engine import EngineConfig, SamplingParams
from halve.engine.constrain import json_grammar, lark_grammar

pytest.importorskip("llguidance")
TINY = Path(__file__).resolve().parents[2] / "src" / "halve" / "models" / "embedded" / "tiny-en"
NUMBERS = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "minItems": 2, "maxItems": 3}


@pytest.fixture(scope="module")
def model():
    loaded = halve.load(TINY, engine=EngineConfig(max_num_seqs=8))
    yield loaded
    loaded.close()


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_every_answer_follows_the_grammar(model, temperature):
    sampling = SamplingParams(max_tokens=60, temperature=temperature, n=3, seed=3, grammar=json_grammar(NUMBERS))
    free = SamplingParams(max_tokens=8)
    made = model.engine.generate(["a", "b", "c"], [sampling, free, sampling])
    lists = [one for one in made if len(made) and one.index < 3 and one.text.startswith("[")]
    assert len(lists) == 6
    for one in lists:
        assert one.finish_reason == "stop"
        assert 2 <= len(json.loads(one.text)) <= 3
    alone = model.generate("b", max_tokens=8)
    assert alone.text in [one.text for one in made]  # who is beside a grammar does not feel it


def test_guesses_and_grammars_live_together():
    guessing = halve.load(TINY, speculation="ngram")
    made = guessing.generate("x", max_tokens=60, grammar=json_grammar(NUMBERS))
    guessing.close()
    assert 2 <= len(json.loads(made.text)) <= 3


@pytest.mark.parametrize(
    ("grammar", "more", "message"),
    [
        ("nonsense", {}, "grammar"),
        (lark_grammar("start: missing"), {}, "grammar"),
        (json_grammar(NUMBERS), {"min_tokens": 3}, "min_tokens"),
    ],
)
def test_a_grammar_that_can_not_be_kept_is_refused(model, grammar, more, message):
    with pytest.raises(RequestError, match=message):
        model.generate("x", max_tokens=9, grammar=grammar, **more)


def test_a_schema_that_is_none_is_refused():
    deep = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="nested"):
        json_grammar(deep)


def test_prefixes_are_shared_under_one_salt_alone(model):
    prompt = model.tokenizer.encode("The king looked at the old man and said nothing at all. " * 6)

    def cached(salt):
        [*_, last] = model.engine.stream(prompt, SamplingParams(max_tokens=1), cache_salt=salt)
        return last.num_cached_tokens

    assert (cached("a"), cached("b"), cached("")) == (0, 0, 0)
    assert min(cached("a"), cached("b"), cached("")) > 16


def test_what_answers_are_charged_adds_up_to_the_steps(model):
    before = model.engine.metrics().busy_s
    streams = [model.engine.stream(f"{i} " * 20, SamplingParams(max_tokens=10, n=2)) for i in range(5)]
    charged = 0.0
    for stream in streams:
        last = {output.index: output for output in stream}
        charged += sum(one.prefill_s + one.decode_s for one in last.values())
    assert charged == pytest.approx(model.engine.metrics().busy_s - before, rel=1e-9)


def test_a_job_runs_between_two_steps(model):
    assert model.engine.between_steps(lambda: 7).result(10) == 7
    with pytest.raises(ZeroDivisionError):
        model.engine.between_steps(lambda: 1 // 0).result(10)
    assert model.generate("x", max_tokens=2).completion_tokens == 2
