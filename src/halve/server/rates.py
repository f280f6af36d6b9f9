"""Requests and tokens a minute, counted by each server for itself."""

import time
from collections import deque

from halve.server.errors import ApiError
from halve.server.store import Key


class _Bucket:
    """Requests and tokens of a key in the last minute."""

    def __init__(self) -> None:
        self.events: deque[tuple[float, int]] = deque()
        self.tokens = 0

    def drop_old(self, now: float) -> None:
        while self.events and self.events[0][0] <= now - 60:
            self.tokens -= self.events.popleft()[1]


class RateLimits:
    """Requests and tokens a minute, by key, on this server."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: Key, num_tokens: int) -> dict[str, str]:
        """Count a request. Returns OpenAI's headers; raises ApiError 429 with Retry-After."""
        limits = (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
        if all(limit is None for _, limit in limits):
            return {}
        now = time.monotonic()
        bucket = self._buckets.setdefault(key.id, _Bucket())
        bucket.drop_old(now)
        asked = {"requests": (len(bucket.events), 1), "tokens": (bucket.tokens, num_tokens)}
        headers: dict[str, str] = {}
        for what, limit in limits:
            if limit is None:
                continue
            used, more = asked[what]
            if more > limit:
                raise ApiError(
                    429,
                    f"rate limit: this request asks for {more} {what}, and this key may send {limit} a minute; ask for "
                    "less (max_tokens counts)",
                    code="rate_limit_exceeded",
                    headers={f"x-ratelimit-limit-{what}": str(limit)},
                )
            free_at = next((at + 60 for at, _ in bucket.events), now)
            headers |= {
                f"x-ratelimit-limit-{what}": str(limit),
                f"x-ratelimit-remaining-{what}": str(max(0, limit - used - more)),
                f"x-ratelimit-reset-{what}": f"{max(0.0, free_at - now):.0f}s",
            }
            if used + more > limit:
                after = max(1, round(free_at - now))
                raise ApiError(
                    429,
                    f"rate limit: this key may send {limit} {what} a minute, {used} are used and this request asks for "
                    f"{more}; come again in {after} s",
                    code="rate_limit_exceeded",
                    headers={**headers, f"x-ratelimit-remaining-{what}": str(max(0, limit - used)),
                             "retry-after": str(after)},
                )  # fmt: skip
        bucket.events.append((now, num_tokens))
        bucket.tokens += num_tokens
        return headers
