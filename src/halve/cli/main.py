"""The command `halve`. `--help` loads neither torch nor transformers: each verb imports what it runs."""

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from halve import __version__
from halve.cli import compare as cli_compare
from halve.cli import margin as cli_margin
from halve.cli import price as cli_price
from halve.cli import prompts as cli_prompts
from halve.cli import route as cli_route
from halve.cli import serve as cli_serve
from halve.cli import sparse as cli_sparse
from halve.cli.screen import ShellProgress, error_console, print_json, talks_to_terminal
from halve.core.errors import ConfigError, HalveError, RequestError, TextError

app = typer.Typer(
    name="halve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run open Llama-family models for a fraction of what they cost, and prove it.",
)

EXIT_USER = 1

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, a bundle, or ORG/NAME.")]
SpeculateOption = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="ngram|DRAFT|off",
        help="Guess next tokens, for speed alone: from the text so far, or by a draft model. Without it: the plan's.",
    ),
]
ExpertCacheOption = Annotated[
    str | None,
    typer.Option(
        "--expert-cache",
        metavar="SIZE",
        help="Memory for the experts of a sparse model, such as 2GB; the rest stays on disk. Without it: for all.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, or a torch device such as cuda.")]
DeviceForOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to compute: cpu, or a torch device such as cuda; or what it is for, where that is not here: a name "
        "of the catalogue, such as H100. Cost is then an estimate.",
    ),
]


class Method(StrEnum):
    """How weights are rounded."""

    auto = "auto"
    rtn = "rtn"
    clip = "clip"
    gptq = "gptq"


