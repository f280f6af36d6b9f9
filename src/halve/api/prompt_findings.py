"""What a log's reading comes to: what can be saved, in the order in which `halve.economics.prompts` takes it off."""

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from halve.api.prompt_log import Reading
from halve.api.prompt_replay import Replayed
from halve.economics.prompts import Finding, PromptPrices, trim_usd, usd_of

Scaled = Callable[[int], int]
SHORT_LOG_S = 3600.0
FEW_ANSWERS = 20


def find_savings(
    found: Reading, replays: Sequence[Replayed], prices: PromptPrices, scaled: Scaled, long_system: int
) -> list[Finding]:
    """Every finding that has tokens. scaled: counted tokens to those of the log's own usage."""
    findings = [
        *_prefixes(found, replays, prices, scaled),
        *_examples(found, prices, scaled),
        *_systems(found, prices, scaled, long_system),
        *_answers(found, prices),
    ]
    return [one for one in findings if one.tokens > 0]


def _prefixes(found: Reading, replays: Sequence[Replayed], prices: PromptPrices, scaled: Scaled) -> Iterable[Finding]:
    spared = prices.spared_by_cache
    sent, better = scaled(found.hits_sent), scaled(found.hits_better)
    yield Finding(
        kind="cache",
        tokens=sent - found.cached,
        usd=usd_of(sent - found.cached, spared),
        keeps_answers=True,
        change="keep a prefix cache with room for these prompts; nothing else changes (Halve's engine always has one)",
    )
    yield Finding(
        kind="reorder",
        tokens=better - sent,
        usd=usd_of(better - sent, spared),
        keeps_answers=False,
        change=f"put what recurs before what differs, in {found.num_moved} requests; these stand in front of it now",
        evidence=tuple(f"{text!r} ({number} requests)" for text, number in found.moved.most_common(5)),
    )
    held = [one for one in replays if one.change.startswith("reordered, sent")]
    base = [one for one in replays if one.change == "reordered"]
    if held and base and base[0].prompt_tokens:
        gained = scaled((held[0].hit_tokens - base[0].hit_tokens) * found.prompt // base[0].prompt_tokens)
        yield Finding(
            kind="window",
            tokens=gained,
            usd=usd_of(gained, spared),
            keeps_answers=True,
            change=f"{held[0].change}, by prefix, while it is still in the cache; answers come up to so much later",
        )


def _examples(found: Reading, prices: PromptPrices, scaled: Scaled) -> Iterable[Finding]:
    examples = sorted(found.examples.values(), key=lambda one: -one.count * one.tokens)
    tokens = scaled(sum(one.count * one.tokens for one in examples))
    yield Finding(
        kind="examples",
        tokens=tokens,
        usd=trim_usd(tokens, True, prices),
        keeps_answers=False,
        change=f"{len(examples)} examples recur: leave out those without which answers stay right, or tune "
        "a model on them",
        evidence=tuple(
            f"line {one.line}: {one.text!r}, {one.tokens} tokens, {one.count} times" for one in examples[:5]
        ),
    )
    repeated = scaled(found.repeated)
    yield Finding(
        kind="repeats",
        tokens=repeated,
        usd=trim_usd(repeated, False, prices),
        keeps_answers=False,
        change="the same example stands in a prompt twice; keep one",
        evidence=(_lines(found.repeated_lines),),
    )


def _systems(found: Reading, prices: PromptPrices, scaled: Scaled, long_system: int) -> Iterable[Finding]:
    systems = sorted(found.systems.values(), key=lambda one: -one.tokens)
    loose = [one for one in systems if one.saved]
    tokens = scaled(sum(one.saved * one.count for one in loose))
    yield Finding(
        kind="system",
        tokens=tokens,
        usd=trim_usd(tokens, True, prices),
        keeps_answers=False,
        change="system prompts say lines twice, or hold blank lines and spaces at ends of lines; take them out",
        evidence=tuple(
            f"line {one.line}: {one.text!r}, {one.saved} of {one.tokens // one.count} tokens" for one in loose[:5]
        ),
    )
    long = [one for one in systems if one.tokens > long_system * one.count]
    tokens = scaled(sum(one.tokens - long_system * one.count for one in long))
    yield Finding(
        kind="system",
        tokens=tokens,
        usd=trim_usd(tokens, True, prices),
        keeps_answers=False,
        change=f"{len(long)} system prompt{'s are' if len(long) > 1 else ' is'} longer than {long_system} tokens; this "
        "is what lies beyond",
        evidence=tuple(
            f"line {one.line}: {one.text!r}, {one.tokens // one.count} tokens, {one.count} times" for one in long[:5]
        ),
    )


def _answers(found: Reading, prices: PromptPrices) -> Iterable[Finding]:
    output = prices.output_usd_per_mtok
    markers = ", ".join(repr(marker) for marker, _ in found.markers.most_common(8))
    yield Finding(
        kind="run_on",
        tokens=found.run_on,
        usd=usd_of(found.run_on, output),
        keeps_answers=True,
        change=f"{found.markers.total()} answers go on with the next turn; end them by stop sequences: {markers}",
        evidence=(_lines(found.run_on_lines),),
    )
    yield Finding(
        kind="loop",
        tokens=found.loop,
        usd=usd_of(found.loop, output),
        keeps_answers=True,
        change=f"{found.num_loops} answers end in a loop; lower max_tokens, or set repetition_penalty",
        evidence=(_lines(found.loop_lines),),
    )
    yield Finding(
        kind="cut",
        tokens=found.cut,
        usd=None,
        keeps_answers=False,
        change=f"{found.num_cut} answers were cut off by max_tokens: paid for and not whole; ask for shorter ones, or "
        "raise it",
    )
    if found.lengths.total() < FEW_ANSWERS:
        return
    limit = _percentile(found.lengths, 19, 20)
    beyond = sum((length - limit) * times for length, times in found.lengths.items() if length > limit)
    yield Finding(
        kind="long",
        tokens=beyond,
        usd=usd_of(beyond, output),
        keeps_answers=False,
        change=f"19 answers in 20 have at most {limit} tokens; max_tokens: {limit} cuts the others there "
        f"({found.num_unlimited} requests set no max_tokens)",
    )


def _percentile(lengths: dict[int, int], part: int, whole: int) -> int:
    """The least length that part of whole answers don't exceed."""
    number, passed = sum(lengths.values()), 0
    for length in sorted(lengths):
        passed += lengths[length]
        if passed * whole >= number * part:
            return length
    return 0


def _lines(numbers: Sequence[int]) -> str:
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def notes_of(
    found: Reading, span: float | None, a_month: Decimal | None, prices: PromptPrices, scale: Decimal | None
) -> list[str]:
    """What a reader must know of the figures."""
    notes = []
    if found.num_bad:
        bad = found.bad[0]
        notes.append(f"{found.num_bad} lines are no requests and were left out; line {bad.line}: {bad.reason}")
    if a_month is None:
        notes.append("a month's dollars are not known: not every line has a time; give --requests-per-month")
    elif span is not None and span < SHORT_LOG_S:
        notes.append(f"the log covers {span:.0f} s, which says little of a month; --requests-per-month says it better")
    if prices.input_usd_per_mtok is None:
        notes.append("nothing is priced: give --input-price and --output-price, or --api PROVIDER/MODEL")
    elif prices.cached_input_usd_per_mtok is None:
        notes.append(
            "what caching saves is not known: give --cached-price (0 on your own machine: a cached token takes no step)"
        )
    if scale is not None:
        notes.append(f"prompt tokens are scaled by {scale:.3f}, to what the log's own usage says")
    if found.num_with_answer < found.num_requests:
        notes.append(f"{found.num_requests - found.num_with_answer} requests were logged without an answer or usage")
    if found.overflowed:
        notes.append("prefixes were counted with room for 16.8 million tokens, which this log exceeds")
    if found.num_other_parts:
        notes.append(f"{found.num_other_parts} images or other parts that are no text were not counted")
    return notes
