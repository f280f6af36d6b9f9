"""How load lies over the hours of a day: machines that run around the clock are paid for its fullest hour.

None of the traces that ship as presets is a day long, so that the named shapes are assumptions, and say so wherever
they are used. A trace of one's own that is a day long or more has its own shape.
"""

from dataclasses import dataclass
from decimal import Decimal

from halve.core.errors import ConfigError
from halve.core.workload import Workload
from halve.economics.fields import nearest

DAY_S = 86_400
MOST_WEIGHT = Decimal(10) ** 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """weights: of the 24 hours from midnight, of any sum; source: where they are from."""

    name: str
    weights: tuple[Decimal, ...]
    source: str

    def __post_init__(self) -> None:
        fair = len(self.weights) == 24 and all(0 <= weight <= MOST_WEIGHT for weight in self.weights)
        if not fair or not sum(self.weights):
            raise ConfigError(f"day {self.name}: {len(self.weights)} weights; give 24 from 0 to 10^9, not all 0")

    @property
    def peak(self) -> Decimal:
        """The fullest hour over the mean one. 8 hours of 24 at one level and none in the others: 24 / 8 = 3."""
        return max(self.weights) * 24 / sum(self.weights)


def _waking() -> tuple[Decimal, ...]:
    # A cosine over whole hours, its crest at 15 h, between 1 and 3, in hundredths.
    falling = (100, 97, 87, 71, 50, 26, 0, -26, -50, -71, -87, -97, -100)
    wave = (*falling, *falling[-2:0:-1])
    return tuple(Decimal(200 + wave[(hour - 15) % 24]) for hour in range(24))


DAYS = {
    day.name: day
    for day in (
        Day(name="flat", weights=(Decimal(1),) * 24, source="the same in every hour, an assumption"),
        Day(name="waking", weights=_waking(), source="one wave, its crest three times its trough, an assumption"),
        Day(
            name="office",
            weights=tuple(Decimal(9 <= hour < 17) for hour in range(24)),
            source="eight hours of work and nothing in the others, an assumption",
        ),
    )
}
DEFAULT_DAY = "waking"


def read_day(text: str) -> Day:
    """`flat`, `waking`, `office`, or 24 weights with commas from midnight on. Raises ConfigError."""
    if text in DAYS:
        return DAYS[text]
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 24 or not all(part.replace(".", "", 1).isdecimal() for part in parts):
        hint = nearest(text, DAYS) or ";"
        raise ConfigError(
            f"--day {text!r:.80}: not known{hint} give {', '.join(DAYS)}, or 24 weights with commas from midnight on"
        )
    return Day(name="stated", weights=tuple(Decimal(part) for part in parts), source="24 weights that you gave")


def day_of_trace(workload: Workload) -> Day | None:
    """Tokens by the hour of the whole days of a trace, from its start; None of one shorter than a day."""
    whole = int(workload.duration_s // DAY_S) * DAY_S
    if not whole:
        return None
    counts = [0] * 24
    for request in workload.requests:
        if request.arrival_s < whole:
            counts[int(request.arrival_s // 3600) % 24] += request.prompt_tokens + request.output_tokens
    most = max(counts)
    weights = tuple(Decimal(count) / most for count in counts)
    return Day(name="trace", weights=weights, source=f"the hours of {workload.name}")
