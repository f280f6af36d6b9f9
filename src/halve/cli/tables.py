"""Records as tables for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from halve.cli.screen import console
from halve.core.certificate import Certificate, Measured, WorkloadCost, WorkloadReplay
from halve.core.units import format_bytes

if TYPE_CHECKING:  # the verbs' modules load torch, which looking at a model does not need
    from halve.api.demo import Demonstrated
    from halve.api.describe import MachineFacts, ModelFacts, ProcessorFacts
    from halve.api.shape_cost import ShapeCost
    from halve.api.verify import Verified
    from halve.kernels.ceilings import Ceilings


def percent(value: Measured) -> str:
    """A perplexity ratio as a loss with its interval."""
    return f"{value.value - 1:.3%} [{value.low - 1:.3%}, {value.high - 1:.3%}]"


def spread(value: Measured | None, digits: str = ".4g") -> str:
    """A measured value with its interval."""
    if value is None:
        return "not measured"
    return f"{value.value:{digits}} [{value.low:{digits}}, {value.high:{digits}}]"


def rate(value: Measured | None) -> str:
    """Tokens per second with the slowest and fastest run."""
    if value is None:
        return "not measured"
    return " ".join([_rounded(value.value), f"[{_rounded(value.low)}, {_rounded(value.high)}]"])


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_certificate(certificate: Certificate) -> None:
    """Verdict, size, quality and speed."""
    table = Table(show_header=True, title=None)
    for column in ("", "original", "smaller", "smaller / original"):
        table.add_column(column, justify="left" if not column else "right")
    size, cost = certificate.size, certificate.cost
    table.add_row(
        "weight files",
        format_bytes(size.original_bytes),
        format_bytes(size.bytes),
        f"{size.bytes / size.original_bytes:.2f}x",
    )
    table.add_row("as float32", format_bytes(size.float32_bytes), "", f"{size.ratio:.2f}x")
    if certificate.draft is not None:
        table.add_row("draft that guesses, beside it", "", format_bytes(certificate.draft.bytes), "")
    table.add_row("bytes read per token", "", "", f"{cost.ratio:.2f}x")
    for name in ("prefill_tok_s", "decode_tok_s"):
        before, after = getattr(certificate.original_speed, name), getattr(certificate.speed, name)
        ratio = f"{after.value / before.value:.2f}x" if before and after else ""
        table.add_row(f"{name.split('_', maxsplit=1)[0]} tokens/s", rate(before), rate(after), ratio)
    console().print(table)
    show_quality(certificate)
    if certificate.tasks:
        _show_tasks(certificate)
    if certificate.canary is not None:
        from halve.evaluate.canary import canary_words

        typer.echo(canary_words(certificate.canary))
    _show_cost(certificate)
    limit = certificate.max_quality_loss
    against = "no limit was set" if limit is None else f"limit {limit:.3%}"
    typer.echo(f"verdict {certificate.verdict} ({against})")


def _show_cost(certificate: Certificate) -> None:
    """What the workload takes, and what of it costs."""
    cost = certificate.workload_cost
    if cost is None:
        typer.echo("cost not priced: no workload was replayed; the bytes that one token reads stand for it")
        return
    table = Table()
    run = cost.replayed
    how = f"estimated for {escape(cost.device)}, not certified" if cost.device else "simulated"
    how = how if run is None else f"{run.num_requests} requests, {run.num_rounds} rounds"
    table.add_column(f"workload {escape(cost.workload)}, {how}")
    for column in ("original", "smaller", "smaller / original"):
        table.add_column(column, justify="right")
    if run is not None:
        _show_replay(table, cost, run)
        console().print(table)
        return
    before, after = cost.original_output_tok_s, cost.output_tok_s
    table.add_row("tokens/s of answers", _rounded(before), _rounded(after), f"{after / before:.2f}x")
    if cost.usd_per_mtok is not None and cost.original_usd_per_mtok is not None:
        ratio = f"{cost.usd_per_mtok / cost.original_usd_per_mtok:.2f}x" if cost.original_usd_per_mtok else ""
        priced = (f"${value:.3g}" for value in (cost.original_usd_per_mtok, cost.usd_per_mtok))
        table.add_row(f"a million of them, at ${escape(cost.usd_per_hour or '')} an hour", *priced, ratio)
    for words, low, high in (
        ("first token after", cost.ttft_p50_s, cost.ttft_p99_s),
        ("time per token", cost.time_per_token_p50_s, cost.time_per_token_p99_s),
    ):
        table.add_row(f"{words}, median and 99th percentile", "", f"{1e3 * low:.3g} ms, {1e3 * high:.3g} ms", "")
    console().print(table)


def _show_replay(table: Table, cost: WorkloadCost, run: WorkloadReplay) -> None:
    before, after = run.original_output_tok_s, run.output_tok_s
    table.add_row("tokens/s of answers", rate(before), rate(after), f"{after.value / before.value:.2f}x")
    table.add_row("seconds", "", "", escape(spread(run.ratio, ".2f")))
    if run.usd_per_mtok is not None and run.original_usd_per_mtok is not None:
        priced = (escape(spread(value, ".3g")) for value in (run.original_usd_per_mtok, run.usd_per_mtok))
        table.add_row(f"$ a million of them, at ${escape(cost.usd_per_hour or '')} an hour", *priced, "")
    for words, low, high in (
        ("first token after", run.ttft_p50_s, run.ttft_p99_s),
        ("time per token", run.time_per_token_p50_s, run.time_per_token_p99_s),
    ):
        table.add_row(f"{words}, median and 99th percentile", "", f"{1e3 * low:.3g} ms, {1e3 * high:.3g} ms", "")
    table.add_row(
        "foretold of the whole workload", _rounded(cost.original_output_tok_s), _rounded(cost.output_tok_s), ""
    )


def _show_tasks(certificate: Certificate) -> None:
    table = Table()
    for column in ("task", "questions", "original", "smaller", r"difference \[95% interval]", "McNemar p", "margin"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in certificate.tasks:
        within = "" if task.margin is None else f"{task.margin:.1%} {'held' if task.non_inferior else 'not shown'}"
        table.add_row(
            escape(task.name),
            f"{task.num_items:,}",
            f"{task.original_accuracy.value:.1%}",
            f"{task.accuracy.value:.1%}",
            escape(spread(task.difference, "+.1%")),
            f"{task.mcnemar_p:.3f}",
            within,
        )
    console().print(table)


def show_quality(certificate: Certificate, text: str = "sealed text") -> None:
    """Quality with intervals, and the text it was measured on."""
    quality = certificate.quality
    table = Table(show_header=True)
    table.add_column(f"quality on {escape(text)}", overflow="fold")
    table.add_column(f"value \\[{quality.confidence:.1%} interval]", justify="right")
    table.add_row("quality loss (perplexity ratio - 1)", percent(quality.ppl_ratio))
    table.add_row("mean KL divergence, nats per token", spread(quality.kl_mean))
    table.add_row("99th percentile of KL", spread(quality.kl_p99))
    table.add_row("top-1 flips, share of tokens", spread(quality.flip_rate))
    table.add_row("documents, tokens", f"{quality.num_documents:,}, {quality.num_tokens:,}")
    console().print(table)


def show_verified(result: "Verified") -> None:
    """Answer, figures, and what did not come out again."""
    show_quality(result.certificate, result.text)
    for difference in result.differences:
        typer.echo(f"does not reproduce: {difference}")
    for what in result.not_compared:
        typer.echo(f"not compared: {what}")
    limit = result.recorded.max_quality_loss
    against = "no limit was set" if limit is None else f"limit {limit:.3%}"
    typer.echo(f"{result.answer} ({against}; text: {result.text})")


def show_demo(result: "Demonstrated") -> None:
    """Before and after, both answers, where to look next."""
    show_certificate(result.optimized.certificate)
    before, after = result.original.peak_memory_bytes, result.smaller.peak_memory_bytes
    if result.shape_cost is not None:
        _show_shape(result.shape_cost)
    typer.echo(f"memory of a process that answers: {format_bytes(before)} before, {format_bytes(after)} after")
    typer.echo(f"\nprompt    {result.prompt}")
    typer.echo(f"original  {result.original.text.lstrip()}")
    typer.echo(f"smaller   {result.smaller.text.lstrip()}")
    typer.echo(f"\nbundle  {result.optimized.path}\nreport  {result.optimized.report}")


def _show_shape(found: "ShapeCost") -> None:
    """What the plan would save in a model that is not all overhead."""
    title = (
        f"the same plan in {found.shape}'s shape: {found.layers_built} of {found.layers} layers timed, random weights"
    )
    table = Table(title=title, title_justify="left")
    for column in ("decode step", "bf16", "smaller", r"smaller / bf16 \[middle 80% of rounds]"):
        table.add_column(column, justify="left" if column == "decode step" else "right")
    for step in found.steps:
        times = (f"{1e3 * s:.3g} ms, {_rounded(step.batch / s)} tokens/s" for s in (step.original_s, step.smaller_s))
        name = f"{step.batch} sequence{'s' * (step.batch > 1)}, context {found.context}"
        table.add_row(name, *times, escape(spread(step.ratio, ".2f")))
    console().print(table)


def show_model(facts: "ModelFacts") -> None:
    """A model's facts and its bytes by group."""
    typer.echo(f"{facts.path}{'  (bundle, verdict ' + str(facts.verdict) + ')' if facts.bundle else ''}")
    typer.echo(
        f"{facts.architecture}: {facts.parameters:,} parameters, {facts.num_layers} layers, "
        f"hidden {facts.hidden_size}, {facts.num_heads} heads over {facts.num_kv_heads} of size {facts.head_dim}, "
        f"vocabulary {facts.vocab_size:,}{' (tied)' if facts.tied else ''}, context {facts.context:,}"
    )
    if facts.experts is not None:
        typer.echo(
            f"sparse: {facts.experts[0]} experts, {facts.experts[1]} for a token; {facts.active_parameters:,} "
            f"parameters are active, {facts.active_parameters / facts.parameters:.0%} of all"
        )
    typer.echo(
        f"weight files {format_bytes(facts.bytes)}, of which a token reads {format_bytes(facts.bytes_per_token)}; "
        f"cache {facts.kv_cache_bytes_per_token:,} bytes per token; "
        f"licence {facts.licence or 'not stated'}"
    )
    table = Table()
    for column in ("group", "format", "parameters", "bytes"):
        table.add_column(column, justify="right" if column in ("parameters", "bytes") else "left")
    for group in facts.groups:
        table.add_row(escape(group.pattern), group.format, f"{group.parameters:,}", f"{group.bytes:,}")
    console().print(table)


