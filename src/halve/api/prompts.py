"""`halve prompts`: where the tokens of logged requests go, what of it can be saved, and whether it really is."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.api.prompt_findings import find_savings, notes_of
from halve.api.prompt_log import LogReader, Reading
from halve.api.prompt_replay import Replayed, replay_on_engine, replay_simulated
from halve.core.errors import ConfigError, RequestError, TextError
from halve.core.record import to_dict
from halve.data.prompt_parts import ApproximateEncoder, approximate_ids, rendered
from halve.data.request_logs import LoggedMessage
from halve.economics import api_price
from halve.economics.fields import read_number
from halve.economics.margin_tables import rounded
from halve.economics.product_file import MOST_USD_PER_MTOK, listed_cached_price
from halve.economics.prompts import (
    Finding,
    PromptPrices,
    cost_as_sent,
    monthly,
    requests_per_month,
)

if TYPE_CHECKING:
    from halve.api.model import Model
    from halve.text import Tokenizer

APPROXIMATE = "approximate (pieces of words; give --model for its tokenizer)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Tokens of the log by what they are."""

    name: str
    tokens: int
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """What `prompts` found. tokens are the log's, scaled to its own usage where that was logged (token_scale).

    usd, usd_per_month: of all of it; None where a price, or the time that the log covers, is not known. notes: what a
    reader must know.
    """

    path: str
    num_requests: int
    num_bad: int
    bad_lines: tuple[str, ...]
    models: dict[str, int]
    tokenizer: str
    token_scale: float | None
    span_s: float | None
    requests_per_month: Decimal | None
    prices: PromptPrices
    prompt_tokens: int
    cached_tokens: int | None
    answer_tokens: int
    usd: Decimal | None
    roles: tuple[Role, ...]
    findings: tuple[Finding, ...]
    replays: tuple[Replayed, ...]
    notes: tuple[str, ...]
    version: int = 1

    def usd_per_month(self, usd: Decimal | None) -> Decimal | None:
        """A month's dollars of the log's."""
        return monthly(usd, self.num_requests, self.requests_per_month)

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        prices = self.prices
        names = ("input_usd_per_mtok", "cached_input_usd_per_mtok", "output_usd_per_mtok")
        return {
            "path": self.path,
            "num_requests": self.num_requests,
            "num_bad": self.num_bad,
            "bad_lines": list(self.bad_lines),
            "models": self.models,
            "tokenizer": self.tokenizer,
            "token_scale": self.token_scale,
            "span_s": self.span_s,
            "requests_per_month": rounded(self.requests_per_month),
            "prices": {**{name: rounded(getattr(prices, name), 9) for name in names}, "origin": prices.origin},
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "answer_tokens": self.answer_tokens,
            "usd": rounded(self.usd),
            "usd_per_month": rounded(self.usd_per_month(self.usd)),
            "roles": to_dict(self.roles),
            "findings": [
                {
                    "kind": one.kind,
                    "tokens": one.tokens,
                    "usd": rounded(one.usd),
                    "usd_per_month": rounded(self.usd_per_month(one.usd)),
                    "keeps_answers": one.keeps_answers,
                    "change": one.change,
                    "evidence": list(one.evidence),
                }
                for one in self.findings
            ],
            "replays": [{**to_dict(one), "hit_rate": one.hit_rate} for one in self.replays],
            "notes": list(self.notes),
            "version": self.version,
        }


def read_prices(
    input_price: str | None, cached_price: str | None, output_price: str | None, api: str | None
) -> PromptPrices:
    """Prices as words of a command line; `api` as PROVIDER/MODEL. Raises ConfigError."""

    def price(text: str | None, flag: str) -> Decimal | None:
        return None if text is None else read_number(text, flag, high=MOST_USD_PER_MTOK)

    stated = [
        price(input_price, "--input-price"),
        price(cached_price, "--cached-price"),
        price(output_price, "--output-price"),
    ]
    if api is None:
        origin = "stated on the command line" if any(one is not None for one in stated) else "not stated"
        return PromptPrices(
            input_usd_per_mtok=stated[0],
            cached_input_usd_per_mtok=stated[1],
            output_usd_per_mtok=stated[2],
            origin=origin,
        )
    if stated[0] is not None or stated[2] is not None:
        raise ConfigError(f"--api {api}: it has prices of its own; leave out --input-price and --output-price")
    provider, _, name = api.partition("/")
    known = api_price(provider, name) if name else None
    if known is None:
        raise ConfigError(
            f"--api {api}: has no known price; write PROVIDER/MODEL, such as openai/gpt-5-mini, with the package "
            "genai-prices installed (halve[serve]), or give --input-price and --output-price"
        )
    return PromptPrices(
        input_usd_per_mtok=known.input_usd_per_mtok,
        cached_input_usd_per_mtok=stated[1] if stated[1] is not None else listed_cached_price(known),
        output_usd_per_mtok=known.output_usd_per_mtok,
        origin=f"{known.name}, {known.source}",
    )


