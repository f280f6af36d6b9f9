"""What goes into the engine and what comes out of one step. All records go through JSON by `halve.core.record`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from halve.core.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]

VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and where they end.

    max_tokens: the most tokens to generate; the model's context may end the text earlier, with reason "length".
    temperature: 0 takes the most likely token. top_p: only the most likely tokens that hold this much probability.
    seed: the same seed gives the same tokens, whatever else is in the batch; None draws one.
    stop: text ends before the first of these strings. stop_token_ids: text ends before any of these tokens.
    ignore_eos: the model's end-of-sequence tokens do not end the text (for measuring).
    Raises RequestError naming the field, its value and the rule.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, _is_whole(self.max_tokens, 1), "a whole number, 1 or more")
        temperature_fits = _is_number(self.temperature) and 0 <= self.temperature < math.inf
        _require("temperature", self.temperature, temperature_fits, "a finite number, 0 or more")
        _require("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        seed_fits = self.seed is None or (_is_whole(self.seed, 0) and self.seed < 2**64)
        _require("seed", self.seed, seed_fits, "None or a whole number from 0 to 2**64 - 1")
        stops_fit = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _require("stop", self.stop, stops_fit, "a tuple of strings, none of them empty")
        _require("stop_token_ids", self.stop_token_ids, _are_ids(self.stop_token_ids), "a tuple of token ids")
        _require("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "true or false")
        _check_version("sampling", self.version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to continue. request_id: any string that no unfinished request of the engine has."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    version: int = VERSION

    def __post_init__(self) -> None:
        id_fits = isinstance(self.request_id, str) and bool(self.request_id)
        _require("request_id", self.request_id, id_fits, "a string, not empty")
        ids_fit = _are_ids(self.prompt_token_ids) and bool(self.prompt_token_ids)
        _require("prompt_token_ids", self.prompt_token_ids, ids_fit, "a tuple of at least one token id")
        sampling_fits = isinstance(self.sampling, SamplingParams)
        _require("sampling", self.sampling, sampling_fits, "SamplingParams")
        _check_version("request", self.version)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What one step adds to one request.

    token_id: the token of this step; None when the request ends without one (it was aborted).
    text: what became certain, which may lag behind the tokens; the texts of a request add up to its whole text.
    finish_reason: why it ended ("stop": end-of-sequence, stop token or stop string; "length": max_tokens or the
    context; "abort"), None while it goes on.
    """

    request_id: str
    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    version: int = VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A finished request. token_ids holds the token that ended it; text holds neither that nor a stop string."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    version: int = VERSION

    @classmethod
    def from_outputs(cls, outputs: Sequence[StepOutput]) -> "Completion":
        """Join all outputs of one request, in order, the last with a finish_reason."""
        last = outputs[-1]
        assert last.finish_reason is not None
        token_ids = tuple(output.token_id for output in outputs if output.token_id is not None)
        return cls(
            request_id=last.request_id,
            text="".join(output.text for output in outputs),
            token_ids=token_ids,
            prompt_tokens=last.num_prompt_tokens,
            completion_tokens=len(token_ids),
            finish_reason=last.finish_reason,
        )


def _require(name: str, value: Any, fits: bool, rule: str) -> None:
    if not fits:
        raise RequestError(f"{name}: {value!r:.80} must be {rule}")


def _check_version(what: str, version: int) -> None:
    _require(f"{what}.version", version, version == VERSION, f"{VERSION}, the version that this Halve reads")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_whole(i, 0) for i in value)