def show_machine(facts: "MachineFacts") -> None:
    """A machine's facts and the kernel of each format."""
    typer.echo(f"{facts.device['model']}, {facts.device['cores']} cores, {facts.device['machine']}")
    show_processors(facts.processors)
    typer.echo(f"features: {' '.join(facts.features) or 'none known'}")
    free = "unknown" if facts.free_memory_bytes is None else format_bytes(facts.free_memory_bytes)
    typer.echo(f"memory: {format_bytes(facts.memory_bytes)}, free {free}")
    typer.echo(f"C++ kernels: {facts.native}")
    typer.echo("versions: " + ", ".join(f"{name} {value}" for name, value in facts.versions.items()))
    _show_kernels(facts.kernels)
    for card in facts.cuda.devices:
        typer.echo(
            f"{card['name']}: {card['model']}, {card['capability']}, {card['multiprocessors']} multiprocessors, "
            f"{format_bytes(card['memory_bytes'])}"
        )
    if facts.cuda.reason is not None:
        typer.echo(f"no CUDA: {facts.cuda.reason}")
    _show_kernels(facts.cuda.kernels)
    if facts.ceilings is not None:
        show_ceilings(facts.ceilings)
    if facts.cuda.ceilings is not None:
        for name, measured in facts.cuda.ceilings.items():
            if name != "refused" and measured is not None:
                what, _, unit = name.partition("_")
                low, high = f"{measured['low']:,.0f}", f"{measured['high']:,.0f}"
                typer.echo(f"cuda {what}: {measured['value']:,.0f} {_UNITS[unit]} [{low}, {high}]")
        for name, reason in facts.cuda.ceilings["refused"].items():
            typer.echo(f"cuda {name}: not here: {reason}")


