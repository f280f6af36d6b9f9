"""A product's margin as one HTML page, in English and Japanese, in any currency with a stated rate.

Figures on the page are rounded for people; every table has what its last column was computed from, so that it
recomputes in a spreadsheet, and `--json` and `--csv` hold all digits.
"""

from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from halve.economics.currency import Currency
from halve.economics.margin import Bar, DemandResponse, Month, ScenarioRow
from halve.economics.product import Machines, Product, Source
from halve.economics.tenants import Account, Books
from halve.report import margin_charts as charts
from halve.report.charts import both
from halve.report.languages import STYLE, Both, Grid, Language, in_both, same, switch
from halve.report.words import printable

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


class _Words:
    """Figures of one page, in its currency."""

    def __init__(self, currency: Currency) -> None:
        self._currency = currency

    def money(self, usd: Decimal | None) -> str:
        return "—" if usd is None else self._currency.say(usd)

    def price(self, usd: Decimal) -> str:
        return self._currency.say_price(usd)

    def per_mtok(self, usd: Decimal | None) -> Both:
        return UNKNOWN if usd is None else same(self.price(usd))

    def driver(self, name: str, value: Decimal) -> str:
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
    words = _Words(currency)
    chosen: Language = "ja" if language == "ja" else "en"
    html = _template().render(
        title=product.name,
        language=chosen,
        switch=switch(chosen),
        style=Markup(STYLE),
        created=created,
        currency=_currency_words(currency),
        sentence=margin_sentence(rows, demand),
        headlines=_headlines(rows, words, payback),
        scenario_chart=in_both(lambda lang: both(lambda width: _scenario_chart(rows, lang, width))),
        scenarios=_scenarios(rows, words),
        tornado_chart=in_both(lambda lang: both(lambda width: _tornado_chart(rows, bars, words, lang, width))),
        sensitivity=_sensitivity(bars, words),
        demand_chart=demand and in_both(lambda lang: both(lambda width: _demand_chart(demand, words, lang, width))),
        demand_words=demand and _demand_words(product, demand, words),
        demand=_demand(demand_curve, words),
        month_chart=in_both(lambda lang: both(lambda width: _month_chart(months, lang, width))),
        months=_months(months, words),
        tenants=books and _accounts(books.tenants, Both("tenant", "テナント"), words),
        models=books and _accounts(books.models, Both("model or adapter", "モデル・アダプター"), words),
        book_words=books and _book_words(books, words),
        inputs=_inputs(product, words),
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
    return environment.get_template("margin.html.j2")


def _currency_words(currency: Currency) -> Both:
    if currency.as_of is None:
        return Both("amounts in US dollars", "金額は米ドル")
    return Both(f"amounts in {currency.code}; {currency.stated}", f"金額は {currency.code}; {currency.stated}")


def _find(rows: Sequence[ScenarioRow], case: str) -> ScenarioRow | None:
    return next((row for row in rows if row.case == case), None)


def margin_sentence(rows: Sequence[ScenarioRow], demand: DemandResponse | None) -> Both:
    """What it all comes to."""
    now, smaller = rows[0].statement, _find(rows, "compressed")
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


def _headlines(rows: Sequence[ScenarioRow], words: _Words, payback: Decimal | None) -> list[tuple[Both, str, Both]]:
    now, smaller = rows[0].statement, _find(rows, "compressed")
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


def _scenarios(rows: Sequence[ScenarioRow], words: _Words) -> Grid:
    heads = (
        Both("scenario", "シナリオ"),
        Both("#seats", "#席数"),
        Both("#requests", "#リクエスト数"),
        Both("#revenue", "#売上"),
        Both("#tokens", "#トークン費用"),
        Both("#other costs", "#その他費用"),
        Both("#gross profit", "#粗利"),
        Both("#gross margin", "#粗利率"),
        Both("#machines", "#マシン数"),
        Both("loss of quality", "品質低下"),
    )
    cells = []
    for row in rows:
        one = row.statement
        cells.append(
            (
                case_words(row),
                same(count(one.seats)),
                same(count(one.requests)),
                same(words.money(one.revenue_usd)),
                same(words.money(one.token_usd)),
                same(words.money(one.cost_usd - one.token_usd)),
                same(words.money(one.gross_profit_usd)),
                same(share(one.gross_margin)),
                same(count(one.machines)),
                quality_words(row),
            )
        )
    return Grid(name=Both("Scenarios, dollars a month", "シナリオ (月額)"), heads=heads, rows=tuple(cells))


SHOWN_BARS = 10


def _tornado_chart(
    rows: Sequence[ScenarioRow], bars: Sequence[Bar], words: _Words, lang: Language, width: int
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


def _sensitivity(bars: Sequence[Bar], words: _Words) -> Grid:
    heads = (
        Both("driver", "要因"),
        Both("#now", "#現在値"),
        Both("#low", "#低"),
        Both("#high", "#高"),
        Both("#margin at low", "#低での粗利率"),
        Both("#margin at high", "#高での粗利率"),
        Both("#profit at low", "#低での粗利"),
        Both("#profit at high", "#高での粗利"),
    )
    cells = tuple(
        (
            DRIVERS[bar.driver],
            *(same(words.driver(bar.driver, v)) for v in (bar.value, bar.low, bar.high)),
            same(share(bar.at_low)),
            same(share(bar.at_high)),
            same(words.money(bar.profit_at_low)),
            same(words.money(bar.profit_at_high)),
        )
        for bar in bars
    )
    return Grid(name=Both("Sensitivity", "感度"), heads=heads, rows=cells)


def _demand_chart(demand: DemandResponse, words: _Words, lang: Language, width: int) -> Markup:
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


def _demand_words(product: Product, demand: DemandResponse, words: _Words) -> Both:
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


def _demand(curve: Sequence[tuple[Decimal, DemandResponse]], words: _Words) -> Grid:
    heads = (
        Both("#elasticity", "#弾力性"),
        Both("#requests per seat", "#1 席あたりのリクエスト"),
        Both("#saved", "#節約"),
        Both("#more tokens", "#追加トークン"),
        Both("#lower price", "#値下げ"),
        Both("#more seats", "#席数増"),
        Both("#kept", "#残る粗利"),
        Both("#gross margin", "#粗利率"),
    )
    cells = tuple(
        (
            same(count(elasticity)),
            same(count(one.requests_per_seat)),
            *(
                same(words.money(v))
                for v in (one.saved_usd, one.more_tokens_usd, one.lower_price_usd, one.more_seats_usd, one.kept_usd)
            ),
            same(share(one.after.gross_margin)),
        )
        for elasticity, one in curve
    )
    return Grid(name=Both("Response of demand", "需要の反応"), heads=heads, rows=cells)


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


def _months(months: Sequence[Month], words: _Words) -> Grid:
    heads = [
        Both("#month", "#月"),
        Both("#seats", "#席数"),
        Both("#revenue", "#売上"),
        Both("#tokens", "#トークン費用"),
        Both("#gross profit", "#粗利"),
        Both("#gross margin", "#粗利率"),
    ]
    smaller = months[0].compressed is not None
    if smaller:
        heads += [
            Both("#tokens, compressed", "#圧縮後トークン費用"),
            Both("#margin, compressed", "#圧縮後粗利率"),
        ]
    cells = []
    for month in months:
        one = month.now
        row = [
            same(str(month.number)),
            same(count(one.seats)),
            same(words.money(one.revenue_usd)),
            same(words.money(one.token_usd)),
            same(words.money(one.gross_profit_usd)),
            same(share(one.gross_margin)),
        ]
        if month.compressed is not None:
            row += [same(words.money(month.compressed.token_usd)), same(share(month.compressed.gross_margin))]
        cells.append(tuple(row))
    return Grid(name=Both("Months ahead", "今後の月"), heads=tuple(heads), rows=tuple(cells))


def _accounts(accounts: Sequence[Account], head: Both, words: _Words) -> Grid:
    heads = (
        head,
        Both("#requests", "#リクエスト数"),
        Both("#tokens", "#トークン"),
        Both("#usage", "#利用分"),
        Both("#idle", "#待機分"),
        Both("#per million tokens", "#100 万トークンあたり"),
        Both("#revenue", "#売上"),
        Both("#other costs", "#その他費用"),
        Both("#margin", "#利益率"),
    )
    cells = []
    for one in accounts:
        usage, idle = (Decimal(v) / 1_000_000 for v in (one.usage_micro_usd, one.idle_micro_usd))
        at_least = "" if one.cost_known else "≥ "
        cells.append(
            (
                same(one.name) if one.name else Both("without a key", "キーなし"),
                same(f"{one.requests:,}"),
                same(f"{one.tokens:,}"),
                same(at_least + words.money(usage)),
                same(at_least + words.money(idle)),
                words.per_mtok(one.usd_per_mtok),
                UNKNOWN if one.revenue_usd is None else same(words.money(one.revenue_usd)),
                UNKNOWN if one.other_usd is None else same(words.money(one.other_usd)),
                UNKNOWN if one.margin is None else same(share(one.margin)),
            )
        )
    return Grid(name=head, heads=heads, rows=tuple(cells))


def span_words(seconds: Decimal) -> Both:
    """A stretch of time: `30.42 days`, `4.1 minutes`."""
    for unit, en, ja in ((86400, "days", "日"), (3600, "hours", "時間"), (60, "minutes", "分間")):
        if seconds >= unit:
            return Both(f"{seconds / unit:,.2f} {en}", f"{seconds / unit:,.2f} {ja}")
    return Both(f"{seconds:,.1f} seconds", f"{seconds:,.1f} 秒")


def _book_words(books: Books, words: _Words) -> Both:
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


STATED, DEFAULT = Both("stated in the file", "ファイルに記載"), Both("default", "既定値")


def origin_words(origin: str) -> Both:
    """Where a figure is from; what Halve itself says of it is translated, names are not."""
    said = (
        origin.replace(STATED.en, STATED.ja).replace("no date given", "日付なし").replace("certificate of", "証明書:")
    )
    return Both(origin, said)


def _inputs(product: Product, words: _Words) -> Grid:
    rows: list[tuple[Both, Both, Both]] = []

    def add(name: Both, value: str, key: str = "", origin: str = "") -> None:
        source = origin_words(origin) if origin else STATED if key in product.given else DEFAULT
        rows.append((name, same(value), source))

    for driver, value in (
        ("price_per_seat", product.usd_per_seat),
        ("seats", product.seats),
        ("requests_per_seat", product.requests_per_seat),
        ("tokens.prompt", product.prompt_tokens),
        ("tokens.cached", product.cached),
        ("tokens.answer", product.answer_tokens),
        ("other_costs.per_seat", product.other_usd_per_seat),
        ("other_costs.per_month", product.other_usd_per_month),
    ):
        add(DRIVERS[driver], words.driver(driver, value), driver)
    fees = Both("payment fees, of revenue", "決済手数料 (売上比)")
    add(fees, share(product.payment_share), "other_costs.payment_share")
    for name, said, origin in source_inputs(product.source, words.price):
        add(name, said, origin=origin)
    if product.compression is not None:
        compression = product.compression
        for name, said, _ in source_inputs(compression.source, words.price):
            add(Both(f"compressed: {name.en}", f"圧縮後: {name.ja}"), said, origin=compression.origin)
        loss = UNKNOWN.en if compression.quality_loss is None else share(compression.quality_loss, 3)
        add(Both("compressed: loss of quality, at most", "圧縮後: 品質低下 (最大)"), loss, origin=compression.origin)
        once = Both("compressed: once", "圧縮: 一時費用")
        add(once, words.money(compression.one_time_usd), "compression.one_time_usd")
    cut, demand, growth = product.api_cut, product.demand, product.growth
    add(Both("API's price cut", "API の値下げ率"), share(cut.cut), "api_price_cut.cut")
    passed = Both("of it passed on to customers", "うち顧客への還元率")
    add(passed, share(cut.pass_through), "api_price_cut.pass_through")
    if cut.reference is not None:
        add(Both("the API of the price cut", "値下げの対象 API"), cut.reference.name, origin=cut.reference.origin)
    add(Both("elasticity of use", "利用の弾力性"), count(demand.elasticity), "demand.elasticity")
    add(Both("saving passed on in the price", "価格への還元率"), share(demand.pass_through), "demand.pass_through")
    add(Both("elasticity of seats", "席数の弾力性"), count(demand.seat_elasticity), "demand.seat_elasticity")
    for name, key in (
        (Both("growth of seats a month", "席数の月次成長率"), "seats_per_month"),
        (Both("growth of requests per seat a month", "1 席の利用の月次成長率"), "requests_per_month"),
        (Both("change of API prices a year", "API 価格の年間変化率"), "api_price_per_year"),
    ):
        add(name, share(getattr(growth, key)), f"growth.{key}")
    heads = (Both("what", "項目"), Both("#value", "#値"), Both("from", "出典"))
    return Grid(name=Both("What went in", "前提"), heads=heads, rows=tuple(rows))


def source_inputs(source: Source, money: Any) -> list[tuple[Both, str, str]]:
    """A source's figures: name, value, origin."""
    name, origin = source.name, source.origin
    if isinstance(source, Machines):
        return [
            (DRIVERS["source.usd_per_hour"], f"{money(source.usd_per_hour)} ({name})", origin),
            (DRIVERS["source.prefill_tok_s"], count(source.prefill_tok_s), origin),
            (DRIVERS["source.decode_tok_s"], count(source.decode_tok_s), origin),
            (DRIVERS["source.utilization"], share(source.utilization, 1), origin),
            (Both("machines at least, and spare", "最少台数と予備"), f"{source.minimum} + {source.spare}", origin),
            (DRIVERS["source.operator_usd_per_month"], money(source.operator_usd_per_month), origin),
        ]
    cached = source.cached_input_usd_per_mtok
    return [
        (DRIVERS["source.input_usd_per_mtok"], f"{money(source.input_usd_per_mtok)} ({name})", origin),
        (DRIVERS["source.cached_input_usd_per_mtok"], "—" if cached is None else money(cached), origin),
        (DRIVERS["source.output_usd_per_mtok"], money(source.output_usd_per_mtok), origin),
    ]
