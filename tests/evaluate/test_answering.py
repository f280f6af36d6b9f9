"""Likelihoods against transformers, answers by hand, and what too few questions are told."""

import json

import numpy as np
import pytest
import torch

from halve.core.errors import DataError, QualityError
from halve.evaluate.answering import (
    answers_by_likelihood,
    answers_written,
    beats_chance,
    encoded,
    log_likelihoods,
    require_questions,
    result_of,
)
from halve.evaluate.scorer import DecoderScorer
from halve.evaluate.tasks import Question, read_task
from halve.kernels.reference import TorchOps
from tests.models.test_against_transformers import decoder_of, random_model


class Bytes:
    """A tokenizer of bytes below 128 with a BOS of 0, where `th` is one token (1)."""

    def encode(self, text):
        return [0, *text.replace("th", "\x01").encode()]


class Fixed:
    """A source that says the same distribution everywhere."""

    vocab_size = 128

    def __init__(self, likely):
        self.row = np.zeros(128, np.float32)
        for character, logit in likely.items():
            self.row[ord(character)] = logit

    def logits(self, tokens):
        yield np.tile(self.row, (len(tokens), 1))


@pytest.fixture
def task(tmp_path):
    def make(*lines):
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_task(path)

    return make


@pytest.fixture(scope="module")
def model():
    return random_model()


def test_log_likelihoods_are_those_of_transformers(model):
    questions = [("Once upon", " a time"), ("", "x"), ("of", " them and others"), ("wit", "h a bang")]
    asked = [encoded(Question(prompt=p, choices=(c,), answer=0), c, Bytes(), 256) for p, c in questions]
    found = log_likelihoods(DecoderScorer(decoder_of(model, TorchOps("cpu"))), asked)
    for one, (total, greedy) in zip(asked, found, strict=True):
        with torch.no_grad():
            logits = torch.log_softmax(model(torch.tensor(one.ids[None].astype(np.int64))).logits[0].double(), -1)
        expected = sum(float(logits[i - 1, one.ids[i]]) for i in range(one.start, len(one.ids)))
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == all(int(logits[i - 1].argmax()) == one.ids[i] for i in range(one.start, len(one.ids)))


def test_a_token_across_the_boundary_counts_to_the_continuation():
    asked = encoded(Question(prompt="wit", choices=("h it",), answer=0), "h it", Bytes(), 256)
    assert asked.ids.tolist() == [0, ord("w"), ord("i"), 1, ord(" "), ord("i"), ord("t")]
    assert asked.start == 3


def test_a_long_prompt_loses_its_beginning_and_a_long_choice_is_refused():
    question = Question(prompt="x" * 300, choices=("yy",), answer=0)
    asked = encoded(question, "yy", Bytes(), 128)
    assert len(asked.ids) == 128
    assert asked.ids[asked.start :].tolist() == [ord("y")] * 2
    with pytest.raises(DataError, match="a choice of 200 tokens leaves no room"):
        encoded(question, "y" * 200, Bytes(), 128)


def test_a_choice_without_a_token_of_its_own_is_refused():
    class Blind(Bytes):
        def encode(self, text):
            return super().encode(text.rstrip())

    with pytest.raises(DataError, match="adds no token behind the prompt"):
        encoded(Question(prompt="a", choices=(" ",), answer=0), " ", Blind(), 128)


def test_the_likeliest_choice_a_byte_wins_not_the_shortest(task):
    # 'a' is far likelier than 'b'; of " b" and " aaaa" the second has the lower sum and the higher mean.
    one = task({"prompt": "?", "choices": ["b", "aaaaaa"], "answer": 1})
    source = Fixed({"a": 4.0, "b": 1.0})
    short, long = (
        log_likelihoods(source, [encoded(one.questions[0], c, Bytes(), 64)])[0][0] for c in one.questions[0].choices
    )
    assert short > long
    assert answers_by_likelihood(one, source, Bytes(), 64) == [True]


def test_the_last_word_must_be_what_the_model_would_write(task):
    one = task({"text": "it is aaa"}, {"text": "it is bbb"})
    spaced = Fixed({" ": 5.0, "a": 4.0})
    assert answers_by_likelihood(one, spaced, Bytes(), 64) == [False, False]  # the space is likelier than the a
    joined = task({"prompt": "it is ", "choices": ["aaa", "bbb"], "answer": 0})
    assert answers_by_likelihood(joined, Fixed({"a": 5.0}), Bytes(), 64) == [True]


def test_written_answers_are_asked_together_and_compared(task):
    one = task({"question": "2 and 2?", "answer": "#### 4"}, {"question": "3 and 3?", "answer": "#### 6"})
    asked = []

    def write(prompts, max_tokens, stop):
        asked.append((len(prompts), max_tokens, stop))
        return ["It is 4.", "I would say 7"]

    assert answers_written(one, write, Bytes(), 256) == [True, False]
    assert asked == [(2, 256, ("\n\n", "\nQuestion:"))]
    with pytest.raises(DataError, match="leave no room for an answer"):
        answers_written(one, write, Bytes(), 16)


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(QualityError, match="NaN or infinity"):
        log_likelihoods(
            Fixed({"a": np.nan}), [encoded(Question(prompt="a", choices=("a",), answer=0), "a", Bytes(), 9)]
        )


def test_a_result_counts_what_changed(task):
    lines = [{"prompt": f"{i}", "choices": ["a", "b", "c", "d"], "answer": 0} for i in range(8)]
    original = [True] * 6 + [False] * 2
    smaller = [False] + [True] * 6 + [False]
    result = result_of(task(*lines), original, smaller, margin=0.5)
    assert (result.harmed, result.fixed, result.num_items) == (1, 1, 8)
    assert result.original_accuracy.value == result.accuracy.value == 0.75
    assert result.difference.value == 0
    assert result.mcnemar_p == 1
    assert result.chance == 0.25
    # C(8,6) .25^6 .75^2 + 8 .25^7 .75 + .25^8
    assert result.above_chance_p == pytest.approx(28 * 0.25**6 * 0.75**2 + 8 * 0.25**7 * 0.75 + 0.25**8)
    assert result.non_inferior is True
    assert not beats_chance(result)


def test_without_a_margin_nothing_is_decided(task):
    result = result_of(task({"text": "a b"}, {"text": "c d"}), [True, False], [True, True], margin=None)
    assert (result.non_inferior, result.num_needed, result.chance) == (None, None, None)
    assert beats_chance(result)


def test_too_few_questions_are_told_how_many_are_needed(task):
    one = task({"text": "a b"}, {"text": "c d"})
    with pytest.raises(DataError, match=r"2 questions can't show a loss of at most 0\.01 .* 268 are needed, and 2474"):
        require_questions(one, 0.01)
    require_questions(one, None)
