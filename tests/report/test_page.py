import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from halve.core.certificate import Certificate, Measured, Speed
from halve.core.record import to_dict
from halve.report import Candidate, GroupSize, LayerError, ReportPage, Sample, render

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=y>\u202e\x00\ud800{{ 7 * 7 }}"
VOID = {"meta", "link", "br", "hr", "img", "input", "base"}


class Reader(HTMLParser):
    """Keeps every tag, and fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def words_of(html: str) -> str:
    return re.sub(r"\s+", " ", "".join(read(html).text))


def with_verdict(page: ReportPage, **changes: object) -> ReportPage:
    return replace(page, certificate=replace(page.certificate, **changes))


def pages(page: ReportPage) -> Iterator[ReportPage]:
    """The page as it may come: full, bare, vast, hostile."""
    none = Speed(prefill_tok_s=None, decode_tok_s=None)
    yield page
    bare = replace(page, groups=(), layers=(), candidates=(), samples=(), notes=(), licence=None)
    yield with_verdict(bare, speed=none, original_speed=none, attempts=(), verdict="measured", max_quality_loss=None)
    yield replace(page, candidates=page.candidates[:1], layers=page.layers[:1])
    yield vast(page)
    yield hostile(page)


def vast(page: ReportPage) -> ReportPage:
    layers = [
        replace(
            error, name=f"model.layers.{i}.mlp.module{j}", layer=i, group=f"group {j}", relative_error=10.0 ** (j - 7)
        )
        for i in range(80)
        for j, error in enumerate(page.layers * 3)
    ]
    outside = replace(page.layers[0], name="lm_head", layer=None, relative_error=0.0)
    losses = [10.0 ** (i / 20 - 6) for i in range(200)]
    candidates = [
        replace(
            page.candidates[1],
            bytes_per_token=10 ** (3 + i % 10),
            ppl_ratio=Measured(value=1 + loss, low=1 - loss / 2, high=1 + 2 * loss, n=9),
        )
        for i, loss in enumerate(losses)
    ]
    broken = replace(page.candidates[1], ppl_ratio=Measured(value=math.inf, low=1.0, high=math.inf, n=9))
    return replace(page, layers=(*layers, outside), candidates=(*candidates, broken), groups=page.groups * 9)


def hostile(page: ReportPage) -> ReportPage:
    def poison(record: object) -> object:
        if isinstance(record, str):
            return HOSTILE + "名前" * 20
        if isinstance(record, tuple):
            return tuple(map(poison, record))
        if isinstance(record, ReportPage | GroupSize | LayerError | Candidate | Sample):
            names = [f.name for f in dataclasses.fields(record) if f.name not in ("certificate", "plan")]
            return replace(record, **{name: poison(getattr(record, name)) for name in names})
        return record

    inputs = replace(
        page.certificate.inputs,
        device=HOSTILE,
        command=HOSTILE,
        workload=HOSTILE,
        price=HOSTILE,
        versions={HOSTILE: "1"},
    )
    poisoned = poison(page)
    assert isinstance(poisoned, ReportPage)
    return with_verdict(poisoned, inputs=inputs)


@pytest.mark.parametrize("case", range(5), ids=["full", "bare", "few", "vast", "hostile"])
def test_every_page_is_balanced_html_that_loads_nothing(page: ReportPage, case: int) -> None:
    html = render(list(pages(page))[case])
    reader = read(html)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    for name, attributes in reader.tags:
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "style", "background"}, name
        assert not any(key.startswith("on") for key in attributes), name
        assert (attributes.get("href") or "#").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'" in html
    assert len(reader.tags) > 50
    html.encode("utf-8")


@pytest.mark.parametrize("case", range(5), ids=["full", "bare", "few", "vast", "hostile"])
def test_no_coordinate_is_broken_and_every_picture_is_named(page: ReportPage, case: int) -> None:
    for name, attributes in read(render(list(pages(page))[case])).tags:
        for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points", "d"):
            assert not re.search(r"nan|inf|e[+-]?\d", attributes.get(key) or ""), (name, attributes)
        if name == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_every_link_leads_to_a_section(page: ReportPage) -> None:
    tags = read(render(page)).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"] for name, attributes in tags if name == "a"} <= {f"#{name}" for name in ids}


def test_hostile_strings_are_shown_as_text(page: ReportPage) -> None:
    html = render(hostile(page))
    assert "<script>" not in html
    assert "<img" not in html
    assert "{{ 7 * 7 }}" in html
    assert "\x00" not in html
    assert "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=y>" in words_of(html)


def leaves(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif not isinstance(value, bool | None):
        yield str(value)


def test_every_figure_of_the_certificate_is_on_the_page(page: ReportPage) -> None:
    text = words_of(render(page))
    missing = [leaf for leaf in leaves(to_dict(page.certificate)) if leaf not in text]
    assert missing == []


def test_figures_stand_in_the_tables_rounded(page: ReportPage) -> None:
    text = words_of(render(page))
    for said in (
        "3.23× smaller", "6.45× smaller", "15.5 % of 2 GB", "0.25 %", "1.89× faster", "22.1 → 41.7 tokens/s",
        "29.7 %", "≈ 1 GB", "297 MB", "412 (401 … 420)", "0.00213 (0.0019 … 0.0024)", "0.0312 (0.027 … 0.036)",
        "1.31 % (1.2 % … 1.44 %)", "about 1 token in 76", "0.654 (0.63 … 0.68)", "217 documents", "51,234 tokens",
        "1 of at most 3", "halve optimize model --max-quality-loss 1% --out smaller", "windows of 256 tokens",
    ):  # fmt: skip
        assert said in text


def test_what_is_unknown_is_said_and_never_zero(page: ReportPage) -> None:
    none = Speed(prefill_tok_s=None, decode_tok_s=None)
    text = words_of(render(replace(with_verdict(page, speed=none, original_speed=none), licence=None)))
    assert "Speed of generatingnot measured" in text
    assert "decode (generating), tokens/snot measurednot measured—" in text
    assert "cost per million tokensnot pricednot priced—" in text
    assert "licence: not stated" in text
    assert "280 MBnot measuredgroup_size 128 does not divide in_features 172" in text
    assert "$0" not in text


def test_a_price_is_shown_where_there_is_one(page: ReportPage) -> None:
    usd = Measured(value=0.021, low=0.02, high=0.022, n=7)
    cost = replace(page.certificate.cost, usd_per_mtok=usd, original_usd_per_mtok=replace(usd, value=0.042))
    inputs = replace(page.certificate.inputs, price="$1.20 per hour")
    text = words_of(render(with_verdict(page, cost=cost, inputs=inputs)))
    assert "$0.021 ($0.02 … $0.022)50 %" in text
    assert "Price: $1.20 per hour." in text


def test_without_a_chosen_candidate_bytes_per_token_stay_a_ratio(page: ReportPage) -> None:
    text = words_of(render(replace(page, candidates=())))
    assert "bytes of weights read per token100 %29.7 %29.7 %" in text


def test_empty_sections_are_left_out(page: ReportPage) -> None:
    html = render(replace(page, groups=(), layers=(), candidates=(), samples=(), notes=()))
    for name in ("size", "layers", "candidates", "samples", "notes"):
        assert f'id="{name}"' not in html
        assert f'href="#{name}"' not in html


def test_long_tables_start_folded_and_worst_modules_come_first(page: ReportPage) -> None:
    html = render(vast(page))
    assert "All 961 modules, worst first" in html
    assert "All 201 candidates" in html
    rows = re.findall(r"<bdi>(model\.layers\.\d+\.mlp\.module\d+)</bdi></th>", html)
    assert rows[0].endswith("module11")
    assert rows[-1].endswith("module0")
    assert "Not drawn, for want of a finite figure: 1." in html


def test_attempts_on_the_sealed_text_are_counted_and_drawn(page: ReportPage, certificate: Certificate) -> None:
    before = replace(
        certificate.attempts[0],
        plan="int3-g32 rtn",
        ppl_ratio=Measured(value=1.08, low=1.07, high=1.09, n=40),
        passed=False,
    )
    quality = replace(certificate.quality, confidence=1 - 0.05 / 3)
    html = render(with_verdict(page, attempts=(before, *certificate.attempts), quality=quality))
    text = words_of(html)
    assert "2 of at most 3" in text
    assert "Because of this each interval is taken at 98.33 % confidence" in text
    assert "1int3-g32 rtn8 % (7 … 9 %)failed" in text
    assert "attempt 1: int3-g32 rtn" in html
    assert "attempt 2: int4-g32 clip" not in html  # it is this model


def test_samples_mark_where_they_part(page: ReportPage) -> None:
    html = render(page)
    assert "a time <mark>there was</mark>" in html
    assert "a time <mark>they were</mark>" in html
    same = replace(page, samples=(Sample(prompt="2 + 2 =", original=" 4", smaller=" 4"),))
    assert "smaller: the same text" in render(same)


def test_nan_in_the_certificate_is_refused(page: ReportPage) -> None:
    quality = replace(page.certificate.quality, kl_mean=Measured(value=math.nan, low=0.0, high=1.0, n=1))
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(with_verdict(page, quality=quality))


def test_the_report_loads_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, halve.report; sys.exit('torch' in sys.modules)"], check=True, timeout=60
    )
