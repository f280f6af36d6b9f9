"""What goes into the engine and what comes out of one step. All records go through JSON by `halve.core.record`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from halve.core.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]

VERSION = 4  # 2 to 4 add fields with defaults to records of the version before, so all are read
MAX_LOGPROBS = 20
MAX_SAMPLES = 1024
MAX_PRIORITY = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and where they end. What each setting computes: `halve.kernels.sampling`.

    max_tokens: the most tokens to generate; the model's context may end the text earlier, with reason "length".
    min_tokens: before so many, no end-of-sequence or stop token is chosen and no stop string looked for.
    temperature: 0 takes the most likely token. top_k: only the k most likely, 0 for all. top_p: only the most likely
    tokens that hold this much probability. min_p: only tokens at least this share as likely as the likeliest.
    typical_p: only the tokens of most typical surprise that hold this much probability.
    presence_penalty, frequency_penalty: taken off a token's logit once, and for each time it was generated.
    repetition_penalty: divides the logits of tokens in prompt or answer (multiplies negative ones).
    logit_bias: token id -> what is added to its logit.
    seed: the same seed gives the same tokens, whatever else is in the batch; None draws one.
    n: answers to the same prompt, each with a seed of its own that follows from `seed` (the first has it as it is).
    logprobs: None, or 0 for the log-probability of each chosen token, or of the k likeliest beside it.
    stop: text ends before the first of these strings. stop_token_ids: text ends before any of these tokens.
    include_stop: the stop string or the text of the stop token stays in the text.
    ignore_eos: the model's end-of-sequence tokens do not end the text (for measuring).
    grammar: the text is one that this grammar (`halve.engine.constrain`) allows; an engine with a constrainer takes it.
    Raises RequestError naming the field, its value and the rule.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    grammar: str | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, _is_whole(self.max_tokens, 1), "a whole number, 1 or more")
        min_fits = _is_whole(self.min_tokens, 0) and self.min_tokens <= self.max_tokens
        _require("min_tokens", self.min_tokens, min_fits, "a whole number from 0 to max_tokens")
        temperature_fits = _is_number(self.temperature) and 0 <= self.temperature < math.inf
        _require("temperature", self.temperature, temperature_fits, "a finite number, 0 or more")
        _require("top_k", self.top_k, _is_whole(self.top_k, 0) and self.top_k < 2**31, "a whole number, 0 or more")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _require(name, value, _is_number(value) and 0 < value <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(name, value, _is_number(value) and -2 <= value <= 2, "from -2 to 2")
        repetition_fits = _is_number(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100
        _require("repetition_penalty", self.repetition_penalty, repetition_fits, "from 0.01 to 100")
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        seed_fits = self.seed is None or (_is_whole(self.seed, 0) and self.seed < 2**64)
        _require("seed", self.seed, seed_fits, "None or a whole number from 0 to 2**64 - 1")
        _require("n", self.n, _is_whole(self.n, 1) and self.n <= MAX_SAMPLES, f"a whole number from 1 to {MAX_SAMPLES}")
        logprobs_fit = self.logprobs is None or (_is_whole(self.logprobs, 0) and self.logprobs <= MAX_LOGPROBS)
        _require("logprobs", self.logprobs, logprobs_fit, f"None or a whole number from 0 to {MAX_LOGPROBS}")
        stops_fit = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _require("stop", self.stop, stops_fit, "a tuple of strings, none of them empty")
        _require("stop_token_ids", self.stop_token_ids, _are_ids(self.stop_token_ids), "a tuple of token ids")
        grammar_fits = self.grammar is None or (isinstance(self.grammar, str) and bool(self.grammar))
        _require("grammar", self.grammar, grammar_fits, "None or a grammar as a string, not empty")
        for name in ("include_stop", "ignore_eos"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool), "true or false")
        _check_version("sampling", self.version)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From loose arguments: None leaves a default, a list does for a tuple, one stop string for a tuple of it.

        Raises RequestError naming an option that does not exist, or whose value is refused.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"version"}
        if unknown := sorted(options.keys() - known):
            raise RequestError(f"sampling: there is no {unknown[0]!r}; there are {', '.join(sorted(known))}")
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("stop", "stop_token_ids"):
            if isinstance(value := given.get(name), str):
                given[name] = (value,)
            elif isinstance(value, Iterable):
                given[name] = tuple(value)
        return cls(**given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to continue.

    request_id: any string that no unfinished request of the engine has. priority: lower runs first, from -100 to 100;
    how much one level is worth is `EngineConfig.overtakes_per_priority`. cache_salt: requests share cached prefixes
    with those of the same salt alone.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        id_fits = isinstance(self.request_id, str) and bool(self.request_id)
        _require("request_id", self.request_id, id_fits, "a string, not empty")
        ids_fit = _are_ids(self.prompt_token_ids) and bool(self.prompt_token_ids)
        _require("prompt_token_ids", self.prompt_token_ids, ids_fit, "a tuple of at least one token id")
        sampling_fits = isinstance(self.sampling, SamplingParams)
        _require("sampling", self.sampling, sampling_fits, "SamplingParams")
        priority_fits = _is_whole(self.priority, -MAX_PRIORITY) and self.priority <= MAX_PRIORITY
        _require("priority", self.priority, priority_fits, f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}")
        _require("cache_salt", self.cache_salt, isinstance(self.cache_salt, str), "a string")
        _check_version("request", self.version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A token that could have been chosen, and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """The model's own log-probability of a chosen token, before bias, penalties and cuts, and of the likeliest."""

    token_id: int
    logprob: float
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What one step adds to one answer.

    index: which of the request's n answers. token_id: the token of this step; None when the answer ends without one
    (it was aborted).
    text: what became certain, which may lag behind the tokens; the texts of an answer add up to its whole text.
    finish_reason: why it ended ("stop": end-of-sequence, stop token or stop string; "length": max_tokens or the
    context; "abort"), None while it goes on.
    logprobs: of this token, where they were asked for. num_cached_tokens: prompt tokens that were in the cache.
    num_draft_tokens: tokens of this answer that were guessed so far. num_accepted_tokens: of them, those that the model
    chose too. prefill_s, decode_s: seconds of steps that this answer is to be charged for so far: of each step the
    share that its tokens are of all tokens (guesses count), prompt and answer apart.
    """

    request_id: str
    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    index: int = 0
    logprobs: TokenLogprobs | None = None
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    version: int = VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A finished answer. token_ids holds the token that ended it; text holds neither that nor a stop string, unless
    the request said include_stop.

    logprobs: one for each token, None where they were not asked for. num_draft_tokens, num_accepted_tokens: as
    `StepOutput` has them.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    version: int = VERSION

    @classmethod
    def from_outputs(cls, outputs: Sequence[StepOutput]) -> "Completion":
        """Join all outputs of one answer, in order, the last with a finish_reason."""
        last = outputs[-1]
        assert last.finish_reason is not None
        token_ids = tuple(output.token_id for output in outputs if output.token_id is not None)
        logprobs = tuple(output.logprobs for output in outputs if output.logprobs is not None)
        return cls(
            request_id=last.request_id,
            text="".join(output.text for output in outputs),
            token_ids=token_ids,
            prompt_tokens=last.num_prompt_tokens,
            completion_tokens=len(token_ids),
            finish_reason=last.finish_reason,
            index=last.index,
            logprobs=logprobs or None,
            num_cached_tokens=last.num_cached_tokens,
            num_draft_tokens=last.num_draft_tokens,
            num_accepted_tokens=last.num_accepted_tokens,
        )


def _bias(given: Any) -> dict[int, float]:
    """Ids as whole numbers: JSON has them as strings."""
    rule = "a map of token ids to numbers from -100 to 100"
    _require("logit_bias", given, isinstance(given, Mapping), rule)
    bias = {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in given.items()}
    fits = all(_is_whole(key, 0) and _is_number(value) and -100 <= value <= 100 for key, value in bias.items())
    _require("logit_bias", given, fits and len(bias) == len(given), rule)
    return bias


def _require(name: str, value: Any, fits: bool, rule: str) -> None:
    if not fits:
        raise RequestError(f"{name}: {value!r:.80} must be {rule}")


def _check_version(what: str, version: int) -> None:
    readable = _is_whole(version, 1) and version <= VERSION
    _require(f"{what}.version", version, readable, f"1 to {VERSION}, the versions that this Halve reads")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_ids(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    if set(map(type, value)) <= {int}:  # of a long prompt, a tenth of the time that one by one takes
        return min(value, default=0) >= 0
    return all(_is_whole(i, 0) for i in value)