_UNITS = {"gb_s": "GB/s", "tflop_s": "TFLOP/s", "top_s": "TOP/s"}


def _show_kernels(kernels: Sequence[Mapping[str, Any]]) -> None:
    table = Table()
    for column in ("operation", "format", "kernel", "refused"):
        table.add_column(column, overflow="fold")
    for row in kernels:
        refused = "; ".join(f"{r['kernel']}: {r['reason']}" for r in row["refused"])
        table.add_row(row["op"], row["format"], str(row["kernel"] or "none"), escape(refused))
    console().print(table)


def show_processors(facts: "ProcessorFacts") -> None:
    """Cores, nodes, quota, and how many threads follow."""
    quota = "no limit" if facts.quota is None else f"{facts.quota:g} processors"
    nodes = len(facts.nodes)
    typer.echo(
        f"processors: {facts.num_cpus} of {facts.num_online} may be used, {facts.num_cores} physical "
        f"core{'s' if facts.num_cores > 1 else ''} at {nodes} memory node{'s' if nodes > 1 else ''}; "
        f"cgroup quota: {quota}"
    )
    typer.echo(f"threads: {facts.default_threads} by default: {facts.reason}")
    if facts.advice:
        typer.echo(f"engines: {facts.advice}")


def show_ceilings(ceilings: "Ceilings") -> None:
    """The most that memory and each kind of arithmetic do, for each number of threads."""
    counts = list(ceilings.read_gb_s)
    table = Table()
    table.add_column("ceiling")
    for threads in counts:
        table.add_column(f"{threads} thread{'' if threads == '1' else 's'} \\[slowest, fastest]", justify="right")
    table.add_column("instructions", overflow="fold")
    read = f"{format_bytes(ceilings.arena_bytes)} read once"
    table.add_row("memory, GB/s", *(spread(ceilings.read_gb_s[threads], ".1f") for threads in counts), read)
    for what, instruction in ceilings.instructions.items():
        rates = getattr(ceilings, f"{what}_gmac_s")
        table.add_row(f"{what}, GMAC/s", *(spread(rates[threads], ".0f") for threads in counts), escape(instruction))
    for what, reason in ceilings.refused.items():
        table.add_row(f"{what}, GMAC/s", *("not here" for _ in counts), escape(reason))
    console().print(table)
