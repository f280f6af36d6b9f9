"""A product's file, read by strict rules: unknown keys, impossible values and contradictions are named with a way out.

Money of customers (`price_per_seat`, `other_costs`, `tenants`) is in the product's currency and kept in dollars at its
stated rate; prices of tokens and machines are in dollars, as their names say.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from halve.core.errors import ConfigError
from halve.core.record import shown
from halve.economics.api_prices import ApiPrice
from halve.economics.currency import Currency, find_currency, read_rates
from halve.economics.fields import Section, read_number, read_share
from halve.economics.product import (
    ApiCut,
    Compression,
    Demand,
    Growth,
    Machines,
    Product,
    Scenario,
    Source,
    Tenant,
    TokenPrices,
)

MOST_USD_PER_MTOK = 100_000
MOST_USD_PER_HOUR = 1_000_000
PriceOf = Callable[[str, str], ApiPrice | None]
_TOP = (
    "name currency price_per_seat seats requests_per_seat tokens source compression other_costs api_price_cut demand "
    "growth ranges tenants scenarios rates"
).split()
_REQUIRED = "price_per_seat seats requests_per_seat tokens source".split()
DRIVERS = (
    "price_per_seat seats requests_per_seat tokens.prompt tokens.cached tokens.answer other_costs.per_seat "
    "other_costs.per_month source.input_usd_per_mtok source.cached_input_usd_per_mtok source.output_usd_per_mtok "
    "source.usd_per_hour source.prefill_tok_s source.decode_tok_s source.utilization source.operator_usd_per_month"
).split()


def read_product(
    raw: Any, *, price_of: PriceOf | None = None, rates: Mapping[str, Currency] | None = None, name: str = "product"
) -> Product:
    """A product from what YAML or JSON gave.

    price_of: the price of an API's model by provider and model. rates: stated beside the file; they win over its own.
    name: of a file that doesn't say one. Raises ConfigError naming key, value, rule and way out.
    """
    return _Reader(price_of or (lambda provider, model: None), dict(rates or {}), name).read(raw)


class _Reader:
    def __init__(self, price_of: PriceOf, rates: dict[str, Currency], name: str) -> None:
        self._price_of, self._rates, self._name = price_of, rates, name

    def read(self, raw: Any, *, nested: bool = False) -> Product:
        top = Section(raw, "", _TOP, _REQUIRED)
        rates = {**(read_rates(top.get("rates")) if top.has("rates") else {}), **self._rates}
        currency = find_currency(top.text("currency", "USD"), rates)
        tokens = Section(top.get("tokens"), "tokens", ["prompt", "cached", "answer"], ["prompt", "answer"])
        other = Section(top.get("other_costs") or {}, "other_costs", ["per_seat", "per_month", "payment_share"])
        seats, requests = (top.number(key, high=10**10) for key in ("seats", "requests_per_seat"))
        prompt, answer = (tokens.number(key, high=10**8) for key in ("prompt", "answer"))
        for key, value in (("seats", seats), ("requests_per_seat", requests), ("tokens", prompt + answer)):
            if not value:
                raise ConfigError(f"{key}: 0 is no volume, and of nothing there is no margin; give a number above 0")
        price = top.number("price_per_seat", high=10**9)
        if not price:
            raise ConfigError("price_per_seat: 0 is no revenue, and of that there is no margin; give a price above 0")
        source = self._source(top.get("source"), "source")
        product = Product(
            name=top.text("name", self._name) or self._name,
            currency=currency,
            usd_per_seat=currency.to_usd(price),
            seats=seats,
            requests_per_seat=requests,
            prompt_tokens=prompt,
            cached=tokens.share("cached", 0),
            answer_tokens=answer,
            source=source,
            compression=self._compression(top.get("compression"), source),
            other_usd_per_seat=currency.to_usd(other.number("per_seat", 0, high=10**9)),
            other_usd_per_month=currency.to_usd(other.number("per_month", 0)),
            payment_share=other.share("payment_share", 0),
            api_cut=self._api_cut(top.get("api_price_cut"), source),
            demand=_demand(top.get("demand")),
            growth=_growth(top.get("growth")),
            ranges=_ranges(top.get("ranges"), currency),
            tenants=_tenants(top.get("tenants"), currency, currency.to_usd(price)),
            scenarios=() if nested else self._scenarios(top.get("scenarios"), raw),
            rates=rates,
            given=frozenset(_paths(raw)),
        )
        product.source.usd(product.traffic)  # a cached share needs its price
        return product

    def _source(self, raw: Any, where: str) -> Source:
        kinds = ["api", "machines", "self_hosted"]
        section = Section(raw, where, kinds)
        given = [kind for kind in kinds if section.has(kind)]
        if len(given) != 1:
            raise ConfigError(f"{where}: give one of {', '.join(kinds)}; there {'are' if given else 'is'} "
                              f"{' and '.join(given) or 'none'}")  # fmt: skip
        readers: dict[str, Callable[[Any, str], Source]] = {
            "api": self._api,
            "machines": _machines,
            "self_hosted": _self_hosted,
        }
        return readers[given[0]](section.get(given[0]), f"{where}.{given[0]}")

    def _api(self, raw: Any, where: str) -> TokenPrices:
        keys = ["model", "input_usd_per_mtok", "cached_input_usd_per_mtok", "output_usd_per_mtok", "as_of"]
        section = Section(raw, where, keys)
        model, stated = section.text("model"), _usd_per_mtok(section)
        given = [key for key in keys[1:4:2] if key in stated]
        if len(given) == 2:
            origin = f"stated in the file{_as_of(section)}"
            return TokenPrices(
                kind="api",
                name=model or "API",
                input_usd_per_mtok=stated[keys[1]],
                output_usd_per_mtok=stated[keys[3]],
                cached_input_usd_per_mtok=stated.get(keys[2]),
                origin=origin,
            )
        if given or not model:
            raise ConfigError(
                f"{where}: give model: PROVIDER/MODEL, such as openai/gpt-5-mini, or both input_usd_per_mtok and "
                "output_usd_per_mtok"
            )
        provider, _, name = model.partition("/")
        price = self._price_of(provider, name) if name else None
        if price is None:
            raise ConfigError(
                f"{where}.model: {shown(model)} has no known price; write it as PROVIDER/MODEL, such as "
                "openai/gpt-5-mini, with the package genai-prices installed (halve[serve]), or state "
                "input_usd_per_mtok and output_usd_per_mtok"
            )
        return TokenPrices(
            kind="api",
            name=price.name,
            input_usd_per_mtok=price.input_usd_per_mtok,
            output_usd_per_mtok=price.output_usd_per_mtok,
            cached_input_usd_per_mtok=stated.get(keys[2], listed_cached_price(price)),
            origin=price.source,
        )

    def _compression(self, raw: Any, source: Source) -> Compression | None:
        if raw is None:
            return None
        keys = "cost_ratio prefill_speedup decode_speedup source quality_loss one_time_usd origin".split()
        section = Section(raw, "compression", keys)
        ways = [
            section.has("cost_ratio"),
            section.has("prefill_speedup") or section.has("decode_speedup"),
            section.has("source"),
        ]
        if sum(ways) != 1:
            raise ConfigError(
                "compression: give one of cost_ratio (of tokens priced by the million), prefill_speedup with "
                "decode_speedup (of machines), or a source of its own"
            )
        if section.has("source"):
            after = self._source(section.get("source"), "compression.source")
        elif isinstance(source, Machines):
            if not section.has("decode_speedup") or not section.has("prefill_speedup"):
                raise ConfigError(
                    "compression: tokens come from machines, so give prefill_speedup and decode_speedup (halve bench "
                    "measures both), or a source of its own"
                )
            prefill, decode = (section.number(f"{k}_speedup", low=Decimal("0.01"), high=100) for k in _PHASES)
            after = replace(
                source, prefill_tok_s=source.prefill_tok_s * prefill, decode_tok_s=source.decode_tok_s * decode
            )
        elif source.kind == "api":
            raise ConfigError(
                "compression: tokens come from an API, whose price no compression of yours changes; give "
                "compression.source, what your own smaller model would run on"
            )
        elif not section.has("cost_ratio"):
            raise ConfigError("compression: tokens are priced by the million, so give cost_ratio, or a source")
        else:
            ratio = section.number("cost_ratio", low=Decimal("0.001"), high=10)
            cached = source.cached_input_usd_per_mtok
            after = replace(
                source,
                input_usd_per_mtok=source.input_usd_per_mtok * ratio,
                output_usd_per_mtok=source.output_usd_per_mtok * ratio,
                cached_input_usd_per_mtok=None if cached is None else cached * ratio,
            )
        return Compression(
            source=after,
            quality_loss=section.share("quality_loss", low=-1) if section.has("quality_loss") else None,
            one_time_usd=section.number("one_time_usd", 0),
            origin=section.text("origin", "stated in the file"),
        )

    def _api_cut(self, raw: Any, source: Source) -> ApiCut:
        section = Section(raw or {}, "api_price_cut", ["cut", "pass_through", "reference"])
        reference = source if isinstance(source, TokenPrices) and source.kind == "api" else None
        if section.has("reference"):
            reference = self._api(section.get("reference"), "api_price_cut.reference")
        pass_through = section.share("pass_through", 0)
        if pass_through and reference is None:
            raise ConfigError(
                "api_price_cut: pass_through needs a reference, the API whose price falls: "
                "reference: {model: openai/gpt-5-mini}"
            )
        return ApiCut(cut=section.share("cut", Decimal("0.3")), pass_through=pass_through, reference=reference)

    def _scenarios(self, raw: Any, whole: Mapping[str, Any]) -> tuple[Scenario, ...]:
        if raw is None:
            return ()
        if not isinstance(raw, list):
            raise ConfigError(f"scenarios: {shown(raw)} must be a list of {{name, set}}")
        found = []
        for i, one in enumerate(raw):
            section = Section(one, f"scenarios[{i}]", ["name", "set", "compressed"], ["name", "set"])
            compressed = section.get("compressed") or False
            if not isinstance(compressed, bool):
                raise ConfigError(f"scenarios[{i}].compressed: {shown(compressed)} must be true or false")
            values = section.get("set")
            if not isinstance(values, Mapping) or not values:
                raise ConfigError(f"scenarios[{i}].set: {shown(values)} must hold lines such as tokens.answer: 400")
            changed = _with({k: v for k, v in whole.items() if k != "scenarios"}, values, f"scenarios[{i}].set")
            try:
                product = self.read(changed, nested=True)
            except ConfigError as error:
                raise ConfigError(f"scenarios[{i}] ({section.text('name')}): {error}") from error
            if compressed and product.compression is None:
                raise ConfigError(f"scenarios[{i}].compressed: there is no section compression to take it from")
            found.append(Scenario(name=section.text("name"), product=product, compressed=compressed))
        return tuple(found)


_PHASES = ("prefill", "decode")


def listed_cached_price(price: ApiPrice) -> Decimal | None:
    """Of input that an API's cache holds, where the list tells it."""
    known: Decimal | None = getattr(price, "cached_usd_per_mtok", None)
    return known


