"""From arrivals of tokens and readings of ceilings to figures of batches: pure functions over records."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from statistics import median
from typing import Any

TOLERANCE = 0.05  # above the ceiling measured beside it; a sample of either may be this far off
HALF_FORMATS = ("bf16", "fp16", "f16", "fp8")
LEAST_ROUNDS = 3  # undisturbed, for a median to be told


class MismeasuredError(ValueError):
    """Tokens that do not add up, or a figure that the machine cannot reach."""


@dataclass(frozen=True)
class Measure:
    """One question: decode at a batch size, or a prompt of so many tokens."""

    name: str  # such as decode_b8 or prefill
    batch: int
    prompt: int
    new_tokens: int  # at most; 1 where the prompt is the question

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is the question."""
        return self.new_tokens == 1


@dataclass(frozen=True)
class Work:
    """What one model cannot do without. weight_bytes: read once a step, None where nobody knows; macs: multiply-adds
    of a token's products. sparse: weight_bytes are what one token reads; how many experts several tokens ask for
    together, nobody knows from outside.
    """

    weight_bytes: int | None
    macs_of_layers: int
    macs_of_head: int
    sparse: bool = False

    def bytes_of(self, measure: Measure, steps_per_second: float) -> float | None:
        """Bytes of weights a second at that many steps (of a batch, or of a whole prompt) a second."""
        one_token = measure.batch == 1 and not measure.is_prefill
        if self.weight_bytes is None or (self.sparse and not one_token):
            return None
        return self.weight_bytes * steps_per_second

    def macs_of(self, measure: Measure, steps_per_second: float) -> float:
        """Multiply-adds a second; attention's own are left out, and a prompt needs the head for its last token only."""
        tokens = measure.prompt if measure.is_prefill else measure.batch
        heads = 1 if measure.is_prefill else measure.batch
        return (tokens * self.macs_of_layers + heads * self.macs_of_head) * steps_per_second


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

    def kind_for(self, stored: str | None) -> str:
        """The arithmetic that could multiply weights of a format fastest: bytes for integers and for unknown ones.

        Formats are named as Halve does (`int4-g32`, `bf16`) or as a GGUF file does (`Q4_0`, `BF16`).
        """
        words = (stored or "").lower()
        kinds = (
            ("fp32",) if words in ("fp32", "f32") else ("bf16", "fp32") if words in HALF_FORMATS else ("int8", "fp32")
        )
        return next(kind for kind in kinds if kind in self.gmac_s)


@dataclass(frozen=True)
class Turn:
    """One engine, one measure, one round. A fraction is None where it is not known, or no limit.

    bandwidth_fraction: of the read loop beside it; None also where a cache holds all the weights. arithmetic_fraction:
    of the loop that `arithmetic` names. others: cores that other processes used meanwhile, None for an engine whose own
    use can't be told from theirs.
    """

    tok_s: float
    bandwidth_fraction: float | None
    arithmetic_fraction: float | None
    arithmetic: str | None
    others: float | None


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
    first: dict[int, float] = {}
    last: dict[int, float] = {}
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
    measure: Measure,
    tok_s: float,
    steps_s: float,
    work: Work,
    ceiling: Ceiling,
    *,
    cached_bytes: int,
    others: float | None,
    stored: str | None = None,
    here: bool = True,
) -> Turn:
    """A turn as a fraction of the ceilings beside it.

    cached_bytes: what the last-level cache may keep from one step to the next, and need not be read. stored: format
    of the weights, where it is known. here: whether the
    engine ran on this machine, whose ceilings these are. Raises MismeasuredError for a rate above what the machine can
    do, by bytes or by the fastest arithmetic that it has.
    """
    if not here:
        return Turn(tok_s, None, None, None, others)
    bytes_s, macs_s = work.bytes_of(measure, steps_s), work.macs_of(measure, steps_s)
    bandwidth_fraction = None
    if bytes_s is not None and work.weight_bytes is not None and work.weight_bytes > cached_bytes:
        bandwidth_fraction = bytes_s / ceiling.read_gb_s / 1e9
        must_read = bytes_s - cached_bytes * steps_s
        if must_read > ceiling.read_gb_s * 1e9 * (1 + TOLERANCE):
            raise MismeasuredError(
                f"{tok_s:.1f} tokens/s would read {must_read / 1e9:.1f} GB/s, "
                f"and memory gave {ceiling.read_gb_s:.1f} beside it"
            )
    refuse_too_many_macs(tok_s, macs_s, ceiling)
    kind = ceiling.kind_for(stored)
    return Turn(tok_s, bandwidth_fraction, macs_s / ceiling.gmac_s[kind] / 1e9, kind, others)


def refuse_too_many_macs(tok_s: float, macs_s: float, ceiling: Ceiling) -> None:
    """Raise MismeasuredError for more multiply-adds a second than the fastest arithmetic beside it gave."""
    kind, rate = max(ceiling.gmac_s.items(), key=lambda item: item[1])
    if macs_s > rate * 1e9 * (1 + TOLERANCE):
        raise MismeasuredError(
            f"{tok_s:.1f} tokens/s would take {macs_s / 1e9:.0f} GMAC/s, and {kind} gave {rate:.0f} beside it"
        )


