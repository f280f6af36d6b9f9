"""From arrivals of tokens and readings of ceilings to figures: pure functions, tested in tests/benchmarks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

TOLERANCE = 0.05  # above the ceiling measured beside it; a sample of either may be this far off
LEAST_ROUNDS = 3  # undisturbed, for a median to be told


class MismeasuredError(ValueError):
    """Tokens that do not add up, or a figure that the machine cannot reach."""


@dataclass(frozen=True)
class Measure:
    """One question: decode at a batch size, or a prompt of so many tokens."""

    name: str
    batch: int
    prompt: int
    new_tokens: int  # at most; 1 where the prompt is the question

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is the question."""
        return self.new_tokens == 1


@dataclass(frozen=True)
class Work:
    """What one model cannot do without. weight_bytes: read once a step; macs: multiply-adds of a token's products."""

    weight_bytes: int
    macs_of_layers: int
    macs_of_head: int

    def of(self, measure: Measure, steps_per_second: float) -> tuple[float, float]:
        """Bytes and multiply-adds a second at that many steps (of a batch, or of a whole prompt) a second.

        Both are lower bounds: keys, values and attention's own products are left out, and a prompt needs the head
        for its last token only.
        """
        tokens = measure.prompt if measure.is_prefill else measure.batch
        heads = 1 if measure.is_prefill else measure.batch
        macs = tokens * self.macs_of_layers + heads * self.macs_of_head
        return self.weight_bytes * steps_per_second, macs * steps_per_second


@dataclass(frozen=True)
class Ceiling:
    """What the machine did beside a turn: the faster of a sample before and one after. gmac_s: kind to rate."""

    read_gb_s: float
    gmac_s: Mapping[str, float]

    @classmethod
    def faster(cls, before: "Ceiling", after: "Ceiling") -> "Ceiling":
        """The more that the machine could do."""
        rates = {kind: max(rate, after.gmac_s[kind]) for kind, rate in before.gmac_s.items()}
        return cls(max(before.read_gb_s, after.read_gb_s), rates)


@dataclass(frozen=True)
class Turn:
    """One engine, one measure, one round."""

    tok_s: float
    bandwidth_fraction: float
    int8_fraction: float | None  # None where this machine multiplies no bytes
    others: float  # cores that other processes used meanwhile


@dataclass
class Cell:
    """All engines' turns at one measure in one round, taken one after another."""

    turns: dict[str, Turn]
    attempts: int = 1
    disturbed: bool = False
    refused: dict[str, str] = field(default_factory=dict)


def decode_rate(arrivals: Iterable[tuple[float, int]], batch: int, new_tokens: int) -> tuple[float, float]:
    """Tokens and steps a second while all sequences of the batch were decoding.

    From the arrival of the last sequence's first token to that of the first sequence's last. Raises MismeasuredError
    when a sequence has more or fewer tokens than asked for, or there is no such time.
    """
    arrivals = sorted(arrivals)
    counts = Counter(sequence for _, sequence in arrivals)
    if counts != dict.fromkeys(range(batch), new_tokens):
        raise MismeasuredError(f"asked for {batch} sequences of {new_tokens} tokens, got {sorted(counts.values())}")
    first, last = {}, {}
    for when, sequence in arrivals:
        first.setdefault(sequence, when)
        last[sequence] = when
    start, end = max(first.values()), min(last.values())
    inside = sum(start < when <= end for when, _ in arrivals)
    if end <= start or not inside:
        raise MismeasuredError(f"{batch} sequences of {new_tokens} tokens never decoded side by side; take more tokens")
    return inside / (end - start), inside / (end - start) / batch


def prefill_rate(arrivals: Sequence[tuple[float, int]], prompt: int) -> tuple[float, float]:
    """Prompt tokens and prompts a second, from the call to the one token. Raises MismeasuredError for none or more."""
    if len(arrivals) != 1:
        raise MismeasuredError(f"asked for 1 token, got {len(arrivals)}")
    seconds = arrivals[0][0]
    return prompt / seconds, 1 / seconds


