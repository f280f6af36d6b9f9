"""Prompts as text of exactly so many tokens."""

import random

import pytest

from halve.api.versus.words import Words
from halve.core.errors import RequestError
from halve.models.embedded import embedded_model_path
from halve.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(embedded_model_path())


@pytest.mark.parametrize("count", [2, 17, 200])
def test_a_text_has_as_many_tokens_as_there_are_ids(tokenizer, count):
    words = Words(tokenizer, tokenizer.vocab_size)
    drawn = [random.Random(count).randrange(tokenizer.vocab_size) for _ in range(count)]
    ids, text = words.of(drawn)
    assert len(ids) == count
    assert tokenizer.encode(text) == ids


def test_ids_that_are_alike_give_texts_that_begin_alike(tokenizer):
    words = Words(tokenizer, tokenizer.vocab_size)
    one, other = words.of([1, 2, 3, 4, 5, 6])[1], words.of([1, 2, 3, 4, 9, 9])[1]
    assert one.split()[:3] == other.split()[:3]
    assert one != other


class Odd:
    """A tokenizer whose words are tokens, until they are together."""

    def __init__(self, *, words=True):
        self.words = words

    def decode(self, ids):
        return "".join("a" if i == 0 else " word" for i in ids)

    def encode(self, text, add_special_tokens=True):
        if add_special_tokens:
            return [1] * (2 * len(text))
        return [0, 1] if self.words and text == "a word" else [0]


def test_a_tokenizer_without_words_is_refused():
    with pytest.raises(RequestError, match="no word of this tokenizer is a token"):
        Words(Odd(words=False), 4)


def test_a_tokenizer_that_makes_no_text_of_a_length_is_refused():
    with pytest.raises(RequestError, match="makes no text of exactly 3 tokens out of words"):
        Words(Odd(), 4).of([1, 1, 1])
