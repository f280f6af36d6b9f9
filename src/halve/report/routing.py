"""Cost against quality of a router between two models: a drawing, and a page in English and Japanese."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files

from markupsafe import Markup

from halve.economics.currency import USD
from halve.economics.routing import Interval, Prices, Strategy, Verdict
from halve.report.charts import both
from halve.report.filling import fill
from halve.report.languages import STYLE, Both, Grid, Language, in_both, same, switch
from halve.report.svg import Plot, drawing, label, line, linear_axis, marker, shorten, tag, text_width
from halve.report.words import number, printable

NAMES = {
    "always cheap": Both("always the cheap one", "常に安価なモデル"),
    "router": Both("router", "ルーター"),
    "short": Both("shortest prompts to it, as often right", "短い入力だけ高価なモデルへ"),
    "coin": Both("coin, as often right", "同じ正答率のコイン投げ"),
    "oracle": Both("oracle, as often right", "同じ正答率の全知の選択"),
    "always dear": Both("always the dear one", "常に高価なモデル"),
}
ANSWERS = {
    "holds": Both("holds", "成立"),
    "not_shown": Both("not shown", "示されず"),
    "broken": Both("broken", "超過"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPage:
    """What the page shows. short: the curve of the shortest prompts. created: a date as it should be shown."""

    title: str
    created: str
    cheap: Prices
    dear: Prices
    verdict: Verdict
    saved_share: Decimal
    recovered: Interval | None
    more_than_short: Interval | None
    strategies: tuple[Strategy, ...]
    curve: tuple[Strategy, ...]
    oracle: tuple[Strategy, ...]
    short: tuple[Strategy, ...]
    requests_per_month: int | None
    notes: tuple[str, ...]

    @property
    def always_cheap(self) -> Strategy:
        """The left end."""
        return self.strategies[0]

    @property
    def always_dear(self) -> Strategy:
        """The right end."""
        return self.strategies[-1]


def percent(value: float, digits: int = 1) -> str:
    """A share in percent: 0.8057 is `80.6 %`."""
    return f"{value * 100:.{digits}f} %".replace("-", "−")


def spread(one: Interval) -> str:
    """An estimate in percent with its interval."""
    return f"{percent(one.value)} [{percent(one.low)}, {percent(one.high)}]"


def _plain(one: Interval) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]".replace("-", "−")


def sentence(page: RoutingPage) -> Both:
    """What it comes to."""
    one, limit = page.verdict.strategy, percent(page.verdict.limit)
    saved = percent(float(page.saved_share))
    text = Both(
        f"Asking {page.dear.name} for {percent(one.dear_share)} of the requests costs {saved} less than always asking "
        f"it. The loss is {spread(one.loss)} of the questions, against a limit of {limit}: "
        f"{ANSWERS[page.verdict.answer].en} on {page.verdict.certified_on:,} questions that it was not chosen on.",
        f"リクエストの {percent(one.dear_share)} だけを {page.dear.name} に送ると、常に送る場合より費用が {saved} "
        "下がります。"
        f"正答率の低下は {spread(one.loss)}、上限 {limit} に対し、選択に使っていない {page.verdict.certified_on:,} 問で"
        f"{ANSWERS[page.verdict.answer].ja}。",
    )
    if page.recovered is not None and page.more_than_short is not None:
        good = page.more_than_short.low > 0
        text += Both(
            f" Over all budgets it recovers {_plain(page.recovered)} of the gap between the models, where a coin "
            f"recovers 0.5; that is {_plain(page.more_than_short)} more than sending the shortest prompts to the dear "
            "model: " + ("better than that." if good else "not shown to be better than that."),
            f"全予算での平均回収率 (モデル間の差) は {_plain(page.recovered)} (コイン投げは 0.5)。"
            f"短い入力だけを高価なモデルに送る場合との差は {_plain(page.more_than_short)} で、"
            + ("それより優れています。" if good else "それより優れているとは示されていません。"),
        )
    return text


def render_routing(page: RoutingPage, language: Language = "en") -> str:
    """The page. It loads nothing and has no script."""
    return fill(
        "routing",
        title=page.title,
        language=language,
        switch=switch(language),
        style=Markup(STYLE),
        created=page.created,
        sentence=sentence(page),
        chart=in_both(lambda lang: both(lambda width: chart(page, lang, width))),
        strategies=_strategies(page),
        curve=_curve(page),
        inputs=_inputs(page),
        notes=page.notes,
    )


def draw_routing(page: RoutingPage, width: int = 860) -> str:
    """The chart as a drawing of its own, with its style in it."""
    inner = str(chart(page, "en", width))
    height = float(inner.split('viewBox="0 0 ')[1].split('"', maxsplit=1)[0].split()[1])
    inner = inner.replace("<svg ", f'<svg width="{width}" height="{height:g}" overflow="visible" ', 1)
    css = files("halve.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    paper = tag("rect", x=-12.0, y=-12.0, width=width + 24.0, height=height + 24, class_="paper")
    view = f"-12 -12 {width + 24:g} {height + 24:g}"
    parts = [tag("style", Markup(css)), paper, Markup(inner)]
    svg = tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=view, width=width + 24)
    return printable(f"{svg}\n")


def chart(page: RoutingPage, lang: Language, width: int) -> Markup:
    """Accuracy against dollars of a million requests: the router with its band, a coin, an oracle, the limit."""
    shown = [*page.curve, *page.oracle, *page.strategies]
    costs = [float(one.usd_per_million) for one in shown]
    floor = page.always_dear.accuracy.value - page.verdict.limit
    heights = [v for one in shown for v in (one.accuracy.low, one.accuracy.high)] + [floor]
    x = linear_axis(min([0.0, *costs]), max(costs), 8 if width > 500 else 4)
    y = linear_axis(min(heights), max(heights), 6)
    left = max(text_width(percent(tick)) for tick in y.ticks) + 12
    height = 360.0
    plot = Plot(left=left, right=width - 32, top=40, bottom=height - 48, x=x, y=y)
    x_title = Both("dollars of a million requests", "100 万リクエストあたりの費用 (ドル)").of(lang)
    y_title = Both("answered right", "正答率").of(lang)
    parts = [plot.frame(lambda v: f"${number(v)}", percent, x_title, y_title)]
    parts += _limit(plot, page, floor, lang)
    parts.append(_band(plot, page.curve))
    ends = (page.always_cheap, page.always_dear)
    for series, kind in ((page.oracle, 2), (ends, 7), (page.short, 3), (page.curve, 0)):
        parts.append(tag("polyline", points=_way(plot, series), class_=f"trace c{kind}"))
    ends_of = ((page.always_cheap, 7), (page.always_dear, 7), (page.oracle[-1], 2), (page.verdict.strategy, 5))
    for one, kind in ends_of:
        tip = f"{NAMES[one.name].of(lang)}: {percent(one.accuracy.value)}, {USD.say(one.usd_per_million)}"
        parts.append(marker(kind, plot.px(float(one.usd_per_million)), plot.py(one.accuracy.value), tip, size=5.5))
    legend = (
        (0, Both("router, with its 95 % interval", "ルーター (95 % 区間)")),
        (5, Both("the threshold that was chosen", "選ばれたしきい値")),
        (3, Both("shortest prompts to the dear one", "短い入力だけ高価なモデルへ")),
        (7, Both("coin, from cheap to dear", "コイン投げ")),
        (2, Both("oracle", "全知の選択")),
    )
    for kind, words in legend:
        height += 20
        parts += [
            marker(kind, 8, height - 16),
            label(shorten(words.of(lang), width - 24), 20, height - 12, class_="tick"),
        ]
    title = Both("Share of right answers against cost", "費用に対する正答率").of(lang)
    return drawing(title, width, height, *parts)


def _way(plot: Plot, series: Sequence[Strategy]) -> str:
    spots = sorted((float(one.usd_per_million), one.accuracy.value) for one in series)
    return " ".join(f"{plot.px(cost):.1f},{plot.py(right):.1f}" for cost, right in spots)


def _band(plot: Plot, curve: Sequence[Strategy]) -> Markup:
    ordered = sorted(curve, key=lambda one: one.usd_per_million)
    there = [f"{plot.px(float(s.usd_per_million)):.1f},{plot.py(s.accuracy.high):.1f}" for s in ordered]
    back = [f"{plot.px(float(s.usd_per_million)):.1f},{plot.py(s.accuracy.low):.1f}" for s in reversed(ordered)]
    return tag("polygon", points=" ".join([*there, *back]), class_="bar c4", opacity="0.3")


def _limit(plot: Plot, page: RoutingPage, floor: float, lang: Language) -> list[Markup]:
    y = plot.py(floor)
    words = Both(
        f"limit: {percent(page.verdict.limit)} below the dear one",
        f"上限: 高価なモデルより {percent(page.verdict.limit)} 低い",
    )
    return [
        line(plot.left, y, plot.right, y, "limit"),
        label(words.of(lang), plot.right - 4, y + 16, "end", "limit-name halo"),
    ]


def _strategies(page: RoutingPage) -> Grid:
    heads = [
        Both("strategy", "方法"),
        Both("#dear model asked", "#高価なモデルの割合"),
        Both("#answered right", "#正答率"),
        Both("#loss", "#正答率の低下"),
        Both("#of a million requests", "#100 万リクエスト"),
    ]
    a_month = page.requests_per_month
    if a_month is not None:
        heads.append(Both("#a month", "#月額"))
    rows = []
    for one in page.strategies:
        said = [percent(one.dear_share), spread(one.accuracy), spread(one.loss), USD.say(one.usd_per_million)]
        if a_month is not None:
            said.append(USD.say(one.usd_per_million * a_month / 1_000_000))
        rows.append((NAMES[one.name], *map(same, said)))
    return Grid(name=Both("Strategies", "方法の比較"), heads=tuple(heads), rows=tuple(rows))


def _curve(page: RoutingPage) -> Grid:
    heads = (
        Both("#dear model asked", "#高価なモデルの割合"),
        Both("#threshold", "#しきい値"),
        Both("#answered right", "#正答率"),
        Both("#loss", "#正答率の低下"),
        Both("#of a million requests", "#100 万リクエスト"),
    )
    rows = tuple(
        (
            same(percent(one.dear_share)),
            same("—" if one.threshold is None or math.isinf(one.threshold) else f"{one.threshold:.3g}"),
            same(spread(one.accuracy)),
            same(spread(one.loss)),
            same(USD.say(one.usd_per_million)),
        )
        for one in page.curve
    )
    return Grid(name=Both("The curve", "曲線の数値"), heads=heads, rows=rows)


def _inputs(page: RoutingPage) -> Grid:
    heads = (
        Both("model", "モデル"),
        Both("#input, per million", "#入力 100 万"),
        Both("#output, per million", "#出力 100 万"),
        Both("from", "出典"),
    )
    rows = tuple(
        (
            same(one.name),
            same(USD.say_price(one.input_usd_per_mtok)),
            same(USD.say_price(one.output_usd_per_mtok)),
            same(one.origin),
        )
        for one in (page.cheap, page.dear)
    )
    return Grid(name=Both("Prices", "価格"), heads=heads, rows=rows)