def _paths(raw: Mapping[str, Any]) -> Iterator[str]:
    """Keys, and those of the sections below them."""
    for key, value in raw.items():
        if value is not None:
            yield str(key)
            if isinstance(value, Mapping):
                yield from (f"{key}.{inner}" for inner in value if value[inner] is not None)


def _with(raw: Mapping[str, Any], values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """A copy with some values set, each by its path (`tokens.answer`). Sections that are not there are made."""
    result = dict(raw)
    for path, value in values.items():
        first, _, rest = str(path).partition(".")
        if rest:
            inner = result.get(first) or {}
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{where}.{path}: {first} is not a section")
            result[first] = _with(inner, {rest: value}, f"{where}.{first}")
        else:
            result[first] = value
    return result


def _usd_per_mtok(section: Section) -> dict[str, Decimal]:
    names = [f"{kind}_usd_per_mtok" for kind in ("input", "cached_input", "output")]
    return {name: section.number(name, high=MOST_USD_PER_MTOK) for name in names if section.has(name)}


def _as_of(section: Section) -> str:
    return f", {section.get('as_of')}" if section.has("as_of") else ", no date given"


def _self_hosted(raw: Any, where: str) -> TokenPrices:
    required = ["input_usd_per_mtok", "output_usd_per_mtok"]
    section = Section(raw, where, ["name", "cached_input_usd_per_mtok", "as_of", *required], required)
    stated = _usd_per_mtok(section)
    return TokenPrices(
        kind="self_hosted",
        name=section.text("name", "own machines"),
        input_usd_per_mtok=stated["input_usd_per_mtok"],
        output_usd_per_mtok=stated["output_usd_per_mtok"],
        # A token that is found in the cache takes no step of the machine.
        cached_input_usd_per_mtok=stated.get("cached_input_usd_per_mtok", Decimal(0)),
        origin=f"stated in the file{_as_of(section)}",
    )


def _machines(raw: Any, where: str) -> Machines:
    required = ["usd_per_hour", "prefill_tok_s", "decode_tok_s", "utilization"]
    section = Section(raw, where, ["name", "minimum", "spare", "operator_usd_per_month", "as_of", *required], required)
    least = Decimal("0.001")
    return Machines(
        name=section.text("name", "own machines"),
        usd_per_hour=section.number("usd_per_hour", high=MOST_USD_PER_HOUR),
        prefill_tok_s=section.number("prefill_tok_s", low=least),
        decode_tok_s=section.number("decode_tok_s", low=least),
        utilization=section.share("utilization", low=least),
        minimum=section.whole("minimum", 1, high=1_000_000),
        spare=section.whole("spare", 0, high=1_000_000),
        operator_usd_per_month=section.number("operator_usd_per_month", 0),
        origin=f"stated in the file{_as_of(section)}",
    )


def _demand(raw: Any) -> Demand:
    section = Section(raw or {}, "demand", ["elasticity", "pass_through", "seat_elasticity"])
    return Demand(
        elasticity=section.number("elasticity", 1, high=5),
        pass_through=section.share("pass_through", 0),
        seat_elasticity=section.number("seat_elasticity", 0, high=5),
    )


def _growth(raw: Any) -> Growth:
    section = Section(raw or {}, "growth", ["seats_per_month", "requests_per_month", "api_price_per_year", "months"])
    low = Decimal("-0.99")
    return Growth(
        seats_per_month=section.share("seats_per_month", 0, low=low, high=10),
        requests_per_month=section.share("requests_per_month", 0, low=low, high=10),
        api_price_per_year=section.share("api_price_per_year", 0, low=low, high=10),
        months=section.whole("months", 12, low=1, high=120),
    )


def _ranges(raw: Any, currency: Currency) -> dict[str, Decimal | tuple[Decimal, Decimal]]:
    section = Section(raw or {}, "ranges", DRIVERS)
    found: dict[str, Decimal | tuple[Decimal, Decimal]] = {}
    for name in DRIVERS:
        value = section.get(name)
        if value is None:
            continue
        where = section.path(name)
        if isinstance(value, list):
            if len(value) != 2:
                raise ConfigError(f"{where}: {shown(value)} must be [low, high], or a share such as 20%")
            share = name in ("tokens.cached", "source.utilization")
            money = name in ("price_per_seat", "other_costs.per_seat", "other_costs.per_month")
            low, high = ((read_share if share else read_number)(one, where) for one in value)
            if low >= high:
                raise ConfigError(f"{where}: {shown(value)} must be [low, high], the low end first")
            found[name] = (currency.to_usd(low), currency.to_usd(high)) if money else (low, high)
        else:
            found[name] = read_share(value, where, low=Decimal("0.001"), high=Decimal("0.999"))
    return found


def _tenants(raw: Any, currency: Currency, usd_per_seat: Decimal) -> dict[str, Tenant]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"tenants: {shown(raw)} must hold lines such as acme: {{seats: 40}}")
    found = {}
    for name, value in raw.items():
        section = Section(value, f"tenants.{name}", ["seats", "price_per_seat"], ["seats"])
        price = currency.to_usd(section.number("price_per_seat", high=10**9)) if section.has("price_per_seat") else None
        found[str(name)] = Tenant(
            seats=section.number("seats", high=10**10), usd_per_seat=usd_per_seat if price is None else price
        )
    return found
