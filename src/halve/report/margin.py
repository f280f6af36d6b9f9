"""A product's margin as one HTML page, in English and Japanese, in any currency with a stated rate.

Figures on the page are rounded for people; every table has what its last column was computed from, so that it
recomputes in a spreadsheet, and `--json` and `--csv` hold all digits.
"""

from collections.abc import Sequence
from decimal import Decimal

from markupsafe import Markup

from halve.economics.currency import Currency
from halve.economics.margin import ScenarioRow
from halve.economics.outlook import DemandResponse, Month
from halve.economics.product import Product
from halve.economics.sensitivity import Bar
from halve.economics.tenants import Books
from halve.report import margin_charts as charts
from halve.report import margin_grids as grids
from halve.report.charts import both
from halve.report.filling import fill
from halve.report.languages import STYLE, Both, Language, in_both, switch
from halve.report.margin_words import (
    CASES,
    DRIVERS,
    Words,
    case_words,
    count,
    find_row,
    margin_sentence,
    quality_words,
    share,
    span_words,
)


def render_margin(
    *,
    product: Product,
    currency: Currency,
    rows: Sequence[ScenarioRow],
    bars: Sequence[Bar],
    demand: DemandResponse | None,
    demand_curve: Sequence[tuple[Decimal, DemandResponse]],
    months: Sequence[Month],
    payback: Decimal | None,
    books: Books | None,
    created: str,
    language: Language | str,
) -> str:
    """The page. It loads nothing and has no script; the switch of language is style alone."""
    words = Words(currency)
    chosen: Language = "ja" if language == "ja" else "en"
    return fill(
        "margin",
        title=product.name,
        language=chosen,
        switch=switch(chosen),
        style=Markup(STYLE),
        created=created,
        currency=_currency_words(currency),
        sentence=margin_sentence(rows, demand),
        headlines=_headlines(rows, words, payback),
        scenario_chart=in_both(lambda lang: both(lambda width: _scenario_chart(rows, lang, width))),
        scenarios=grids.scenarios_grid(rows, words),
        tornado_chart=in_both(lambda lang: both(lambda width: _tornado_chart(rows, bars, words, lang, width))),
        sensitivity=grids.sensitivity_grid(bars, words),
        demand_chart=demand and in_both(lambda lang: both(lambda width: _demand_chart(demand, words, lang, width))),
        demand_words=demand and _demand_words(product, demand, words),
        demand=grids.demand_grid(demand_curve, words),
        month_chart=in_both(lambda lang: both(lambda width: _month_chart(months, lang, width))),
        months=grids.months_grid(months, words),
        tenants=books and grids.accounts_grid(books.tenants, Both("tenant", "テナント"), words),
        models=books and grids.accounts_grid(books.models, Both("model or adapter", "モデル・アダプター"), words),
        book_words=books and _book_words(books, words),
        inputs=grids.inputs_grid(product, words),
    )


def _currency_words(currency: Currency) -> Both:
    if currency.as_of is None:
        return Both("amounts in US dollars", "金額は米ドル")
    return Both(f"amounts in {currency.code}; {currency.stated}", f"金額は {currency.code}; {currency.stated}")


def _headlines(rows: Sequence[ScenarioRow], words: Words, payback: Decimal | None) -> list[tuple[Both, str, Both]]:
    now, smaller = rows[0].statement, find_row(rows, "compressed")
    found = [
        (
            Both("Gross margin now", "現在の粗利率"),
            share(now.gross_margin),
            Both(
                f"{words.money(now.gross_profit_usd)} of {words.money(now.revenue_usd)} a month",
                f"月間売上 {words.money(now.revenue_usd)} のうち {words.money(now.gross_profit_usd)}",
            ),
        )
    ]
    if smaller is not None:
        saved = now.token_usd - smaller.statement.token_usd
        line = Both(
            f"{words.money(saved)} a month less for tokens at the same use; loss of quality: "
            f"{quality_words(smaller).en}",
            f"同じ利用量でトークン費用が月 {words.money(saved)} 減少。品質低下: {quality_words(smaller).ja}",
        )
        if payback:
            line += Both(f"; pays back in {count(payback)} months", f"。回収期間 {count(payback)} か月")
        found.append((Both("After compression", "圧縮後"), share(smaller.statement.gross_margin), line))
    most = rows[0].most_requests_per_seat
    limit = (
        Both("a seat earns however much it asks", "利用量にかかわらず黒字")
        if most is None
        else Both("every seat loses money", "どの席も赤字")
        if most < 0
        else Both(f"a seat earns up to {most:,} requests a month", f"1 席あたり月 {most:,} リクエストまで黒字")
    )
    found.append((Both("Tokens of revenue", "売上に占めるトークン費用"), share(now.token_share), limit))
    return found


