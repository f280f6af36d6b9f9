"""A product that is sold by the seat and runs on tokens: the records, read from plain values by strict rules.

Money of customers (`price_per_seat`, `other_costs`, `tenants`) is in the product's currency and kept in dollars at its
stated rate; prices of tokens and machines are in dollars, as their names say.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any, Literal

from halve.core.errors import ConfigError
from halve.core.record import shown
from halve.economics.api_prices import MTOK, ApiPrice
from halve.economics.currency import Currency, find_currency, read_rates
from halve.economics.fields import Section, read_number, read_share

HOURS_PER_MONTH = 730  # 365 * 24 / 12
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600
MOST_USD_PER_MTOK = 100_000
MOST_USD_PER_HOUR = 1_000_000
PriceOf = Callable[[str, str], ApiPrice | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Tokens of a month. prompt includes cached."""

    prompt: Decimal
    cached: Decimal
    answer: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPrices:
    """Tokens bought by the million, from an API or at what one's own machines were found to cost.

    cached_input_usd_per_mtok: None where it is not known. origin: where the prices are from, with a date.
    """

    kind: Literal["api", "self_hosted"]
    name: str
    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    cached_input_usd_per_mtok: Decimal | None
    origin: str

    def usd(self, traffic: Traffic) -> Decimal:
        """(prompt - cached) * input + cached * cached input + answer * output, per million.

        10 M prompt tokens, of them 4 M cached, and 2 M of answers at 0.50, 0.05 and 1.50 $:
        6 * 0.50 + 4 * 0.05 + 2 * 1.50 = 6.20 $.
        """
        cached = self.cached_input_usd_per_mtok
        if cached is None and traffic.cached:
            raise ConfigError(
                f"{self.name}: the price of cached input is not known; give cached_input_usd_per_mtok, or cached: 0"
            )
        return (
            (traffic.prompt - traffic.cached) * self.input_usd_per_mtok
            + traffic.cached * (cached or 0)
            + traffic.answer * self.output_usd_per_mtok
        ) / MTOK

    def num_machines(self, traffic: Traffic) -> int | None:
        """Nobody counts them here."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Machines that are paid by the hour, around the clock.

    prefill_tok_s, decode_tok_s: tokens a second of one machine that does only that. utilization: the share of the time
    that a service level lets it work. minimum: always on; spare: beside those that the traffic needs.
    """

    name: str
    usd_per_hour: Decimal
    prefill_tok_s: Decimal
    decode_tok_s: Decimal
    utilization: Decimal
    minimum: int = 1
    spare: int = 0
    operator_usd_per_month: Decimal = Decimal(0)
    origin: str = ""
    kind: Literal["machines"] = "machines"

    def busy_s(self, traffic: Traffic) -> Decimal:
        """Seconds of one machine: (prompt - cached) / prefill + answer / decode; a cached token is not computed.

        6 M tokens at 10,000/s and 2 M at 1,000/s: 600 + 2,000 = 2,600 s.
        """
        return (traffic.prompt - traffic.cached) / self.prefill_tok_s + traffic.answer / self.decode_tok_s

    def num_machines(self, traffic: Traffic) -> int:
        """max(minimum, busy seconds / (utilization * seconds of a month), rounded up) + spare.

        2,628,000 s busy at 40 % of 2,628,000: 2.5, so 3; with one spare 4.
        """
        needed = self.busy_s(traffic) / (self.utilization * SECONDS_PER_MONTH)
        return max(self.minimum, int(needed.to_integral_value(ROUND_CEILING))) + self.spare

    def usd(self, traffic: Traffic) -> Decimal:
        """Machines * 730 h * price + operators, whether the machines work or not.

        3 machines at 0.80 $: 3 * 730 * 0.80 = 1,752 $ a month. Utilization is not a factor: it decides how many.
        """
        paid = self.num_machines(traffic) * HOURS_PER_MONTH * self.usd_per_hour
        return paid + self.operator_usd_per_month


Source = TokenPrices | Machines


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """What compressing the model changes: speeds or prices by factors, or the whole source.

    quality_loss: share of the original's quality that is lost at most; None where it is not stated.
    """

    source: Source
    quality_loss: Decimal | None
    one_time_usd: Decimal
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiCut:
    """An API falls in price by `cut`, and customers get `pass_through` of what that spares a competitor's seat."""

    cut: Decimal
    pass_through: Decimal
    reference: TokenPrices | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """How use answers to cheaper tokens. elasticity: of requests per seat to the cost of a request (1: what is saved
    is spent on more). pass_through: share of the saving per seat that its price falls by. seat_elasticity: of seats to
    that price.
    """

    elasticity: Decimal
    pass_through: Decimal
    seat_elasticity: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Shares by which things grow, each month or year; months: how far to look."""

    seats_per_month: Decimal
    requests_per_month: Decimal
    api_price_per_year: Decimal
    months: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """A customer whose key is in the ledger."""

    seats: Decimal
    usd_per_seat: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """The product with other values. compressed: on its compressed source."""

    name: str
    product: "Product"
    compressed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A month of it. prompt_tokens and answer_tokens are of one request, cached a share of the prompt.

    given: paths of the keys that were stated, such as `tokens.cached`; whatever else there is are defaults.
    """

    name: str
    currency: Currency
    usd_per_seat: Decimal
    seats: Decimal
    requests_per_seat: Decimal
    prompt_tokens: Decimal
    cached: Decimal
    answer_tokens: Decimal
    source: Source
    compression: Compression | None
    other_usd_per_seat: Decimal
    other_usd_per_month: Decimal
    payment_share: Decimal
    api_cut: ApiCut
    demand: Demand
    growth: Growth
    ranges: Mapping[str, Decimal | tuple[Decimal, Decimal]]
    tenants: Mapping[str, Tenant]
    scenarios: tuple[Scenario, ...]
    rates: Mapping[str, Currency]
    given: frozenset[str]

    @property
    def requests(self) -> Decimal:
        """Of a month: seats * requests per seat."""
        return self.seats * self.requests_per_seat

    @property
    def traffic(self) -> Traffic:
        """Tokens of a month: requests * tokens of one.

        400 seats of 600 requests are 240,000; at 1,200 + 220 tokens, 30 % cached: 288 M prompt tokens, 86.4 M of them
        cached, and 52.8 M of answers.
        """
        prompt = self.requests * self.prompt_tokens
        return Traffic(prompt=prompt, cached=prompt * self.cached, answer=self.requests * self.answer_tokens)

    def on(self, source: Source) -> "Product":
        """The same product with its tokens from elsewhere."""
        return replace(self, source=source)


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
            cached_input_usd_per_mtok=stated.get(keys[2]),
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