def turn_of(
    measure: Measure, tok_s: float, steps_s: float, work: Work, ceiling: Ceiling, *, cached_bytes: int, others: float
) -> Turn:
    """A turn as a fraction of the ceilings beside it.

    cached_bytes: what the last-level cache may keep from one step to the next, and need not be read. Raises
    MismeasuredError for a rate above what the machine can do, by bytes or by the fastest arithmetic that it has.
    """
    bytes_s, macs_s = work.of(measure, steps_s)
    must_read = max(work.weight_bytes - cached_bytes, 0) * steps_s
    limit = ceiling.read_gb_s * 1e9 * (1 + TOLERANCE)
    if must_read > limit:
        raise MismeasuredError(
            f"{tok_s:.1f} tokens/s would read {must_read / 1e9:.1f} GB/s, "
            f"and memory gave {ceiling.read_gb_s:.1f} beside it"
        )
    kind, rate = max(ceiling.gmac_s.items(), key=lambda item: item[1])
    if macs_s > rate * 1e9 * (1 + TOLERANCE):
        raise MismeasuredError(
            f"{tok_s:.1f} tokens/s would take {macs_s / 1e9:.0f} GMAC/s, and {kind} gave {rate:.0f} beside it"
        )
    int8 = ceiling.gmac_s.get("int8")
    return Turn(tok_s, bytes_s / ceiling.read_gb_s / 1e9, int8 and macs_s / int8 / 1e9, others)


def steps_within(seconds: float, step_s: float, most: int, least: int = 4) -> int:
    """New tokens that fit into a turn of so many seconds: at least `least`, at most `most`."""
    return max(min(least, most), min(most, round(seconds / step_s) + 1))


def is_disturbed(cell: Cell, allowed: float) -> bool:
    """Whether other processes used more than `allowed` cores during any of its turns."""
    return any(turn.others > allowed for turn in cell.turns.values())


def better(one: Cell, other: Cell) -> Cell:
    """Of two attempts at a cell the one with more turns that count, then the less disturbed one."""

    def rank(cell: Cell) -> tuple[int, float]:
        return -len(cell.turns), max((turn.others for turn in cell.turns.values()), default=0.0)

    return min(one, other, key=rank)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, lowest, highest and how many."""
    return {"value": median(values), "low": min(values), "high": max(values), "n": len(values)}


def undisturbed(cells: Sequence[Cell]) -> list[Cell]:
    """The rounds that count: those left alone, or all of them when fewer than LEAST_ROUNDS were."""
    alone = [cell for cell in cells if not cell.disturbed]
    return alone if len(alone) >= LEAST_ROUNDS else list(cells)


def rows_of(measure: Measure, cells: Sequence[Cell], engines: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each engine: medians over rounds, fractions of the ceilings, or why there is no figure.

    An engine that was refused as mismeasured in more rounds than it was measured in has no figure.
    """
    counted, rows = undisturbed(cells), []
    for engine in engines:
        turns = [cell.turns[engine] for cell in counted if engine in cell.turns]
        reasons = [cell.refused[engine] for cell in counted if engine in cell.refused]
        row: dict[str, Any] = {"engine": engine, "metric": f"{measure.name}_tok_s", "refused": reasons}
        row["disturbed"] = any(cell.disturbed for cell in counted)
        if turns and len(turns) >= len(reasons):
            row |= spread([turn.tok_s for turn in turns])
            row["bandwidth_fraction"] = spread([turn.bandwidth_fraction for turn in turns])
            fractions = [turn.int8_fraction for turn in turns if turn.int8_fraction is not None]
            row["int8_fraction"] = spread(fractions) if fractions else None
        else:
            row |= {"value": None, "low": None, "high": None, "n": 0}
        rows.append(row)
    return rows


def ratios_of(
    measure: Measure, cells: Sequence[Cell], ours: Sequence[str], peers: Sequence[str]
) -> list[dict[str, Any]]:
    """Ours over each peer: the median over rounds of the ratio within a round, and its lowest and highest."""
    found = []
    for our in ours:
        for peer in peers:
            both = [cell.turns for cell in undisturbed(cells) if our in cell.turns and peer in cell.turns]
            if both:
                ratio = spread([turns[our].tok_s / turns[peer].tok_s for turns in both])
                found.append({"halve": our, "peer": peer, "metric": f"{measure.name}_tok_s", **ratio})
    return found


def in_turn(names: Sequence[str], round_number: int) -> list[str]:
    """The engines' order in a round: each goes first once, so that no order favours one."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


def plain(cells: Mapping[str, Sequence[Cell]]) -> dict[str, list[dict[str, Any]]]:
    """All rounds as JSON values."""
    return {name: [asdict(cell) for cell in of_one] for name, of_one in cells.items()}