def _scenario_chart(rows: Sequence[ScenarioRow], lang: Language, width: int) -> Markup:
    steps = [
        charts.Step(
            name=case_words(row).of(lang),
            said=share(row.statement.gross_margin),
            value=float(row.statement.gross_margin),
            kind=2 if row.compressed else 0,
        )
        for row in rows
    ]
    return charts.bars(steps, Both("Gross margin of each scenario", "シナリオ別の粗利率").of(lang), width)


SHOWN_BARS = 10


def _tornado_chart(
    rows: Sequence[ScenarioRow], bars: Sequence[Bar], words: Words, lang: Language, width: int
) -> Markup:
    ranges = [
        charts.Range(
            name=DRIVERS[bar.driver].of(lang),
            values=f"{words.driver(bar.driver, bar.low)} … {words.driver(bar.driver, bar.high)}",
            at_low=float(bar.at_low),
            at_high=float(bar.at_high),
        )
        for bar in bars[:SHOWN_BARS]
    ]
    said = (
        Both("Gross margin at the ends of each driver's range", "各要因の範囲の両端での粗利率"),
        Both("gross margin", "粗利率"),
        Both("driver at its low value", "要因が低い値のとき"),
        Both("driver at its high value", "要因が高い値のとき"),
    )
    titles = (said[0].of(lang), said[1].of(lang), said[2].of(lang), said[3].of(lang))
    return charts.tornado(ranges, float(rows[0].statement.gross_margin), titles, width)


def _demand_chart(demand: DemandResponse, words: Words, lang: Language, width: int) -> Markup:
    names = (
        (Both("saved at the same use", "同じ利用量での節約"), demand.saved_usd, 2),
        (Both("spent on more tokens", "追加のトークン"), demand.more_tokens_usd, 5),
        (Both("given as a lower price", "値下げ"), demand.lower_price_usd, 1),
        (Both("from more seats", "席数の増加"), demand.more_seats_usd, 4),
    )
    steps = [
        charts.Step(name=name.of(lang), said=words.money(value), value=float(value), kind=kind)
        for name, value, kind in names
    ]
    kept = Both("kept as gross profit", "粗利として残る").of(lang)
    steps.append(
        charts.Step(name=kept, said=words.money(demand.kept_usd), value=float(demand.kept_usd), kind=0, is_sum=True)
    )
    return charts.steps(steps, Both("Where the saving goes, a month", "節約額の行き先 (月額)").of(lang), width)


def _demand_words(product: Product, demand: DemandResponse, words: Words) -> Both:
    e, per = count(product.demand.elasticity), demand.requests_per_seat
    return Both(
        f"A request costs {share(demand.cost_per_request_ratio, 1)} of what it did. At an elasticity of {e}, requests "
        f"per seat go from {count(product.requests_per_seat)} to {count(per)}; the price of a seat goes from "
        f"{words.money(product.usd_per_seat)} to {words.money(demand.usd_per_seat)}, seats from "
        f"{count(product.seats)} to {count(demand.after.seats)}.",
        f"1 リクエストの費用は元の {share(demand.cost_per_request_ratio, 1)} になります。弾力性 {e} では、1 席あたりの"
        f"リクエスト数は {count(product.requests_per_seat)} から {count(per)} に、価格は "
        f"{words.money(product.usd_per_seat)} から {words.money(demand.usd_per_seat)} に、席数は "
        f"{count(product.seats)} から {count(demand.after.seats)} になります。",
    )


def _month_chart(months: Sequence[Month], lang: Language, width: int) -> Markup:
    series: list[tuple[str, int, list[float]]] = [
        (CASES["now"].of(lang), 0, [float(month.now.gross_margin) for month in months])
    ]
    smaller = [float(month.compressed.gross_margin) for month in months if month.compressed is not None]
    if smaller:
        series.append((CASES["compressed"].of(lang), 2, smaller))
    words = (
        Both("Gross margin month by month", "月別の粗利率").of(lang),
        Both("months from now", "今からの月数").of(lang),
        Both("gross margin", "粗利率").of(lang),
    )
    return charts.months(series, words, width)


def _book_words(books: Books, words: Words) -> Both:
    total = words.money(Decimal(books.total_micro_usd) / 1_000_000)
    span = span_words(books.seconds)
    text = Both(
        f"From the ledger of {span.en}: {total} in all, idle time spread over everyone in proportion to what they "
        "used. Fixed costs of the product are nobody's and are not in here.",
        f"{span.ja}分の台帳による。合計 {total}。待機時間は利用額の割合で全員に配分。製品全体の固定費は含みません。",
    )
    if books.missing:
        names = ", ".join(books.missing)
        text += Both(f" Without a request in this time: {names}.", f"この期間にリクエストのないテナント: {names}。")
    return text