class InputFormat(StrEnum):
    """What the inputs of products are rounded to."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


class CacheFormat(StrEnum):
    """What keys and values are kept in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell every choice on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    handler: logging.Handler = logging.StreamHandler()
    if talks_to_terminal():  # elsewhere one message is one line, not cut to a terminal's width
        from rich.logging import RichHandler

        handler = RichHandler(console=error_console(), show_time=False, show_path=False, show_level=verbose)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], format="%(message)s")
    if not verbose:
        logging.getLogger("halve.kernels").setLevel(logging.WARNING)
    for noisy in ("alembic", "uvicorn", "urllib3", "filelock", "huggingface_hub", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def optimize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the bundle goes.")],
    max_quality_loss: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT", help="Most that perplexity may rise, as 1% or 0.01. Without it: made, measured."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option(help="auto, or a format such as int8, int4-g32 (`halve doctor` lists them).")
    ] = "auto",
    method: Annotated[
        Method, typer.Option(help="Rounding: rtn (to nearest), clip, gptq (calibrated), auto.")
    ] = Method.auto,
    activations: Annotated[
        InputFormat, typer.Option(help="Inputs of products are rounded to this; auto: int8 with integer weights.")
    ] = InputFormat.auto,
    kv_cache: Annotated[
        CacheFormat, typer.Option(help="Keys and values are kept in this; auto: bf16, fp32 when portable.")
    ] = CacheFormat.auto,
    portable: Annotated[bool, typer.Option("--portable", help="Also opens in transformers and vLLM.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Your text (.txt, .jsonl, a directory). Without it: a mixed text we ship.")
    ] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ppl|kl|tasks=FILE", help="Figure that the limit is for (both); questions. May be repeated."
        ),
    ] = None,
    task_margin: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="Most that accuracy may have fallen; without it: measured.")
    ] = None,
    workload: Annotated[
        str,
        typer.Option(metavar="chat|code|batch|TRACE", help="What a plan's cost is counted on: a kind of use, a trace."),
    ] = "chat",
    slo: Annotated[
        str | None, typer.Option(metavar="ttft=2s,tpot=100ms", help="How soon answers must come, either or both.")
    ] = None,
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="USD", help="Price of this machine. Without it nothing is priced.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="30m", help="Time for the search; the best plan by then is certified.")
    ] = None,
    pick: Annotated[
        int | None, typer.Option(metavar="N", help="Take plan N of the front (halve/front.json) instead.")
    ] = None,
    keep_text: Annotated[
        bool, typer.Option("--keep-text/--no-keep-text", help="Keep the sealed text in the bundle, or only its hash.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a run that was killed.")] = False,
    device: DeviceForOption = "cpu",
    json: Json = False,
) -> None:
    """Make a smaller model within a quality limit, and certify it."""
    from halve.api.optimize import optimize as verb
    from halve.cli.tables import show_certificate

    try:
        result = verb(
            model,
            out,
            max_quality_loss=max_quality_loss,
            format=format,
            method=method.value,
            activations=activations.value,
            kv_cache=kv_cache.value,
            portable=portable,
            calibration=calibration,
            quality=quality or (),
            task_margin=task_margin,
            workload=workload,
            slo=slo,
            price_per_hour=price_per_hour,
            time=time,
            pick=pick,
            keep_text=keep_text,
            force=force,
            resume=resume,
            device=device,
            progress=ShellProgress(),
        )
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume takes up finished work", file=sys.stderr)
        raise
    if json:
        print_json(result.certificate)
        return
    show_certificate(result.certificate)
    typer.echo(f"bundle  {result.path}\nreport  {result.report}")


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="What `halve optimize` wrote.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The original it was made from.")],
    text: Annotated[Path | None, typer.Option(help="Judge on this text instead of the bundle's sealed text.")] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Questions that the bundle does not keep. May be repeated."),
    ] = None,
    device: DeviceOption = "cpu",
    json: Json = False,
) -> None:
    """Compute a certificate again: holds, inconclusive or contradicted.

    Exit code 1 when it is contradicted, when figures do not reproduce, or when the bundle is broken.
    """
    from halve.api.verify import verify as verb
    from halve.cli.tables import show_verified
    from halve.core.record import to_dict

    result = verb(bundle, against=against, text=text, tasks=tasks or (), device=device, progress=ShellProgress())
    if json:
        print_json(
            {
                **to_dict(result.certificate),
                "verdict": result.answer,
                "recorded_verdict": result.recorded.verdict,
                "differences": list(result.differences),
                "not_compared": list(result.not_compared),
                "text": result.text,
            }
        )
    else:
        show_verified(result)
    if result.answer == "contradicted" or result.differences:
        raise typer.Exit(EXIT_USER)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to make.")] = 128,
    min_tokens: Annotated[int, typer.Option(help="Nothing ends the answer before so many tokens.")] = 0,
    n: Annotated[int, typer.Option("-n", help="Answers to make, each of its own draws.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many of the likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest's.")] = 0.0,
    typical_p: Annotated[float, typer.Option(help="Sample among tokens of typical surprise, this much of them.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logit of tokens that the answer has.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time it has them.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of tokens in prompt or answer.")] = 1.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=VALUE", help="Added to a token's logit; may be given again.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities of so many likeliest tokens (--json).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Keep that text in the answer.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto (our C++ on CPU), cuda, or another device.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads of the C++ kernels. Without it: one for each physical core.")
    ] = None,
    speculate: SpeculateOption = None,
    expert_cache: ExpertCacheOption = None,
    json: Json = False,
) -> None:
    """Continue a prompt."""
    from halve.api.model import load
    from halve.cli.experts import expert_facts, show_expert_cache
    from halve.core.record import to_dict
    from halve.engine import SamplingParams

    sampling = SamplingParams.of(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=dict(_bias(words) for words in logit_bias or ()),
        logprobs=logprobs,
        seed=seed,
        stop=stop,
        include_stop=include_stop,
    )
    if logprobs is not None and not json:
        raise RequestError("--logprobs: they are told in JSON only; add --json")
    if prompt == "-":
        prompt = _standard_input()
    with ShellProgress().task("Loading", "layers") as advance:
        loaded = load(
            model,
            device=device,
            num_threads=threads,
            speculation=speculate,
            expert_cache=expert_cache,
            progress=advance,
        )
    if n == 1 and not json:
        for output in loaded.stream(prompt, sampling):
            typer.echo(output.text, nl=False)
        typer.echo()
    else:
        answers = loaded.generate_all([prompt], sampling)
        if json:
            told = to_dict(answers[0]) if n == 1 else {"completions": answers}
            print_json({**told, **expert_facts(loaded.engine.metrics())})
        else:
            for answer in answers:
                typer.echo(f"[{answer.index + 1}] {answer.text}")
    show_expert_cache(loaded.engine.metrics())


