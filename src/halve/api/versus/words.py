"""Prompts as text that a tokenizer turns into exactly so many tokens, for servers that take no token ids."""

import re
from collections.abc import Sequence

from halve.core.errors import RequestError
from halve.text import Tokenizer

SAMPLE = 4000  # ids that are looked at for words
ENOUGH = 500  # words


class Words:
    """Texts of words that are a token each. Raises RequestError for a tokenizer that has no such words."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        step = max(1, vocab_size // SAMPLE)
        self._words: list[str] = []
        before = tokenizer.encode("a", add_special_tokens=False)
        first = tokenizer.decode(before)
        for token_id in range(0, vocab_size, step):
            word = tokenizer.decode([*before, token_id])[len(first) :]
            ids = tokenizer.encode(first + word, add_special_tokens=False)
            if re.fullmatch(r" [a-z]{2,}", word) and ids[-1:] == [token_id]:
                self._words.append(word)
            if len(self._words) >= ENOUGH:
                break
        if not self._words:
            raise RequestError("prompts: no word of this tokenizer is a token, so that no text of a length can be made")

    def of(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """Ids and text of a prompt of as many tokens, a word for each of these ids; tokens in front count.

        Raises RequestError when no text of just that length is found.
        """
        wanted = len(token_ids)
        words = [self._words[token_id % len(self._words)] for token_id in token_ids]
        for start in (0, 1):  # with the blank before the first word, and without
            count = wanted
            for _ in range(4):
                text = "".join(words[:count])[start:]
                ids = self._tokenizer.encode(text)
                if len(ids) == wanted:
                    return ids, text
                count += wanted - len(ids)
                if not 0 < count <= len(words):
                    break
        raise RequestError(f"prompts: this tokenizer makes no text of exactly {wanted} tokens out of words")
