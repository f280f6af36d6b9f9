"""From a `ReportPage` to HTML: prepares what the template shows and fills it, everything escaped."""

from typing import Any

from halve.core.certificate import Certificate, Measured
from halve.core.record import to_json
from halve.core.units import format_bytes
from halve.report import charts, words
from halve.report.filling import fill
from halve.report.records import LayerError, ReportPage

SHORT_TABLE = 12  # rows that are shown at once; longer tables start folded


def render(page: ReportPage) -> str:
    """The page as one HTML document that loads nothing: CSS and charts are inline, there is no script.

    Raises ValueError when the certificate or the plan holds NaN or infinity, which have no JSON form.
    """
    certificate = page.certificate
    series = charts.series_of(page.groups, page.layers)
    return fill(
        "page",
        page=page,
        groups=sorted(page.groups, key=lambda g: (series[g.pattern], -g.bytes_before)),
        certificate=certificate,
        verdict=words.verdict(certificate),
        headlines=_headlines(certificate),
        comparison=_comparison(page),
        meanings=_meanings(certificate),
        charts=_charts(page, series),
        swatches={name: charts.swatch(kind) for name, kind in series.items()},
        layers=sorted(page.layers, key=_worst_first),
        candidates=sorted(page.candidates, key=lambda c: (not c.chosen, c.bytes_per_token)),
        num_undrawn=len(page.candidates) - len(charts.drawable(page.candidates)),
        plan_sentences=words.plan_sentences(page.plan),
        samples=[(s, *words.split_where_different(s.original, s.smaller)) for s in page.samples],
        certificate_json=to_json(certificate),
        plan_json=to_json(page.plan),
        short=SHORT_TABLE,
    )


def _worst_first(error: LayerError) -> float:
    return -error.relative_error if error.relative_error == error.relative_error else float("-inf")  # NaN is worst


def _headlines(certificate: Certificate) -> list[dict[str, str]]:
    """The three figures under the banner: name, figure, and a line that explains it."""
    size, q, draft = certificate.size, certificate.quality, certificate.draft
    said = words.loss(q.ppl_ratio, certificate.max_quality_loss)
    decode, before = certificate.speed.decode_tok_s, certificate.original_speed.decode_tok_s
    ratio = words.times_faster(decode, before)
    speed = words.NOT_MEASURED if ratio is None else words.faster(ratio.value)
    return [
        {
            "name": "Size of the weights",
            "figure": words.times_smaller(size.bytes, size.original_bytes),
            "line": f"{format_bytes(size.original_bytes)} → {format_bytes(size.bytes)}; "
            f"against float32: {words.times_smaller(size.bytes, size.float32_bytes)} "
            f"({words.percent(size.ratio)} of {format_bytes(size.float32_bytes)})"
            + (f"; beside it a draft of {format_bytes(draft.bytes)}" if draft else ""),
        },
        {
            "name": "Loss of quality",
            "figure": f"{said.value} %",
            "line": f"{words.percent(q.confidence, 4)} interval {said.interval}, "
            f"over {q.num_documents:,} documents ({q.num_tokens:,} tokens) that the search never saw",
        },
        {
            "name": "Speed of generating",
            "figure": speed,
            "line": "tokens per second were not taken for both models on one device"
            if ratio is None
            else f"{_rate(before)} → {_rate(decode)} tokens/s; {words.number(ratio.low)}"
            f"{words.DOTS}{words.number(ratio.high)}× between runs",
        },
    ]


def _rate(value: Measured | None) -> str:
    return words.NOT_MEASURED if value is None else words.number(value.value)