@app.command()
def batch(
    model: ModelArgument,
    prompts: Annotated[Path, typer.Argument(help='A .jsonl file: a line is {"id": ..., "prompt": ...}.')],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the answers go; a killed run is taken up there.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto (our C++ on CPU), cuda, or another device.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads of the C++ kernels. Without it: one for each physical core.")
    ] = None,
    speculate: SpeculateOption = None,
    expert_cache: ExpertCacheOption = None,
    json: Json = False,
) -> None:
    """Continue a file of prompts, in bounded memory; run it again to take up a killed run."""
    from halve.api.model import load
    from halve.cli.experts import expert_facts, show_expert_cache
    from halve.core.record import to_dict
    from halve.engine import SamplingParams

    sampling = SamplingParams.of(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with ShellProgress().task("Loading", "layers") as advance:
        loaded = load(
            model,
            device=device,
            num_threads=threads,
            speculation=speculate,
            expert_cache=expert_cache,
            progress=advance,
        )
    with ShellProgress().task("Answering", "prompts") as advance:
        done = loaded.run_file(prompts, out, sampling, progress=advance)
    show_expert_cache(loaded.engine.metrics())
    if json:
        print_json({**to_dict(done), "out": str(out), **expert_facts(loaded.engine.metrics())})
        return
    resumed = f", {done.num_resumed} were there" if done.num_resumed else ""
    typer.echo(f"{done.num_completed} of {done.num_lines} prompts answered{resumed}, {done.num_errors} refused\n{out}")


def _bias(words: str) -> tuple[int, float]:
    token_id, _, value = words.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise RequestError(f"--logit-bias: {words!r} is not ID=VALUE, such as 17=-100") from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the bundle goes.")] = Path("halve-demo"),
    json: Json = False,
) -> None:
    """Optimize, certify and run the model that Halve ships."""
    from halve.api.demo import demo as verb
    from halve.cli.tables import show_demo
    from halve.core.record import to_dict

    result = verb(out, progress=ShellProgress())
    if json:
        print_json(
            {
                "certificate": to_dict(result.optimized.certificate),
                "prompt": result.prompt,
                "original": to_dict(result.original),
                "smaller": to_dict(result.smaller),
                "shape_cost": None if result.shape_cost is None else to_dict(result.shape_cost),
                "bundle": str(result.optimized.path),
                "report": str(result.optimized.report),
            }
        )
        return
    show_demo(result)


