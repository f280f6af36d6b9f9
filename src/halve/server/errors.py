"""Errors as OpenAI's and Anthropic's clients read them."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from halve.core.errors import UserError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error. param: the field of the request that is wrong; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """The error's type in words of the wire."""
        return "insufficient_quota" if self.code == "insufficient_quota" else TYPES.get(self.status, "server_error")

    def body(self, *, anthropic: bool = False) -> dict[str, Any]:
        """The JSON of the answer."""
        if anthropic:
            return {"type": "error", "error": {"type": self.kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, *, anthropic: bool = False) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(anthropic=anthropic), self.status, headers=self.headers)


_FIELD = re.compile(r"^(?:request '[^']*': |sampling: )?([a-z_]+)(?:\[\d+\])?[:. ]")
_RENAMED = {"prompt_token_ids": "prompt"}


def of_user_error(error: UserError) -> ApiError:
    """What the engine or the tokenizer refused; our messages begin with the field's name."""
    found = _FIELD.match(str(error))
    param = found and _RENAMED.get(found[1], found[1])
    too_long = "context" in str(error) and "token" in str(error)
    return ApiError(400, str(error), param=param, code="context_length_exceeded" if too_long else None)


def of_validation(error: ValidationError) -> ApiError:
    """What is wrong with a body, by its first mistake."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    # Branches of a union are part of pydantic's place; they are no part of the body.
    place = [str(p) for p in first["loc"] if isinstance(p, int) or re.fullmatch(r"[a-z0-9_]+", str(p))]
    place = [p for p in place if p not in ("str", "int", "float", "list", "dict", "bool")]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param}: there is no such parameter; leave it out", param=param, code="unknown_parameter"
        )
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing", param=param, code="missing_required_parameter")
    # A union says once for each of its forms what that form would be.
    rules = dict.fromkeys(one["msg"] for one in found if one["loc"][:1] == first["loc"][:1])
    rule = " or ".join([first["msg"], *(one.removeprefix("Input should be ") for one in rules if one != first["msg"])])
    return ApiError(400, f"{param}: {rule}", param=param, code="invalid_value")
