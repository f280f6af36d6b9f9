"""A workload replayed against an engine, and the most tokens/s at which it keeps a service level: pure functions.

The requests come with the gaps of the trace, all scaled by one factor, so that so many come a second on average: the
load. Every engine is first given all requests at once, which tells the most that it can do; then, unless that kept the
level already, loads closer and closer to the highest that keeps it. So engines are compared at the same level, each at
the load that it can carry, and never at a load that only one of them can.

A request's time to the first token counts from when it was due, not from when the engine took it up. Its time per token
is that from its first token to its last, over the tokens after the first.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from halve.api.versus.engines import Arrivals, Request
from halve.api.versus.figures import Ceiling, MismeasuredError, Run, Work, refuse_too_many_macs, usd_per_mtok
from halve.core.workload import ServiceLevel, Workload

CLOSE = 1.1  # loads whose quotient is below this need no load between them
SHARES = (0.5, 0.95)  # of the percentiles that rows tell


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One engine's replay at one load. load: requests a second, None for all at once.

    tok_s: tokens of answers a second, from the first request to the last token. requests_s: requests answered a second.
    ttft_s, time_per_token_s: of each request, in the order of the trace; a single token has no time per token.
    keeps: whether the level was kept. arithmetic_fraction, arithmetic, others: as of `figures.Turn`.
    """

    load: float | None
    tok_s: float
    requests_s: float
    ttft_s: tuple[float, ...]
    time_per_token_s: tuple[float | None, ...]
    keeps: bool
    arithmetic_fraction: float | None
    arithmetic: str | None
    others: float | None
    disturbed: bool = False
    attempts: int = 1


def requests_at(
    workload: Workload,
    load: float | None,
    *,
    vocab_size: int,
    seed: int,
    text_of: Callable[[Sequence[int]], Any] | None,
) -> list[Request]:
    """The workload's requests at a load. seed: another one gives other prompts, which share as much with each other.

    text_of: makes prompt ids and text of ids, for servers that take no ids; None leaves the text out.
    """
    times_as_fast = math.inf if load is None or not workload.duration_s else load / natural_load(workload)
    made = []
    for i, request in enumerate(workload.faster(times_as_fast).requests):
        ids = ((workload.prompt_token_ids(i, vocab_size).astype(int) + 7919 * seed) % vocab_size).tolist()
        prompt, text = text_of(ids) if text_of else (ids, None)
        made.append(Request(prompt, request.output_tokens, request.arrival_s, text))
    return made


def natural_load(workload: Workload) -> float:
    """Requests a second as the trace has them; infinity for requests that all come at once."""
    return (len(workload.requests) - 1) / workload.duration_s if workload.duration_s else math.inf


def replay_of(
    requests: Sequence[Request],
    arrivals: Arrivals,
    load: float | None,
    level: ServiceLevel,
    *,
    work: Work,
    ceiling: Ceiling,
    others: float | None,
    stored: str | None = None,
    here: bool = True,
) -> Replay:
    """What the arrivals of tokens say. Raises MismeasuredError for other tokens than asked for, or more than can be."""
    counts = Counter(number for _, number in arrivals)
    if wrong := [i for i, request in enumerate(requests) if counts[i] != request.new_tokens]:
        i = wrong[0]
        raise MismeasuredError(
            f"asked for {requests[i].new_tokens} tokens, got {counts[i]} in request {i} ({len(wrong)} such requests)"
        )
    times: list[list[float]] = [[] for _ in requests]
    for when, number in sorted(arrivals):
        times[number].append(when)
    ttft = tuple(found[0] - request.at for found, request in zip(times, requests, strict=True))
    per_token = tuple((found[-1] - found[0]) / (len(found) - 1) if len(found) > 1 else None for found in times)
    seconds = max(found[-1] for found in times) - min(request.at for request in requests)
    made, read = len(arrivals), sum(len(request.prompt) for request in requests)
    tok_s = made / seconds
    fraction, kind = None, None
    if here:
        macs_s = ((read + made) * work.macs_of_layers + made * work.macs_of_head) / seconds
        refuse_too_many_macs(tok_s, macs_s, ceiling)
        kind = ceiling.kind_for(stored)
        fraction = macs_s / ceiling.gmac_s[kind] / 1e9
    kept = [level.keeps(first, token or 0.0) for first, token in zip(ttft, per_token, strict=True)]
    return Replay(
        load=load,
        tok_s=tok_s,
        requests_s=len(requests) / seconds,
        ttft_s=ttft,
        time_per_token_s=per_token,
        keeps=sum(kept) >= level.share * len(kept),
        arithmetic_fraction=fraction,
        arithmetic=kind,
        others=others,
    )


def next_load(done: Sequence[Replay]) -> float | None:
    """The load to try next, after the one with all requests at once; None when the highest is known closely enough."""
    at_once = next(replay for replay in done if replay.load is None)
    if at_once.keeps:
        return None
    kept = max((r.load for r in done if r.load and r.keeps), default=None)
    broken = min((r.load for r in done if r.load and not r.keeps), default=None)
    if kept is None:
        return broken / 2 if broken else 0.75 * at_once.requests_s
    if broken is None:
        higher = kept * 1.25
        return higher if kept * CLOSE < at_once.requests_s else None
    return math.sqrt(kept * broken) if broken > kept * CLOSE else None


def best_of(done: Sequence[Replay]) -> Replay | None:
    """The replay with the most tokens a second of those that kept the level."""
    return max((replay for replay in done if replay.keeps), key=lambda replay: replay.tok_s, default=None)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that `share` of them do not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def rows_of_replays(
    done: Sequence[Replay], refused: Sequence[str], usd_per_hour: Decimal | None, **who: Any
) -> list[Run]:
    """An engine's rows: the most within the level with its percentiles, and all requests at once.

    Where no load kept the level the first row has no figure, and percentiles are those of the lowest load. who: engine,
    model and format of the rows.
    """
    best, reasons = best_of(done), tuple(refused)
    shown = best or min(done, key=lambda r: r.load or math.inf, default=None)
    rows = [_row("replay_tok_s", best, best.tok_s if best else None, usd_per_hour, reasons, who)]
    if shown:
        tokens = [t for t in shown.time_per_token_s if t is not None]
        for what, values in (("ttft", shown.ttft_s), ("time_per_token", tokens)):
            for share in SHARES if values else ():
                figure = 1000 * percentile(values, share)
                rows.append(_row(f"replay_{what}_p{share * 100:.0f}_ms", shown, figure, None, (), who))
    at_once = next((replay for replay in done if replay.load is None), None)
    rows.append(_row("replay_at_once_tok_s", at_once, at_once.tok_s if at_once else None, usd_per_hour, (), who))
    return rows


def _row(
    metric: str,
    replay: Replay | None,
    value: float | None,
    usd_per_hour: Decimal | None,
    refused: tuple[str, ...],
    who: dict[str, Any],
) -> Run:
    counted = metric.endswith("tok_s") and replay is not None
    fraction = replay.arithmetic_fraction if replay and counted else None
    return Run(
        **who,
        metric=metric,
        value=value,
        low=value,
        high=value,
        runs=0 if value is None else 1,
        ceiling_fraction=fraction,
        ceiling=replay.arithmetic if replay and fraction is not None else None,
        usd_per_mtok=usd_per_mtok(usd_per_hour, value) if value is not None and counted else None,
        disturbed=bool(replay and replay.disturbed),
        refused=refused,
    )
