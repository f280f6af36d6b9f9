"""What tokens cost as one HTML page, in English and Japanese, in any currency with a stated rate.

Every table has what its last columns were computed from, so that it recomputes in a spreadsheet; `halve price --json`
and `--csv` hold all digits.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from halve.economics.currency import Currency
from halve.report import margin_charts as charts
from halve.report.charts import both
from halve.report.languages import STYLE, Both, Grid, Language, in_both, same, switch
from halve.report.words import printable

BASES = {
    "measured": Both("measured", "実測"),
    "scaled": Both("scaled from a measurement", "実測から換算"),
    "roofline": Both("roofline estimate", "ルーフライン推定"),
    "list price": Both("list price", "公表価格"),
}
CASES = {
    "now": Both("now", "現状"),
    "with operators": Both("with operators", "運用者の費用込み"),
    "before compression": Both("before compression", "圧縮前"),
}


def render_costs(
    *,
    title: str,
    currency: Currency,
    rows: Sequence[Mapping[str, Any]],
    even: Sequence[Mapping[str, Any]],
    sentence: str,
    notes: Sequence[str],
    created: str,
    language: str,
) -> str:
    """The page; it loads nothing and has no script. rows, even: as `halve price` and `halve breakeven` tell them."""
    chosen: Language = "ja" if language == "ja" else "en"
    own, rivals = rows[0], rows[1:]
    html = _template().render(
        title=title,
        language=chosen,
        switch=switch(chosen),
        style=Markup(STYLE),
        created=created,
        currency=Both("amounts in US dollars", "金額は米ドル")
        if currency.as_of is None
        else Both(f"amounts in {currency.code}; {currency.stated}", f"金額は {currency.code}; {currency.stated}"),
        sentence=_sentence(own, rivals, currency, sentence),
        chart=in_both(lambda lang: both(lambda width: _chart(rows, currency, lang, width))),
        costs=_costs(rows, currency),
        even=_even(even, currency) if even else None,
        notes=notes,
    )
    return printable(html)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("halve.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["t"] = Both
    return environment.get_template("costs.html.j2")


def _usd(value: Any) -> Decimal:
    return Decimal(str(value))


def interval(row: Mapping[str, Any]) -> tuple[Decimal, Decimal] | None:
    """From the price over the error's factor to the price times it; None for what was measured or is a list price."""
    if row["error_factor"] is None:
        return None
    price, factor = _usd(row["usd_per_mtok"]), _usd(row["error_factor"])
    return price / factor, price * factor


def _said(row: Mapping[str, Any], currency: Currency) -> str:
    said = currency.say_price(_usd(row["usd_per_mtok"]))
    if (between := interval(row)) is None:
        return said
    low, high = (currency.say_price(end.quantize(Decimal("0.0000001"))) for end in between)
    return f"{said} [{low}, {high}]"


def _chart(rows: Sequence[Mapping[str, Any]], currency: Currency, lang: Language, width: int) -> Markup:
    steps = [
        charts.Step(
            name=row["name"],
            said=_said(row, currency),
            value=float(currency.of_usd(_usd(row["usd_per_mtok"]))),
            kind=2 if i == 0 else 0,
        )
        for i, row in enumerate(rows)
    ]
    words = Both("price of a million tokens, prompts and answers together", "100 万トークンの費用 (入力と出力の合計)")
    return charts.bars(steps, words.of(lang), width)


def _sentence(own: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], currency: Currency, sentence: str) -> Both:
    price = currency.say_price(_usd(own["usd_per_mtok"]))
    if not rivals:
        return Both(sentence, f"自前のマシンでは 100 万トークンあたり {price} です (品質: {own['quality']})。")
    best = min(rivals, key=lambda row: row["usd_per_mtok"])
    other = currency.say_price(_usd(best["usd_per_mtok"]))
    if best["usd_per_mtok"] < own["usd_per_mtok"]:
        words = f"API のほうが安価です: {best['name']} は 100 万トークンあたり {other}、自前のマシンは {price}"
    else:
        words = f"自前のマシンのほうが安価です: 100 万トークンあたり {price}、{best['name']} は {other}"
    return Both(sentence, f"{words} (品質: {own['quality']})。")


def _costs(rows: Sequence[Mapping[str, Any]], currency: Currency) -> Grid:
    heads = (
        Both("", ""),
        Both("#input / million", "#入力 100 万"),
        Both("#cached input / million", "#キャッシュ入力 100 万"),
        Both("#output / million", "#出力 100 万"),
        Both("#tokens in", "#入力トークン"),
        Both("#of them cached", "#うちキャッシュ"),
        Both("#tokens out", "#出力トークン"),
        Both("#utilization", "#稼働率"),
        Both("#a request", "#1 リクエスト"),
        Both("#a million tokens", "#100 万トークン"),
        Both("basis", "根拠"),
        Both("quality", "品質"),
        Both("source", "出典"),
    )
    cells = []
    for row in rows:
        money = [
            same(currency.say_price(_usd(row[key])))
            for key in ("input_usd_per_mtok", "cached_input_usd_per_mtok", "output_usd_per_mtok")
        ]
        counts = [same(f"{row[key]:,.1f}") for key in ("prompt_tokens", "cached_tokens", "output_tokens")]
        basis = BASES[row["basis"]]
        if row["error_factor"] is not None:
            basis = basis + f", ×/÷ {row['error_factor']:.2f}"
        cells.append(
            (
                same(row["name"]),
                *money,
                *counts,
                same(f"{row['utilization']:.4g}"),
                same(currency.say_price(_usd(row["usd_per_request"]))),
                same(_said(row, currency)),
                basis,
                same(row["quality"]),
                same(f"{row['source']}; {row['dated']}; {row['kind']}"),
            )
        )
    return Grid(name=Both("Price of tokens", "トークンの費用"), heads=heads, rows=tuple(cells))


def _even(rows: Sequence[Mapping[str, Any]], currency: Currency) -> Grid:
    heads = (
        Both("API", "API"),
        Both("case", "条件"),
        Both("#its price / million", "#API の 100 万トークン"),
        Both("#tokens a month", "#月間トークン"),
        Both("#machines", "#マシン数"),
        Both("#load of each", "#負荷"),
        Both("#a month", "#月額"),
    )
    never = Both("never", "なし")
    cells = []
    for row in rows:
        tokens, load, usd = row["tokens_per_month"], row["load"], row["usd_per_month"]
        cells.append(
            (
                same(row["api"]),
                CASES[row["case"]],
                same(currency.say_price(_usd(row["api_usd_per_mtok"]))),
                never if tokens is None else same(f"{tokens:,.0f}"),
                same("—" if row["machines"] is None else f"{row['machines']:,}"),
                same("—" if load is None else f"{load * 100:.1f} %"),
                same("—" if usd is None else currency.say(_usd(usd))),
            )
        )
    return Grid(name=Both("Break-even", "損益分岐"), heads=heads, rows=tuple(cells))
