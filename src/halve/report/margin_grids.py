"""Tables of a product's page: each row holds what its last columns were computed from."""

from collections.abc import Callable, Sequence
from decimal import Decimal

from halve.economics.margin import ScenarioRow
from halve.economics.outlook import DemandResponse, Month
from halve.economics.product import Machines, Product, Source
from halve.economics.sensitivity import Bar
from halve.economics.tenants import Account
from halve.report.languages import Both, Grid, same
from halve.report.margin_words import (
    DEFAULT,
    DRIVERS,
    STATED,
    UNKNOWN,
    Words,
    case_words,
    count,
    origin_words,
    quality_words,
    share,
)


def scenarios_grid(rows: Sequence[ScenarioRow], words: Words) -> Grid:
    """A month of each scenario."""
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


def sensitivity_grid(bars: Sequence[Bar], words: Words) -> Grid:
    """Every driver's ends, and what they come to."""
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


def demand_grid(curve: Sequence[tuple[Decimal, DemandResponse]], words: Words) -> Grid:
    """Where a saving goes, by elasticity."""
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


def months_grid(months: Sequence[Month], words: Words) -> Grid:
    """The months ahead."""
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


def accounts_grid(accounts: Sequence[Account], head: Both, words: Words) -> Grid:
    """Accounts of tenants, or of models."""
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


def inputs_grid(product: Product, words: Words) -> Grid:
    """All that went in, and where it is from."""
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


def source_inputs(source: Source, money: Callable[[Decimal], str]) -> list[tuple[Both, str, str]]:
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
