"""What closed APIs ask for a million tokens: from the package genai-prices, which brings its list along."""

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from importlib import metadata

MTOK = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiPrice:
    """Dollars per million tokens of one model. source: the package and its version, which dates the list."""

    name: str
    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    source: str


def api_price(provider: str, model: str, at: datetime | None = None) -> ApiPrice | None:
    """The price of a model at a time (None: now); None where it, or the package, is not known: never 0."""
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return None
    when = at or datetime.now(UTC)
    try:
        # Of one token each: prices in tiers are those of short prompts.
        found = calc_price(
            Usage(input_tokens=1, output_tokens=1), model_ref=model, provider_id=provider, genai_request_timestamp=when
        )
    except LookupError:
        return None
    return ApiPrice(
        name=f"{found.provider.name} {found.model.name or model}",
        input_usd_per_mtok=Decimal(found.input_price) * MTOK,
        output_usd_per_mtok=Decimal(found.output_price) * MTOK,
        source=f"genai-prices {metadata.version('genai-prices')}",
    )