def _comparison(page: ReportPage) -> list[tuple[str, str, str, str]]:
    """Rows of the before/after table: what, original, smaller, ratio."""
    c = page.certificate
    rows = [
        (
            "weight files",
            format_bytes(c.size.original_bytes),
            format_bytes(c.size.bytes),
            words.times_smaller(c.size.bytes, c.size.original_bytes),
        ),
        ("bytes of weights read per token", *_bytes_per_token(page), words.percent(c.cost.ratio)),
    ]
    for name, before, now in (
        ("prefill (reading the prompt), tokens/s", c.original_speed.prefill_tok_s, c.speed.prefill_tok_s),
        ("decode (generating), tokens/s", c.original_speed.decode_tok_s, c.speed.decode_tok_s),
    ):
        ratio = words.times_faster(now, before)
        rows.append((name, words.measured(before), words.measured(now), words.faster(ratio.value) if ratio else "—"))
    run = None if c.workload_cost is None else c.workload_cost.replayed
    was, price = c.cost.original_usd_per_mtok, c.cost.usd_per_mtok
    if run is not None and c.workload_cost is not None:
        was, price = run.original_usd_per_mtok, run.usd_per_mtok
        speedup = words.times_faster(run.output_tok_s, run.original_output_tok_s)
        rows.append(
            (
                f"workload {c.workload_cost.workload}, {run.num_requests} requests: tokens of answers/s",
                words.measured(run.original_output_tok_s),
                words.measured(run.output_tok_s),
                words.faster(speedup.value) if speedup else "—",
            )
        )
    rows.append(("cost per million tokens", words.dollars(was), words.dollars(price), _price_ratio(was, price)))
    return rows


def _bytes_per_token(page: ReportPage) -> tuple[str, str]:
    # The certificate holds the ratio only; the chosen candidate holds the bytes it was taken from.
    chosen = next((c.bytes_per_token for c in page.candidates if c.chosen), None)
    ratio = page.certificate.cost.ratio
    if chosen is None or ratio <= 0:
        return "100 %", words.percent(ratio)
    return f"≈ {format_bytes(chosen / ratio)}", format_bytes(chosen)


def _price_ratio(before: Measured | None, after: Measured | None) -> str:
    ratio = words.ratio(after.value, before.value) if before and after else None
    return "—" if ratio is None else words.percent(ratio)


def _meanings(certificate: Certificate) -> list[tuple[str, str, str]]:
    """Rows of the quality table: name, figure with interval, and what it means."""
    q = certificate.quality
    rows = [
        (
            "perplexity ratio",
            words.ratio_near_one(q.ppl_ratio),
            "Perplexity is the number of equally likely words a model hesitates between. 1 means that the smaller "
            "model hesitates as much as the original; the quality loss is this ratio minus 1.",
        ),
        (
            "mean KL divergence, nats",
            words.measured(q.kl_mean),
            "How far apart the two models' predictions are on an average token; 0 means the same probabilities. "
            f"At {words.number(q.kl_mean.value)} nats a token that the original would write gets "
            f"{words.percent(words.odds_lost(q.kl_mean.value))} less probability (geometric mean).",
        ),
        (
            "99th percentile of KL, nats",
            words.measured(q.kl_p99),
            "The worst tokens: for 99 tokens in 100 the predictions are closer than this.",
        ),
        (
            "flip rate",
            words.measured(q.flip_rate, words.percent),
            f"For {words.one_in(q.flip_rate.value)} the most likely next token is not the original's. "
            "A flip is not always a mistake: the best two tokens can be almost equally likely.",
        ),
    ]
    tasks = [(name, words.measured(value), f"A task, over {value.n:,} examples.") for name, value in q.tasks.items()]
    return rows + tasks


def _charts(page: ReportPage, series: dict[str, int]) -> dict[str, Any]:
    limit = page.certificate.max_quality_loss
    this = page.certificate.quality.ppl_ratio
    attempts = [(f"attempt {i}: {a.plan}", a.ppl_ratio) for i, a in enumerate(page.certificate.attempts, 1)]
    rows = [("this model", this), *(row for row in attempts if row[1] != this)]
    return {
        "loss": charts.both(lambda width: charts.loss_chart(rows, limit, width)),
        "size": charts.both(lambda width: charts.size_chart(page.groups, series, width)) if page.groups else None,
        "layers": charts.both(lambda width: charts.layer_chart(page.layers, series, width)) if page.layers else None,
        "candidates": charts.both(lambda width: charts.candidate_chart(page.candidates, limit, width))
        if charts.drawable(page.candidates)
        else None,
    }
