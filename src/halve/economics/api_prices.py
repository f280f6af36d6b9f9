"""What closed APIs ask for a million tokens: from the package genai-prices, which brings its list along.

A name is `MODEL` or `MODEL@PROVIDER`; `gpt-…`, `claude-…`, `gemini-…` and `mistral-…` say their provider themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from importlib import metadata
from typing import Any

from halve.core.errors import ConfigError
from halve.economics.fields import nearest

MTOK = 1_000_000
MAKERS = {
    "gpt-": "openai", "o1": "openai", "o3": "openai", "o4": "openai", "claude-": "anthropic", "gemini-": "google",
    "mistral-": "mistral", "ministral-": "mistral", "codestral": "mistral", "magistral": "mistral",
    "deepseek-": "deepseek", "grok-": "x-ai",
}  # fmt: skip
# Prices of answers within a day over those of answers at once, as the makers' price pages say. genai-prices has none.
BATCH = {"openai": Decimal("0.5"), "anthropic": Decimal("0.5"), "google": Decimal("0.5"), "mistral": Decimal("0.5")}
SHORT_PROMPT = 1000  # tokens; prices in tiers are those of a prompt of this length unless another is named


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiPrice:
    """Dollars per million tokens of one model. source: the package and its version. as_of: the latest change that its
    list has a day of, so that the list is at least as new; None where it is not from there.

    cached_usd_per_mtok: of input that its cache holds; batch_discount: what answers within a day cost over others'.
    None where there is none.
    """

    name: str
    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    source: str
    cached_usd_per_mtok: Decimal | None = None
    batch_discount: Decimal | None = None
    as_of: date | None = None


def api_price(
    provider: str | None, model: str, at: datetime | None = None, *, prompt_tokens: int = SHORT_PROMPT
) -> ApiPrice | None:
    """The price of a model at a time (None: now); None where it, or the package, is not known: never 0.

    prompt_tokens: of a request, where prices come in tiers of it.
    """
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return None
    when = at or datetime.now(UTC)

    def price(usage: Any) -> Any:
        return calc_price(usage, model_ref=model, provider_id=provider, genai_request_timestamp=when)

    try:
        found = price(Usage(input_tokens=prompt_tokens, output_tokens=1))
    except LookupError:
        return None
    try:
        cached = price(Usage(input_tokens=prompt_tokens, cache_read_tokens=prompt_tokens, output_tokens=0)).input_price
    except (LookupError, ValueError):
        cached = found.input_price
    own, kept = (Decimal(part) * MTOK / prompt_tokens for part in (found.input_price, cached))
    return ApiPrice(
        name=f"{found.provider.name} {found.model.name or model}",
        input_usd_per_mtok=own,
        output_usd_per_mtok=Decimal(found.output_price) * MTOK,
        source=f"genai-prices {metadata.version('genai-prices')}",
        cached_usd_per_mtok=kept if kept != own else None,
        batch_discount=BATCH.get(found.provider.id),
        as_of=_latest_change(when.date()),
    )


@cache
def _latest_change(until: date) -> date | None:
    """The list itself has no day; some of its prices are known to begin on one."""
    from genai_prices.data_snapshot import get_snapshot

    days = [
        start
        for provider in get_snapshot().providers
        for model in provider.models
        for price in (model.prices if isinstance(model.prices, list) else ())
        if (start := getattr(price.constraint, "start_date", None)) is not None and start <= until
    ]
    return max(days, default=None)


def named_price(name: str, at: datetime | None = None, *, prompt_tokens: int = SHORT_PROMPT) -> ApiPrice:
    """The price of `MODEL` or `MODEL@PROVIDER`. Raises ConfigError with near names, or how to get the package."""
    try:
        import genai_prices  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"API prices of {name!r}: needs the package genai-prices: pip install 'halve[serve]'"
        ) from error
    model, _, provider = name.strip().partition("@")
    maker = provider or next((of for start, of in MAKERS.items() if model.lower().startswith(start)), None)
    found = api_price(maker, model, at, prompt_tokens=prompt_tokens) if model else None
    if found is None:
        known = known_models(maker)
        alike = sorted((one for one in known if model and model.lower() in one.lower()), key=len)[:6]
        hint = f"; {maker or 'it'} has {', '.join(alike)};" if alike else nearest(model, known) or ";"
        if maker and not known:
            hint = f"; no provider {maker!r}{nearest(maker, providers()) or ';'}"
        raise ConfigError(
            f"API {name!r}: no such price{hint} write MODEL or MODEL@PROVIDER, such as llama-3.1-8b-instant@groq"
        )
    return found


def providers() -> list[str]:
    """Ids of all providers of the list."""
    from genai_prices.data_snapshot import get_snapshot

    return [provider.id for provider in get_snapshot().providers]


def known_models(provider: str | None) -> Sequence[str]:
    """Ids of a provider's models, of all without one."""
    from genai_prices.data_snapshot import get_snapshot

    every = get_snapshot().providers
    return [model.id for one in every if provider in (None, one.id) for model in one.models]
