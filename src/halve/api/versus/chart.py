"""What `bench` found as the page that the report draws."""

from collections.abc import Sequence
from pathlib import Path

from halve.api.versus.figures import Run
from halve.api.versus.record import Benched
from halve.api.versus.replay import percentile
from halve.core.units import format_bytes
from halve.report.bench import Bar, Bars, BenchPage, LoadPoint, draw_bench, metric_words, render_bench
from halve.report.words import number

DRAWN = ("decode_", "prefill_", "replay_tok_s", "replay_ttft_p95", "replay_time_per_token_p95", "peak_bytes")


def write_plot(result: Benched, path: Path) -> None:
    """A page (.html) or a drawing (.svg)."""
    page = page_of(result)
    path.write_text(draw_bench(page) if path.suffix == ".svg" else render_bench(page), encoding="utf-8")


def page_of(result: Benched) -> BenchPage:
    """Rows as bars, replays as points, facts as cells."""
    names = tuple(engine.name for engine in result.engines)
    return BenchPage(
        title=f"{result.engines[0].model}: how fast is it here?",
        sentence=headline(result),
        device=f"{result.device}, {result.threads} thread{'s' if result.threads > 1 else ''}",
        created=result.date,
        engines=names,
        charts=tuple(
            Bars(metric=metric, bars=tuple(_bar(run) for run in result.runs if run.metric == metric))
            for metric in dict.fromkeys(run.metric for run in result.runs)
            if metric.startswith(DRAWN)
        ),
        points=tuple(point for name in names for point in _points(result, name)),
        level_ms=result.workload.time_per_token_ms if result.workload else None,
        ratios=tuple(
            (metric_words(r.metric), r.over, f"{r.value:.2f}", f"{r.low:.2f} to {r.high:.2f}", str(r.runs))
            for r in result.ratios
        ),
        facts=tuple(
            (
                engine.name,
                engine.version or "",
                engine.format or "",
                "" if engine.weight_bytes is None else format_bytes(engine.weight_bytes),
                "" if engine.load_s is None else f"{engine.load_s:.1f} s",
                engine.how or "",
                engine.failed or "",
            )
            for engine in result.engines
        ),
        ceilings=tuple(
            (ceiling_words(name), number(c["value"]), _range(c["low"], c["high"]))
            for name, c in result.ceilings.items()
        ),
        notes=notes(result),
        command=result.command,
    )


def headline(result: Benched) -> str:
    """The first thing to read: how fast alone, and beside the nearest peer."""
    first = result.engines[0]
    rates = (r for r in result.runs if r.name == first.name and r.metric.endswith("_tok_s"))
    run = next((r for r in rates if r.value is not None), None)
    if run is None or run.value is None:
        return f"{first.name} has no figure: {first.failed or 'every turn was refused'}."
    words = f"{first.model} makes {number(run.value)} tokens/s ({metric_words(run.metric)})"
    if run.ceiling_fraction is not None:
        words += f", {run.ceiling_fraction:.0%} of what {ceiling_words(str(run.ceiling))} allows"
    ratios = [r for r in result.ratios if r.metric == run.metric]
    if ratios:
        worst = min(ratios, key=lambda r: r.value)
        words += f"; {worst.value:.2f} times {worst.over}"
        words += f", the fastest of {len(ratios)} beside it" if len(ratios) > 1 else ""
    return f"{words}."


def notes(result: Benched) -> tuple[str, ...]:
    """What a reader of the figures must know."""
    found = [f"Threads of every engine: {result.threads}, {result.threads_reason}."]
    if result.workload:
        w = result.workload
        found.append(
            f"Replayed: {w.name}: {w.num_requests} requests, {w.num_prompt_tokens:,} tokens of prompts and "
            f"{w.num_output_tokens:,} of answers; {w.share:.0%} of the requests must keep "
            f"{number(w.time_per_token_ms)} ms a token."
        )
    if result.usd_per_hour is None:
        found.append("No price was given, so that nothing is priced.")
    if any(run.disturbed for run in result.runs):
        found.append("Other programs ran during the rows marked disturbed, also when they were repeated.")
    found += [
        f"{run.name}, {metric_words(run.metric)}: refused: {run.refused[0]}" for run in result.runs if run.refused
    ]
    return tuple(found)


def ceiling_words(name: str) -> str:
    """Say a ceiling's name."""
    if name in ("int8", "bf16", "fp32"):
        return f"{name} arithmetic"
    return "memory, GB/s" if name == "read_gb_s" else name.replace("_gmac_s", ", GMAC/s")


def _range(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"


def _bar(run: Run) -> Bar:
    words: Sequence[str] = [
        *([f"{run.ceiling_fraction:.0%} of {run.ceiling}"] if run.ceiling_fraction is not None else []),
        *([f"${number(run.usd_per_mtok)} a million"] if run.usd_per_mtok is not None else []),
        *(["disturbed"] if run.disturbed else []),
        *(["mismeasured"] if run.refused and run.value is None else []),
    ]
    return Bar(name=run.name, value=run.value, low=run.low, high=run.high, note=", ".join(words))


def _points(result: Benched, name: str) -> list[LoadPoint]:
    share = result.workload.share if result.workload else 1.0
    found = []
    for replay in result.replays.get(name, ()):
        times = [t for t in replay["time_per_token_s"] if t is not None]
        if times:
            load = "all at once" if replay["load"] is None else f"{number(replay['load'])} requests/s"
            point = LoadPoint(
                name=name, tok_s=replay["tok_s"], time_per_token_ms=1000 * percentile(times, share), load=load
            )
            found.append(point)
    return found
