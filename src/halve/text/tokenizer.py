"""Tokenizer: text to token ids and back, as transformers does it, without transformers.

Ids come from the `tokenizers` package and `tokenizer.json` as it lies in the checkpoint.
Source of the rules: transformers 5, `tokenization_utils_tokenizers.py`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tokenizers

from halve.core.errors import TextError
from halve.text.chat import ChatTemplates

Message = Mapping[str, Any]


class Tokenizer:
    """Text to token ids and back, for one checkpoint. Made by `from_directory`.

    bos_token_id, eos_token_id: None where the checkpoint names no such token. special_token_ids: ids that `decode`
    leaves out. chat_template: the default template's source, or None.
    """

    def __init__(self, backend: Any, config: Mapping[str, Any], templates: ChatTemplates, path: Path, num_ids: int):
        self._backend, self._path, self._templates = backend, path, templates
        self._named = {name: _content(token) for name, token in config.items() if _is_named_token(name, token)}
        self.special_token_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.bos_token_id: int | None = self._id_of("bos_token")
        self.eos_token_id: int | None = self._id_of("eos_token")
        self._add_bos = bool(config.get("add_bos_token"))
        if self._add_bos and self.bos_token_id is None:
            file = path / "tokenizer_config.json"
            raise TextError(f"{file}: add_bos_token is true, but there is no bos_token; name it or set it to false")
        self._num_ids = num_ids or self.vocab_size
        self._decodes_byte_tokens = b'"ByteFallback"' in (backend.decoder.__getstate__() if backend.decoder else b"")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. Found when first asked for: a quarter of a second for 128,000 tokens."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, so that a text has at least its length over this many tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    @classmethod
    def from_directory(cls, path: Path, *, vocab_size: int | None = None) -> "Tokenizer":
        """Read the tokenizer files of a checkpoint directory.

        vocab_size: rows of the model's embedding table; every id must be below it. Raises TextError naming the file
        that is missing or broken, or the first token beyond vocab_size.
        """
        path = Path(path)
        backend = _read_backend(path)
        config = _read_config(path)
        _add_tokens(backend, config, path)
        if vocab_size is not None:
            _check_vocabulary(backend, vocab_size, path)
        return cls(backend, config, ChatTemplates.read(path, config), path, vocab_size or 0)

    def difference(self, other: "Tokenizer") -> str | None:
        """What another tokenizer has under an id that this one has something else under, in words; None for nothing."""
        ours, theirs = ({i: t for t, i in one._backend.get_vocab(True).items()} for one in (self, other))
        if ours == theirs:
            return None
        token_id = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        return f"where token {token_id} is {theirs.get(token_id)!r}, not {ours.get(token_id)!r}"

    def differs_from(self, tokens: Sequence[str]) -> str | None:
        """The first token of ours that a list of tokens by id, as a GGUF file holds it, has otherwise; None for none.

        Ids that only the list has (rows that pad the table) do not count.
        """
        for token_id, token in sorted((i, t) for t, i in self._backend.get_vocab(True).items()):
            if token_id >= len(tokens) or tokens[token_id] != token:
                other = repr(tokens[token_id]) if token_id < len(tokens) else "missing"
                return f"where token {token_id} is {other}, not {token!r}"
        return None

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template, None where the checkpoint has none."""
        return self._templates.default

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        The same ids as transformers, but for BOS: `add_bos_token` in the config is honoured where the post-processor
        of tokenizer.json adds none, and text that already begins with BOS (a rendered chat) gets no second one.
        Raises TextError when `text` is not a string or not valid Unicode.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise TextError(f"text: {text!r:.80} can't be tokenized; pass a string without lone surrogates") from None
        bos = self.bos_token_id
        if not add_special_tokens or bos is None:
            return ids
        if self._add_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids[1:] if ids[:2] == [bos, bos] and text.startswith(self._named["bos_token"]) else ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of `render_chat`: special tokens are those that the template writes, none are added."""
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model was trained to read it, by the checkpoint's chat template.

        messages: objects with a `role` and what the template reads (`content`, `tool_calls`, ...), as JSON values.
        tools: JSON schemas. variables: further names that the template reads (`enable_thinking`).
        Raises TextError when there is no template, messages are not of that form, or the template fails, refuses
        the messages (`raise_exception`) or exceeds its budget (`halve.text.sandbox`).
        """
        return self._templates.render(
            messages,
            special_tokens=self._named,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=variables or {},
        )

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Ids that the model has and the tokenizer lacks (rows that pad the table) have no text. Raises TextError on
        ids outside the vocabulary.
        """
        return cast(str, self._backend.decode(self._checked(ids), skip_special_tokens=skip_special_tokens))

    def decode_stream(self, *, skip_special_tokens: bool = True) -> "DecodeStream":
        """A decoder that takes one id at a time and gives text as soon as it is certain."""
        return DecodeStream(self, skip_special_tokens=skip_special_tokens)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self._num_ids]:
            raise TextError(f"token id {bad[0]} is outside the vocabulary (0 to {self._num_ids - 1}) of {self._path}")
        return ids

    def _has_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        known = self._backend.id_to_token(token_id) is not None
        return known and not (skip_special_tokens and token_id in self.special_token_ids)

    def _is_byte(self, token_id: int) -> bool:
        return self._decodes_byte_tokens and bool(re.fullmatch("<0x[0-9A-F]{2}>", self._backend.id_to_token(token_id)))

    def _id_of(self, name: str) -> int | None:
        return cast("int | None", self._backend.token_to_id(self._named[name])) if name in self._named else None


class DecodeStream:
    """Text of a growing list of ids, piece by piece; the pieces and the flush add up to `decode` of all ids.

    A piece never ends within a character. Single-byte tokens wait until their run is over, since one bad byte makes
    `tokenizers` replace the whole run.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # ids still undecided, after enough of the decided ones to decode in context
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain, often one token's, sometimes none."""
        [token_id] = self._tokenizer._checked([token_id])
        if not self._tokenizer._has_text(token_id, self._skip):
            return ""
        self._window.append(token_id)
        if self._tokenizer._is_byte(token_id):
            return ""
        text = self._text(self._window)
        certain = len(text) - text.endswith("\ufffd")  # it may be the first bytes of a character
        piece, self._emitted = text[self._emitted : certain], max(certain, self._emitted)
        if certain == len(text) and (context := len(self._text([token_id]))):
            # One token with text is context enough: decoders treat only the first and the last token differently.
            self._window, self._emitted = [token_id], context
        return piece

    def flush(self) -> str:
        """The text still held back; a character that was never completed becomes U+FFFD. The stream is then empty."""
        piece = self._text(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


# Files


def _read_backend(path: Path) -> Any:
    file = path / "tokenizer.json"
    if not file.is_file():
        others = [n for n in ("tokenizer.model", "vocab.json", "tekken.json") if (path / n).is_file()]
        if others:
            raise TextError(
                f"{file}: missing; {others[0]} alone is not read. Convert it once where transformers is installed: "
                f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
            )
        raise TextError(f"{file}: missing; copy the tokenizer files of the model beside its weights")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise TextError(f"{file}: tokenizers {tokenizers.__version__} can't read it: {error}") from error
    backend.no_truncation()  # a prompt is never cut in silence
    backend.no_padding()
    return backend


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; an old one without `added_tokens_decoder` is overruled by special_tokens_map.json."""
    config = _read_object(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_object(path / "special_tokens_map.json")
    return config


def _read_object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TextError(f"{file}: can't be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise TextError(f"{file}: expected an object, got {raw!r:.80}")
    return raw


def _content(token: Any) -> str:
    return token if isinstance(token, str) else cast(str, token["content"])


def _is_token(token: Any) -> bool:
    return isinstance(token, str) or (isinstance(token, dict) and isinstance(token.get("content"), str))


def _is_named_token(name: str, token: Any) -> bool:
    return name.endswith("_token") and _is_token(token)


def _add_tokens(backend: Any, config: Mapping[str, Any], path: Path) -> None:
    """Tokens that only tokenizer_config.json or special_tokens_map.json name, in the order of transformers."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    file = path / "tokenizer_config.json"
    try:
        listed = sorted((int(i), dict(token)) for i, token in (config.get("added_tokens_decoder") or {}).items())
        for index, token in listed:
            if (content := token.pop("content")) not in known:
                backend.add_tokens([tokenizers.AddedToken(content, **token)])
                known.add(content)
            if backend.token_to_id(content) != index:
                raise TextError(f"{file}: {content!r} has id {index}, tokenizer.json: {backend.token_to_id(content)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TextError(f"{file}: added_tokens_decoder is not a map of id to token: {error!r}") from error
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    named = [token for name, token in config.items() if _is_named_token(name, token)]
    for token in [*named, *(t for t in more if _is_token(t))]:
        if (content := _content(token)) not in known:
            backend.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
            known.add(content)


def _check_vocabulary(backend: Any, vocab_size: int, path: Path) -> None:
    """Refuse ids beyond the model's table, by count: the ids of a tokenizer's own vocabulary leave no gaps.

    Where one does, the engine refuses the id that it meets.
    """
    added = max(backend.get_added_tokens_decoder(), default=-1)
    if added < vocab_size and backend.get_vocab_size(with_added_tokens=True) <= vocab_size:
        return
    vocabulary = backend.get_vocab(with_added_tokens=True)
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= vocab_size)
    if beyond:
        raise TextError(
            f"{path / 'tokenizer.json'}: a tokenizer that does not match the vocabulary: it has "
            f"{max(vocabulary.values()) + 1} ids (added tokens included), the model {vocab_size}; the first beyond is "
            f"{beyond[0][1]!r} with id {beyond[0][0]}. Use the tokenizer that the model was trained with"
        )