def prompts(
    log: Path | str,
    *,
    model: str | None = None,
    prices: PromptPrices | None = None,
    requests_a_month: int | None = None,
    first: int | None = None,
    replay: int = 500,
    on_engine: bool = False,
    cache_tokens: int = 131_072,
    window_s: float = 60.0,
    long_system: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> Prompts:
    """Where the tokens of a log go (`halve.data.request_logs` tells its shapes).

    model: a checkpoint or bundle whose tokenizer counts, else pieces of words are counted. requests_a_month: instead of
    what the log's times say. first: so many requests of it. replay: requests that are replayed, 0 for none. on_engine:
    through the model instead of the simulator, whose cache has cache_tokens. window_s: how long requests may be held
    back. long_system: tokens beyond which a system prompt is long.

    Raises DataError for a log without requests, ConfigError for values that can't be.
    """
    for name, value, low, high in (
        ("requests_a_month", requests_a_month, 1, 10**12),
        ("first", first, 1, 10**12),
        ("replay", replay, 0, 100_000),
        ("cache_tokens", cache_tokens, 64, 10**9),
        ("window_s", window_s, 0, 86_400),
        ("long_system", long_system, 1, 10**7),
    ):
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name}: {value} must be from {low} to {high}")
    if on_engine and (model is None or not replay):
        raise ConfigError("replaying on the engine needs a model: give --model, and --replay above 0")
    prices = prices or PromptPrices()
    tokenizer = None if model is None else _tokenizer(model)
    encode = ApproximateEncoder() if tokenizer is None else _encoder(tokenizer)

    def count(text: str) -> int:
        return len(approximate_ids(text) if tokenizer is None else tokenizer.encode(text))

    reader = LogReader(Path(log), encode, count, first=first, samples=replay, texts=on_engine)
    found = reader.read()
    if on_engine and model is not None:
        replays = _on_engine(model, reader, found, encode, progress)
    else:
        replays = replay_simulated(found.samples, cache_tokens=cache_tokens, window_s=window_s) if replay else []
    return _joined(Path(log), found, replays, prices, model, requests_a_month, long_system)


def _tokenizer(model: str) -> "Tokenizer":
    from halve.checkpoint import resolve
    from halve.text import Tokenizer

    return Tokenizer.from_directory(resolve(model))


def _encoder(tokenizer: "Tokenizer") -> Callable[[Sequence[LoggedMessage], Sequence[str]], list[int]]:
    """By the chat template where the model has one and takes the messages, else with roles as plain marks."""

    def encode(messages: Sequence[LoggedMessage], tools: Sequence[str]) -> list[int]:
        if tokenizer.chat_template is not None and messages[0].role:
            turns = [{"role": message.role, "content": message.text} for message in messages]
            try:
                parsed = [json.loads(tool) for tool in tools] or None
                return tokenizer.encode_chat(turns, add_generation_prompt=True, tools=parsed)
            except TextError:
                pass  # a template may refuse what another model took; its marks are a few tokens
        return tokenizer.encode("".join(rendered(messages, tools)))

    return encode


def _on_engine(
    name: str, reader: LogReader, found: Reading, encode: Any, progress: Callable[[int, int], None] | None
) -> list[Replayed]:
    from halve.api.model import load
    from halve.engine import SamplingParams

    loaded: Model = load(name)
    try:

        def answer(ids: Sequence[int], salt: str) -> int | None:
            try:
                stream = loaded.engine.stream(list(ids), SamplingParams(max_tokens=1), cache_salt=salt)
                return max(output.num_cached_tokens for output in stream)
            except RequestError:
                return None

        return replay_on_engine(found.samples, reader.recurring, encode, answer, Path(name).name, progress)
    finally:
        loaded.close()


def _joined(
    path: Path,
    found: Reading,
    replays: list[Replayed],
    prices: PromptPrices,
    model: str | None,
    requests_a_month: int | None,
    long_system: int,
) -> Prompts:
    scale = Decimal(found.usage_prompt) / found.counted_prompt if found.usage_prompt and found.counted_prompt else None
    span = None
    if found.first_at is not None and found.last_at is not None and found.num_timed == found.num_requests:
        span = found.last_at - found.first_at
    a_month = requests_per_month(found.num_requests, span)
    if requests_a_month is not None:
        a_month = Decimal(requests_a_month)

    def scaled(tokens: int) -> int:
        return tokens if scale is None else round(tokens * scale)

    prompt = scaled(found.prompt)
    total = sum(found.roles.values()) or 1
    roles = sorted(found.roles.items(), key=lambda one: -one[1])
    return Prompts(
        path=str(path),
        num_requests=found.num_requests,
        num_bad=found.num_bad,
        bad_lines=tuple(f"line {bad.line}: {bad.reason}" for bad in found.bad),
        models=dict(found.models.most_common(20)),
        tokenizer=model or APPROXIMATE,
        token_scale=None if scale is None else float(scale),
        span_s=span,
        requests_per_month=a_month,
        prices=prices,
        prompt_tokens=prompt,
        cached_tokens=found.cached if found.num_with_cached else None,
        answer_tokens=found.answer,
        usd=cost_as_sent(prompt, min(found.cached, prompt), found.answer, prices),
        roles=tuple(Role(name=name, tokens=scaled(tokens), share=tokens / total) for name, tokens in roles),
        findings=tuple(find_savings(found, replays, prices, scaled, long_system)),
        replays=tuple(replays),
        notes=tuple(notes_of(found, span, a_month, prices, scale)),
    )