def steps_within(seconds: float, step_s: float, most: int, least: int = 4) -> int:
    """New tokens that fit into a turn of so many seconds: at least `least`, at most `most`."""
    return max(min(least, most), min(most, round(seconds / step_s) + 1))


def is_disturbed(cell: Cell, allowed: float) -> bool:
    """Whether other processes used more than `allowed` cores during any of its turns."""
    return any(turn.others is not None and turn.others > allowed for turn in cell.turns.values())


def better(one: Cell, other: Cell) -> Cell:
    """Of two attempts at a cell the one with more turns that count, then the less disturbed one."""

    def rank(cell: Cell) -> tuple[int, float]:
        return -len(cell.turns), max((turn.others or 0.0 for turn in cell.turns.values()), default=0.0)

    return min(one, other, key=rank)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, lowest, highest and how many."""
    return {"value": median(values), "low": min(values), "high": max(values), "n": len(values)}


def undisturbed(cells: Sequence[Cell]) -> list[Cell]:
    """The rounds that count: those left alone, or all of them when fewer than LEAST_ROUNDS were."""
    alone = [cell for cell in cells if not cell.disturbed]
    return alone if len(alone) >= LEAST_ROUNDS else list(cells)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of the result. Value is the median over rounds, low and high the slowest and fastest; null: no figure.

    name: of engine and model, told apart from all others. metric: what was measured, with its unit at the end. runs:
    how often. ceiling_fraction: of the nearest ceiling measured beside it, which `ceiling` names (memory, int8, bf16,
    fp32); null where none is known. usd_per_mtok: at the price given, for a million of the tokens counted; null without
    one. disturbed: other processes ran meanwhile. refused: what was refused as mismeasured, and why.
    """

    engine: str
    model: str
    name: str
    format: str | None
    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    ceiling_fraction: float | None = None
    ceiling: str | None = None
    usd_per_mtok: float | None = None
    disturbed: bool = False
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One engine over another: the median over rounds of the ratio within a round, its lowest and highest."""

    engine: str
    over: str
    metric: str
    value: float
    low: float
    high: float
    runs: int


def row_of(measure: Measure, cells: Sequence[Cell], usd_per_hour: Decimal | None, **who: Any) -> Run:
    """An engine's row: medians over rounds, fractions of the ceilings, or why there is no figure.

    An engine that was refused as mismeasured in more rounds than it was measured in has no figure. who: engine, model,
    name and format of the row.
    """
    counted, name = undisturbed(cells), who["name"]
    turns = [cell.turns[name] for cell in counted if name in cell.turns]
    reasons = tuple(cell.refused[name] for cell in counted if name in cell.refused)
    row: dict[str, Any] = {
        "metric": f"{measure.name}_tok_s",
        "disturbed": any(cell.disturbed for cell in counted),
        "refused": reasons,
    }
    if not turns or len(turns) < len(reasons):
        return Run(**who, **row)
    value = median(turn.tok_s for turn in turns)
    fractions = {
        what: median(found)
        for what, found in (
            ("memory", [turn.bandwidth_fraction for turn in turns if turn.bandwidth_fraction is not None]),
            (turns[0].arithmetic, [t.arithmetic_fraction for t in turns if t.arithmetic_fraction is not None]),
        )
        if found
    }
    nearest = max(fractions, key=lambda what: fractions[what], default=None)
    return Run(
        **who,
        **row,
        value=value,
        low=min(turn.tok_s for turn in turns),
        high=max(turn.tok_s for turn in turns),
        runs=len(turns),
        ceiling=nearest,
        ceiling_fraction=fractions[nearest] if nearest else None,
        usd_per_mtok=usd_per_mtok(usd_per_hour, value),
    )


def usd_per_mtok(usd_per_hour: Decimal | None, tok_s: float) -> float | None:
    """Price of an hour over the million tokens of an hour; None without a price."""
    if usd_per_hour is None:
        return None
    return float(usd_per_hour / (Decimal(tok_s) * 3600 / 1_000_000))


def ratios_of(measure: Measure, cells: Sequence[Cell], ours: str, peers: Sequence[str]) -> list[Ratio]:
    """Ours over each peer, within a round."""
    found = []
    for peer in peers:
        both = [cell.turns for cell in undisturbed(cells) if ours in cell.turns and peer in cell.turns]
        if both:
            values = [turns[ours].tok_s / turns[peer].tok_s for turns in both]
            found.append(ratio_of(ours, peer, f"{measure.name}_tok_s", values))
    return found


def ratio_of(ours: str, peer: str, metric: str, values: Sequence[float]) -> Ratio:
    """From the ratios of each round."""
    return Ratio(
        engine=ours,
        over=peer,
        metric=metric,
        value=median(values),
        low=min(values),
        high=max(values),
        runs=len(values),
    )


def in_turn(names: Sequence[str], round_number: int) -> list[str]:
    """The engines' order in a round: each goes first once, so that no order favours one."""
    first = round_number % len(names) if names else 0
    return [*names[first:], *names[:first]]


def plain(cells: Mapping[str, Sequence[Cell]]) -> dict[str, list[dict[str, Any]]]:
    """All rounds as JSON values."""
    return {name: [asdict(cell) for cell in of_one] for name, of_one in cells.items()}
