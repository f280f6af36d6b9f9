"""The page of a product's margin: self-contained, in two languages, drawn right."""

import re
from dataclasses import replace
from decimal import Decimal
from xml.etree import ElementTree

import pytest

from halve.economics.currency import USD, read_currency
from halve.economics.margin import scenario_rows
from halve.economics.outlook import demand_curve, demand_response, months_ahead
from halve.economics.product_file import read_product
from halve.economics.sensitivity import tornado
from halve.economics.tenants import Use, keep_books
from halve.report.languages import Both, same, switch
from halve.report.margin import render_margin
from halve.report.margin_words import count, origin_words, share

D = Decimal

RAW = {
    "name": "A <b> & c",
    "price_per_seat": 30,
    "seats": 400,
    "requests_per_seat": 600,
    "tokens": {"prompt": 1200, "cached": "30%", "answer": 220},
    "source": {"machines": {"usd_per_hour": "0.87", "prefill_tok_s": 5000, "decode_tok_s": 500, "utilization": "40%"}},
    "compression": {"prefill_speedup": 2, "decode_speedup": 2},
    "other_costs": {"per_month": 3000},
    "tenants": {"acme": {"seats": 10}},
}


def page(raw=RAW, currency=USD, books=False, language="en"):
    product = read_product(raw)
    uses = [
        Use(key=name, name=name, model="base", requests=1, prompt_tokens=9, cached_tokens=0, completion_tokens=1,
            micro_usd=50, unpriced=0)
        for name in ("acme", None)
    ]  # fmt: skip
    return render_margin(
        product=product,
        currency=currency,
        rows=scenario_rows(product),
        bars=tornado(product),
        demand=demand_response(product),
        demand_curve=demand_curve(product),
        months=months_ahead(product),
        payback=None,
        books=keep_books(product, uses, 10, D(86400)) if books else None,
        created="2026-11-26",
        language=language,
    )


def test_it_loads_nothing_and_has_no_script():
    html = page(books=True)
    assert not re.search(r"<script|<link|<img|url\(|(?:src|href)=\"(?!#)", html)
    assert "default-src 'none'" in html
    assert "<h1><bdi>A &lt;b&gt; &amp; c</bdi></h1>" in html


def test_every_text_stands_in_both_languages():
    html = page(books=True)
    assert html.count('<span lang="en">') == html.count('<span lang="ja">') > 100
    assert html.count('<div lang="en">') == html.count('<div lang="ja">') == 4
    assert 'id="en" class="language" aria-label="English" checked' in html
    assert 'id="ja" class="language" aria-label="日本語" checked' in page(language="ja")


def test_charts_are_whole_and_finite():
    drawings = re.findall(r"<svg.*?</svg>", page(), re.DOTALL)
    assert len(drawings) == 4 * 2 * 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing
        for width in re.findall(r'<rect[^>]* width="([-\d.]+)"', drawing):
            assert float(width) >= 0


@pytest.mark.parametrize("price", ["0.01", "100000"])
def test_losses_and_riches_are_drawn(price):
    raw = {**RAW, "price_per_seat": price}
    for drawing in re.findall(r"<svg.*?</svg>", page(raw), re.DOTALL):
        ElementTree.fromstring(drawing)


def test_without_compression_there_is_no_response_of_demand():
    html = page({k: v for k, v in RAW.items() if k != "compression"})
    assert "Where the saving goes" not in html
    assert "after compression" not in html


def test_a_loss_that_nobody_stated_is_said():
    html = page()
    assert "not stated" in html
    assert "It saves nothing at this volume, where 1 machine is paid" in html


def test_tenants_and_rates_are_on_the_page():
    html = page(currency=read_currency("JPY=155.2@2026-11-20"), books=True)
    assert "By tenant" in html
    assert "without a key" in html
    assert "1 USD = 155.2 JPY, 2026-11-20" in html
    assert "¥1,862,400" in html


def figures(cell):
    """A figure of the page as a number."""
    return float(re.sub(r"[^\d.−]", "", cell).replace("−", "-"))


def test_figures_copied_from_the_page_recompute():
    html = page()
    start = html.index('aria-label="Scenarios')
    rows = re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", html[start : html.index("</table>", start)], re.DOTALL)
    assert len(rows) == 8
    for row in rows:
        cells = re.findall(r"<bdi>(.*?)</bdi>", row)
        revenue, tokens, other, profit, margin = map(figures, cells[3:8])
        assert profit == pytest.approx(revenue - tokens - other, abs=0.011)
        assert margin == pytest.approx(100 * profit / revenue, abs=0.006)


def test_defaults_are_not_said_to_be_stated():
    html = page()
    cut = html[html.rindex("API&#39;s price cut</span>") :][:400]
    assert "30.00 %" in cut
    assert "default" in cut
    assert origin_words("stated in the file, no date given").ja == "ファイルに記載, 日付なし"


def test_words():
    assert (share(D("0.80682")), share(None), share(D("-0.5"), 0)) == ("80.68 %", "—", "−50 %")
    assert (count(D("240000")), count(D("848.528")), count(None), count(D("-0.5"))) == (
        "240,000",
        "848.53",
        "—",
        "−0.50",
    )
    assert (Both("a", "b") + "c").of("ja") == "bc"
    assert same("<").__html__() == "&lt;"
    assert switch("en").count("checked") == 1
    assert replace(Both("#a", "#b")).bare() == Both("a", "b")
