"""From fields of a request to `SamplingParams`."""

from typing import Any

from halve.core.errors import UserError
from halve.engine import SamplingParams
from halve.engine.constrain import json_grammar
from halve.server.errors import ApiError, of_user_error
from halve.server.wire import ResponseFormat, Sampling

_SAME = ("top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens",
         "ignore_eos", "n", "logit_bias", "stop_token_ids")  # fmt: skip


def sampling_of(body: Sampling, max_tokens: int, **more: Any) -> SamplingParams:
    """How tokens are chosen; temperature is 1 where nothing is said, as OpenAI's is."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    given["temperature"] = 1.0 if body.temperature is None else body.temperature
    given["top_k"] = None if body.top_k is None or body.top_k < 0 else body.top_k
    given["seed"] = None if body.seed is None else body.seed % 2**64
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given["stop"] = tuple(one for one in [*stop, *more.pop("more_stops", ())] if one)
    if stop and not all(stop):
        raise ApiError(400, "stop: a stop string must not be empty", param="stop", code="invalid_value")
    try:
        return SamplingParams.of(**given, max_tokens=max_tokens, **more)
    except UserError as error:
        raise of_user_error(error) from error


def format_grammar(asked: ResponseFormat | None) -> str | None:
    """The grammar of a response format, None for any text. Raises ApiError."""
    if asked is None or asked.type == "text":
        return None
    schema = None
    if asked.type == "json_schema":
        given = asked.json_schema or {}
        schema = given.get("schema")
        if not isinstance(given.get("name"), str) or not isinstance(schema, dict):
            raise ApiError(
                400, "response_format.json_schema: give an object with `name` and `schema`",
                param="response_format.json_schema", code="invalid_value",
            )  # fmt: skip
    try:
        return json_grammar(schema)
    except UserError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format", code="invalid_value") from error


def room(context: int, num_prompt_tokens: int, asked: int | None) -> int:
    """The most tokens of an answer. Raises ApiError where the prompt fills the context."""
    left = context - num_prompt_tokens
    if left < 1:
        raise ApiError(
            400,
            f"the prompt has {num_prompt_tokens} tokens, and this model's context holds {context} with at least one of "
            "the answer; shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    return left if asked is None else min(asked, left)
