"""Texts that follow a grammar: after each token, which tokens may come next (arXiv:2307.09702).

The grammar is a string; who compiles it and computes the masks is behind `Constrainer`. `GuidanceConstrainer` is
llguidance (JSON schema, regular expressions, Lark), which walks a trie of the vocabulary with an Earley parser while a
step waits, some tens of microseconds a token. What it refuses, or takes too long to compile, is a RequestError.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from halve.core.errors import RequestError
from halve.kernels.ops import Array

log = logging.getLogger("halve.engine")

MAX_GRAMMAR_BYTES = 256 * 1024
MAX_DEPTH = 100
MAX_COMPILED = 256


class Matcher(Protocol):
    """One text on its way through a grammar."""

    def fill(self, row: Array) -> None:
        """Write which tokens may come next: uint32 words, bit i % 32 of word i // 32."""

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""


class Constrainer(Protocol):
    """Compiles grammars; every method may be called from any thread."""

    def check(self, grammar: str) -> None:
        """Compile a grammar where it is new. Raises RequestError."""

    def matcher(self, grammar: str) -> Matcher:
        """A text at its beginning. Cheap for a grammar that was checked."""


class GuidanceConstrainer:
    """Grammars by llguidance, over the vocabulary of a tokenizer.json.

    vocab_size: rows of the model's table. eos_token_ids: tokens that end a text; they are allowed where the grammar may
    end. The vocabulary is read with the first grammar. What its methods raise is RequestError.
    """

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._file, self._vocab_size, self._eos_token_ids = tokenizer_file, vocab_size, list(eos_token_ids)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._read: Any = None

    def check(self, grammar: str) -> None:
        """As `Constrainer.check`."""
        self._compile(grammar)

    def matcher(self, grammar: str) -> Matcher:
        """As `Constrainer.matcher`."""
        return _GuidanceMatcher(self._compile(grammar).deep_copy(), self._eos_token_ids)

    def _tokenizer(self) -> Any:
        llguidance = _llguidance()
        with self._reading:
            if self._read is None:
                try:
                    self._read = llguidance.LLTokenizer(
                        str(self._file), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
                    )
                except Exception as error:  # llguidance raises plain exceptions
                    raise RequestError(f"{self._file}: llguidance can't read this tokenizer: {error}") from error
            return self._read

    def _compile(self, grammar: str) -> Any:
        llguidance = _llguidance()
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        if len(grammar) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"grammar: {len(grammar)} bytes; at most {MAX_GRAMMAR_BYTES} are compiled")
        # The lexer's and the parser's own limits bound time and memory of compiling and of every mask.
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_lexer_states=50_000, max_grammar_size=500_000
        )
        matcher = llguidance.LLMatcher(self._tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"grammar: {matcher.get_error():.300}")
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher


class _GuidanceMatcher:
    def __init__(self, matcher: Any, eos_token_ids: Sequence[int]) -> None:
        self._matcher, self._eos_token_ids = matcher, eos_token_ids

    def fill(self, row: Array) -> None:
        """A text whose grammar exceeds its limits, or has ended, can only end: others share the step."""
        try:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            failed = self._matcher.is_error()
        except Exception as error:  # llguidance raises plain exceptions
            log.warning("a grammar failed: %s", error)
            failed = True
        if failed or not row.any():
            row[:] = 0 if self._eos_token_ids else 0xFFFFFFFF
            for token_id in self._eos_token_ids:
                row[token_id // 32] |= np.uint32(1 << token_id % 32)

    def advance(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """The grammar of JSON that a schema allows; None for any object. Raises RequestError for a schema that is none."""
    llguidance = _llguidance()
    if schema is None:
        schema = {"type": "object"}
    if _depth(schema) > MAX_DEPTH:
        raise RequestError(f"json_schema: it is nested more than {MAX_DEPTH} deep; flatten it or use $ref")
    try:
        grammar: str = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_flexible": False}
        )
    except ValueError as error:
        raise RequestError(f"json_schema: {error}") from error
    return grammar


def lark_grammar(text: str) -> str:
    """The grammar that a text in llguidance's Lark dialect says."""
    return str(_llguidance().LLMatcher.grammar_from_lark(text))


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError("grammar: it needs llguidance; pip install 'halve[serve]'") from error
    return llguidance


def _depth(value: Any) -> int:
    deepest, ahead = 0, [(value, 1)]
    while ahead:
        at, depth = ahead.pop()
        deepest = max(deepest, depth)
        if depth > MAX_DEPTH:
            break
        if isinstance(at, Mapping):
            ahead += [(item, depth + 1) for item in at.values()]
        elif isinstance(at, list | tuple):
            ahead += [(item, depth + 1) for item in at]
    return deepest
