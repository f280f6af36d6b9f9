"""Figures of a product's margin in words, in both languages."""

from collections.abc import Sequence
from decimal import Decimal

from halve.economics.currency import Currency
from halve.economics.margin import ScenarioRow
from halve.economics.outlook import DemandResponse
from halve.report.languages import Both, same

UNKNOWN = Both("unknown", "不明")
NONE = same("—")
CASES = {
    "now": Both("now", "現在"),
    "compressed": Both("after compression", "圧縮後"),
    "api_cut": Both("after the API's price cut", "API 値下げ後"),
    "compressed_api_cut": Both("compressed, after the price cut", "圧縮後・API 値下げ後"),
    "seats_x2": Both("twice the seats", "席数 2 倍"),
    "compressed_seats_x2": Both("compressed, twice the seats", "圧縮後・席数 2 倍"),
    "requests_x2": Both("twice the requests per seat", "1 席あたりの利用 2 倍"),
    "compressed_requests_x2": Both("compressed, twice the requests", "圧縮後・利用 2 倍"),
}
DRIVERS = {
    "price_per_seat": Both("price per seat", "1 席の価格"),
    "seats": Both("seats", "席数"),
    "requests_per_seat": Both("requests per seat", "1 席あたりのリクエスト数"),
    "tokens.prompt": Both("prompt tokens per request", "1 リクエストの入力トークン"),
    "tokens.cached": Both("share of the prompt found in cache", "キャッシュで済む入力の割合"),
    "tokens.answer": Both("answer tokens per request", "1 リクエストの出力トークン"),
    "other_costs.per_seat": Both("other costs per seat", "1 席あたりのその他費用"),
    "other_costs.per_month": Both("fixed costs per month", "月額の固定費"),
    "source.input_usd_per_mtok": Both("price of input, per million", "入力 100 万トークンの価格"),
    "source.cached_input_usd_per_mtok": Both(
        "price of cached input, per million", "キャッシュ入力 100 万トークンの価格"
    ),
    "source.output_usd_per_mtok": Both("price of output, per million", "出力 100 万トークンの価格"),
    "source.usd_per_hour": Both("price of a machine, per hour", "マシン 1 時間の価格"),
    "source.prefill_tok_s": Both("tokens of prompts per second", "入力処理速度 (トークン/秒)"),
    "source.decode_tok_s": Both("tokens of answers per second", "出力生成速度 (トークン/秒)"),
    "source.utilization": Both("utilization that the service level allows", "許容される稼働率"),
    "source.operator_usd_per_month": Both("operators, per month", "運用担当の月額費用"),
}
_DOLLARS = {"price_per_seat", "other_costs.per_seat", "other_costs.per_month", "source.usd_per_hour",
            "source.operator_usd_per_month"}  # fmt: skip
_SHARES = {"tokens.cached", "source.utilization"}


def share(value: Decimal | None, places: int = 2) -> str:
    """A share in percent: 0.80682 is `80.68 %`."""
    return "—" if value is None else f"{value * 100:,.{places}f} %".replace("-", "−")


def count(value: Decimal | int | None) -> str:
    """A number of things, whole where it is: `240,000`, `848.5`."""
    if value is None:
        return "—"
    number = Decimal(value)
    text = f"{number:,.0f}" if number == number.to_integral_value() or abs(number) >= 1000 else f"{number:,.2f}"
    return text.replace("-", "−")


def driver_words(name: str, value: Decimal, currency: Currency) -> str:
    """A driver's value: a share, an amount or a number."""
    if name in _SHARES:
        return share(value, 1)
    if name.endswith("_per_mtok") or name == "source.usd_per_hour":
        return currency.say_price(value)
    return currency.say(value) if name in _DOLLARS else count(value)


class Words:
    """Figures of one page, in its currency."""

    def __init__(self, currency: Currency) -> None:
        self._currency = currency

    def money(self, usd: Decimal | None) -> str:
        """An amount, or a dash."""
        return "—" if usd is None else self._currency.say(usd)

    def price(self, usd: Decimal) -> str:
        """A price of a unit."""
        return self._currency.say_price(usd)

    def per_mtok(self, usd: Decimal | None) -> Both:
        """A price of a million tokens, or that it is unknown."""
        return UNKNOWN if usd is None else same(self.price(usd))

    def driver(self, name: str, value: Decimal) -> str:
        """A driver's value."""
        return driver_words(name, value, self._currency)


def case_words(row: ScenarioRow) -> Both:
    """What a row of the scenarios is called."""
    return same(row.name) if row.case == "stated" else CASES[row.case]


def quality_words(row: ScenarioRow) -> Both:
    """The loss of quality that a row comes with; that nobody stated it, where that is so."""
    if not row.compressed:
        return Both("as now", "現在のまま")
    if row.quality_loss is None:
        return Both("not stated", "記載なし")
    return Both(f"at most {share(row.quality_loss, 3)}", f"最大 {share(row.quality_loss, 3)}")


def find_row(rows: Sequence[ScenarioRow], case: str) -> ScenarioRow | None:
    """The row of a case."""
    return next((row for row in rows if row.case == case), None)


def margin_sentence(rows: Sequence[ScenarioRow], demand: DemandResponse | None) -> Both:
    """What it all comes to."""
    now, smaller = rows[0].statement, find_row(rows, "compressed")
    margin, part = share(now.gross_margin), share(now.token_share)
    text = Both(
        f"Gross margin is {margin} now; tokens take {part} of revenue.",
        f"現在の粗利率は {margin}、トークン費用は売上の {part} です。",
    )
    if smaller is not None:
        after = share(smaller.statement.gross_margin)
        loss = quality_words(smaller)
        text += Both(
            f" Compressed it is {after} (loss of quality: {loss.en}).",
            f"圧縮後は {after} (品質低下: {loss.ja}) になります。",
        )
        if smaller.statement.token_usd == now.token_usd and now.machines:
            text += Both(
                f" It saves nothing at this volume, where {_machines(now.machines)} paid before as after.",
                f"この利用量では節約になりません (前後とも {now.machines} 台)。余力が増えます。",
            )
    if demand is not None and demand.spent_share is not None:
        spent = share(demand.spent_share, 0)
        text += Both(
            f" If use follows as stated, {spent} of the saving goes into more tokens.",
            f"利用が想定どおり増えると、節約額の {spent} は追加のトークンに使われます。",
        )
    return text


def _machines(number: int) -> str:
    return "1 machine is" if number == 1 else f"{number} machines are"


def span_words(seconds: Decimal) -> Both:
    """A stretch of time: `30.42 days`, `4.1 minutes`."""
    for unit, en, ja in ((86400, "days", "日"), (3600, "hours", "時間"), (60, "minutes", "分間")):
        if seconds >= unit:
            return Both(f"{seconds / unit:,.2f} {en}", f"{seconds / unit:,.2f} {ja}")
    return Both(f"{seconds:,.1f} seconds", f"{seconds:,.1f} 秒")


STATED, DEFAULT = Both("stated in the file", "ファイルに記載"), Both("default", "既定値")


def origin_words(origin: str) -> Both:
    """Where a figure is from; what Halve itself says of it is translated, names are not."""
    said = (
        origin.replace(STATED.en, STATED.ja).replace("no date given", "日付なし").replace("certificate of", "証明書:")
    )
    return Both(origin, said)