@app.command()
def bench(
    model: ModelArgument,
    vs: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:PATH", help="An engine beside it: llama.cpp, onnx, openvino, vllm, halve, openai."),
    ] = None,
    peers_env: Annotated[
        list[Path] | None, typer.Option(help="A virtual environment that has such engines, or a folder of some.")
    ] = None,
    parts: Annotated[str, typer.Option(help="What to measure: decode, prefill, replay.")] = "decode,prefill,replay",
    batch: Annotated[str, typer.Option(help="Sizes of the batch for decoding, 1 to 32.")] = "1,8,32",
    trace: Annotated[
        Path | None, typer.Option(help="Requests to replay: a trace of Azure's or Mooncake's format.")
    ] = None,
    trace_requests: Annotated[int, typer.Option(help="How many requests of the trace.")] = 16,
    trace_tokens: Annotated[int, typer.Option(help="Only requests of at most so many tokens, answer included.")] = 1024,
    tpot_ms: Annotated[float, typer.Option(help="Time per token that 95 % of the requests must keep.")] = 200.0,
    rounds: Annotated[int, typer.Option(help="Rounds of every measure; loads of the replay, at most.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of a decoding turn, about.")] = 3.0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of every engine. Without it: one for each physical core.")
    ] = None,
    usd_per_hour: Annotated[
        str | None, typer.Option(help="Price of this machine. Without it nothing is priced.")
    ] = None,
    disturbed_above: Annotated[float, typer.Option(help="Cores that other programs may use meanwhile.")] = 0.15,
    repeats: Annotated[int, typer.Option(help="How often a disturbed turn is taken again.")] = 2,
    expert_cache: ExpertCacheOption = None,
    logs: Annotated[Path | None, typer.Option(help="A directory for what the engines print.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a page (.html) or a drawing (.svg).")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    json: Json = False,
) -> None:
    """Show how fast a model is here, beside this machine's limits and other engines."""
    from halve.api.bench import bench as verb
    from halve.cli.bench import show_bench

    try:
        sizes = [int(size) for size in batch.split(",")]
    except ValueError:
        raise ConfigError(f"batch: {batch!r} is not a list of sizes, such as 1,8,32") from None
    result = verb(
        model,
        vs=vs,
        peers_env=peers_env,
        parts=parts.split(","),
        batches=sizes,
        trace=trace,
        trace_requests=trace_requests,
        trace_tokens=trace_tokens,
        tpot_ms=tpot_ms,
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        usd_per_hour=usd_per_hour,
        disturbed_above=disturbed_above,
        repeats=repeats,
        expert_cache=expert_cache,
        logs=logs,
        plot=plot,
        save=save,
        progress=ShellProgress(),
    )
    if json:
        print_json(result)
    else:
        show_bench(result)
    for engine in result.failed:
        print(f"halve: {engine.name}: {engine.failed}", file=sys.stderr)
    if result.failed:
        raise typer.Exit(EXIT_USER)


@app.command()
def inspect(model: ModelArgument, json: Json = False) -> None:
    """Show a model's architecture, parameters, bytes by group, formats and licence."""
    from halve.api.describe import inspect as verb
    from halve.cli.tables import show_model

    facts = verb(model)
    if json:
        print_json(facts)
    else:
        show_model(facts)


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure how fast memory and arithmetic can be here; some seconds.")
    ] = False,
    json: Json = False,
) -> None:
    """Show this machine: features, the kernel that runs each format and why others refuse, versions, memory."""
    from halve.api.describe import doctor as verb
    from halve.cli.tables import show_machine

    facts = verb(measure=measure, progress=ShellProgress())
    if json:
        print_json(facts)
    else:
        show_machine(facts)


app.command()(cli_compare.compare)
app.command()(cli_sparse.upcycle)
app.command()(cli_sparse.sparsify)
app.command()(cli_serve.serve)
app.command()(cli_serve.usage)
app.command()(cli_price.price)
app.command()(cli_price.breakeven)
app.command()(cli_price.plan_hardware)
app.command()(cli_margin.margin)
app.command()(cli_prompts.prompts)
app.command()(cli_route.route)
app.add_typer(cli_serve.keys_app, name="keys")


def main() -> None:
    """Run the command; what the user can mend is printed in one line, without a traceback.

    Typer itself answers usage errors (exit 2), Ctrl-C (130) and a reader of our output that went away (1).
    """
    # OpenMP's threads spin while they wait, and two such programs on the same cores stop each other: measured, a
    # fifteenth of the speed. Asleep they cost little. It must be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(prog_name="halve")
    except HalveError as error:
        print(f"halve: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)


def _standard_input() -> str:
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TextError(f"standard input: not UTF-8 at byte {error.start}; give UTF-8 text") from error
