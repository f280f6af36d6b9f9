"""What tokens cost as one HTML page, in English and Japanese, in any currency with a stated rate.

Every table has what its last columns were computed from, so that it recomputes in a spreadsheet; `halve price --json`
and `--csv` hold all digits.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from markupsafe import Markup

from halve.economics.currency import Currency
from halve.report import margin_charts as charts
from halve.report.charts import both
from halve.report.filling import fill
from halve.report.languages import STYLE, Both, Grid, Language, in_both, same, switch

BASES = {
    "measured": Both("measured", "実測"),
    "scaled": Both("scaled from a measurement", "実測から換算"),
    "roofline": Both("roofline estimate", "ルーフライン推定"),
    "list price": Both("list price", "公表価格"),
}
KINDS = {
    "on_demand": Both("on demand", "オンデマンド"),
    "spot": Both("spot", "スポット"),
    "reserved": Both("reserved", "予約"),
    "own": Both("stated by you", "利用者の指定"),
    "api": Both("list price", "公表価格"),
}
QUALITIES = {
    "another model; compare on your tasks": Both(
        "another model; compare on your tasks", "別のモデル (自分のタスクで比較)"
    ),
    "the original": Both("the original", "元のモデル"),
    "loss of quality not measured": Both("loss of quality not measured", "品質の低下は未測定"),
}
SHOWN = 30  # machines of the table
CHARTED = 12
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
    machines: Sequence[Mapping[str, Any]],
    left_out: Sequence[tuple[str, str]],
    sentence: str,
    notes: Sequence[str],
    created: str,
    language: str,
) -> str:
    """The page; it loads nothing and has no script.

    rows, even, machines: as `halve price`, `halve breakeven`, `halve plan-hardware` tell them; of none there is no
    section. left_out: machines that take no part in the ranking, and why.
    """
    chosen: Language = "ja" if language == "ja" else "en"
    return fill(
        "costs",
        title=title,
        language=chosen,
        switch=switch(chosen),
        style=Markup(STYLE),
        created=created,
        currency=Both("amounts in US dollars", "金額は米ドル")
        if currency.as_of is None
        else Both(f"amounts in {currency.code}; {currency.stated}", f"金額は {currency.code}; {currency.stated}"),
        sentence=_sentence(rows[0], rows[1:], currency, sentence) if rows else _cheapest(machines, currency, sentence),
        chart=in_both(lambda lang: both(lambda width: _chart(rows, currency, lang, width))) if rows else None,
        costs=_costs(rows, currency) if rows else None,
        sources=_sources(rows) if rows else None,
        mix=_mix((rows or machines)[0]) if rows or machines else None,
        unit=currency.code,
        even=_even(even, currency) if even else None,
        ranking=in_both(lambda lang: both(lambda width: _ranking(machines, currency, lang, width))),
        machines=_machines(machines[:SHOWN], currency),
        num_more=max(0, len(machines) - SHOWN),
        left_out=left_out,
        notes=notes,
    )


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


def _bar(name: str, row: Mapping[str, Any], currency: Currency, kind: int) -> charts.Step:
    ends = interval(row)
    return charts.Step(
        name=name,
        said=_said(row, currency),
        value=float(currency.of_usd(_usd(row["usd_per_mtok"]))),
        kind=kind,
        between=None if ends is None else (float(currency.of_usd(ends[0])), float(currency.of_usd(ends[1]))),
    )


def _chart(rows: Sequence[Mapping[str, Any]], currency: Currency, lang: Language, width: int) -> Markup:
    steps = [_bar(row["name"], row, currency, 2 if i == 0 else 0) for i, row in enumerate(rows)]
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
        Both("#cached / million", "#キャッシュ 100 万"),
        Both("#output / million", "#出力 100 万"),
        Both("#utilization", "#稼働率"),
        Both("#a request", "#1 リクエスト"),
        Both("#a million tokens", "#100 万トークン"),
        Both("quality", "品質"),
    )
    cells = []
    for row in rows:
        money = [
            same(currency.say_price(_usd(row[key])))
            for key in ("input_usd_per_mtok", "cached_input_usd_per_mtok", "output_usd_per_mtok")
        ]
        cells.append(
            (
                same(row["name"]),
                *money,
                same(f"{row['utilization']:.4g}"),
                same(currency.say_price(_usd(row["usd_per_request"]))),
                same(_said(row, currency)),
                QUALITIES.get(row["quality"], same(row["quality"])),
            )
        )
    return Grid(name=Both("Price of tokens", "トークンの費用"), heads=heads, rows=tuple(cells))


def _mix(row: Mapping[str, Any]) -> Both:
    prompt, cached, output = (f"{row[f'{name}_tokens']:,.2f}" for name in ("prompt", "cached", "output"))
    return Both(
        f"Tokens of a request: {prompt} in, of them {cached} cached, {output} out.",
        f"1 リクエストのトークン: 入力 {prompt} (うちキャッシュ {cached})、出力 {output}。",
    )


def _sources(rows: Sequence[Mapping[str, Any]]) -> Grid:
    heads = (
        Both("", ""),
        Both("speed", "速度の根拠"),
        Both("price from", "価格の出典"),
        Both("of the day", "日付"),
        Both("#days old", "#経過日数"),
        Both("kind", "種別"),
    )
    cells = []
    for row in rows:
        days = "—" if row["age_days"] is None else f"{row['age_days']:,}"
        as_of = Both("not known: stale", "不明 (期限切れ)") if row["as_of"] is None else same(str(row["as_of"]))
        if row["stale"] and row["as_of"] is not None:
            as_of = as_of + Both(", stale", " (期限切れ)")
        basis = BASES[row["basis"]] + _factor(row)
        cells.append((same(row["name"]), basis, same(row["source"]), as_of, same(days), KINDS[row["kind"]]))
    return Grid(name=Both("Where figures are from", "数値の出典"), heads=heads, rows=tuple(cells))


def _factor(row: Mapping[str, Any]) -> str:
    return "" if row["error_factor"] is None else f", ×/÷ {row['error_factor']:.2f}"


def _machines(rows: Sequence[Mapping[str, Any]], currency: Currency) -> Grid:
    heads = (
        Both("machine", "マシン"),
        Both("#an hour", "#1 時間"),
        Both("#prompt tokens / s", "#入力トークン/秒"),
        Both("#answer tokens / s", "#出力トークン/秒"),
        Both("#side by side", "#同時実行数"),
        Both("#utilization", "#稼働率"),
        Both("#a million tokens", "#100 万トークン"),
        Both("speed", "速度の根拠"),
        Both("price of", "価格の日付"),
    )
    cells = []
    for row in rows:
        day = Both("not known", "不明") if row["price_as_of"] is None else same(str(row["price_as_of"]))
        if row["price_stale"]:
            day = day + Both(", stale", " (期限切れ)")
        cells.append(
            (
                same(row["machine"]),
                same(currency.say_price(_usd(row["usd_per_hour"]))),
                same(f"{row['prefill_tok_s']:,.0f}"),
                same(f"{row['decode_tok_s']:,.0f}"),
                same(f"{row['sequences']:,.0f}"),
                same(f"{row['utilization']:.4g}"),
                same(_said(row, currency)),
                BASES[row["basis"]] + _factor(row),
                day,
            )
        )
    return Grid(name=Both("Machines", "マシン"), heads=heads, rows=tuple(cells))


def _ranking(rows: Sequence[Mapping[str, Any]], currency: Currency, lang: Language, width: int) -> Markup:
    named: dict[str, Mapping[str, Any]] = {}
    for row in rows:  # the cheapest of each device and number
        named.setdefault(f"{row['devices']} × {row['device']}", row)
    steps = [_bar(name, row, currency, 0) for name, row in list(named.items())[:CHARTED]]
    words = Both("price of a million tokens by machine", "マシン別 100 万トークンの費用")
    return charts.bars(steps, words.of(lang), width)


def _cheapest(rows: Sequence[Mapping[str, Any]], currency: Currency, sentence: str) -> Both:
    if not rows:
        return Both(sentence, "価格の分かるマシンで、このモデルを条件内で動かせるものはありません。")
    best = rows[0]
    said = f"100 万トークンあたり {_said(best, currency)}"
    return Both(sentence, f"最も安価: {best['machine']}、{said} (品質: {best['quality']})。")


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
