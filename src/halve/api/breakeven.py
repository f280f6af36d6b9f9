"""`halve breakeven`: from which volume machines of one's own cost less than an API."""

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from halve.api.price import Priced, Question, Rival, big, priced
from halve.api.progress import SILENT, Progress
from halve.core.errors import ConfigError
from halve.economics.costs import BreakEven, Fleet, break_even, fleet
from halve.economics.currency import USD, Currency
from halve.economics.margin_tables import rounded
from halve.economics.roofline import Throughput


@dataclass(frozen=True, kw_only=True, slots=True)
class EvenRow:
    """Break-even against one API: as the model is, and with operators; before compression where that is known."""

    rival: Rival
    case: str
    even: BreakEven


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenEven:
    """What `breakeven` found. fleet: for the volume that was asked about."""

    priced: Priced
    rows: tuple[EvenRow, ...]
    monthly_ops_usd: Decimal
    most_utilization: Decimal
    fleet: Fleet | None
    tokens_per_month: Decimal | None

    @property
    def sentence(self) -> str:
        """From which volume, against whom."""
        lines = []
        for row in self.rows:
            if row.case != "now":
                continue
            name = row.rival.price.name
            if row.even.tokens is None:
                lines.append(f"never against {name} (the API is cheaper for you at any volume)")
            else:
                lines.append(f"from {big(row.even.tokens)} tokens a month against {name}")
        return f"your own machines pay {'; '.join(lines)}" if lines else "there is no API to compare with"

    def table(self) -> list[dict[str, Any]]:
        """All rows, plain."""
        return [
            {
                "api": row.rival.price.name,
                "case": row.case,
                "api_usd_per_mtok": rounded(row.even.api_usd_per_mtok, 9),
                "tokens_per_month": rounded(row.even.tokens, 3),
                "requests_per_month": rounded(row.even.requests, 3),
                "machines": row.even.machines,
                "load": rounded(row.even.load, 6),
                "usd_per_month": rounded(row.even.monthly_usd, 4),
                "capacity_tokens_per_machine": rounded(row.even.capacity_tokens, 3),
                "api_price_of_capacity_over_machine": None
                if row.even.share_of_capacity.is_infinite()
                else rounded(row.even.share_of_capacity, 6),
            }
            for row in self.rows
        ]

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        plan = self.fleet
        return {
            **{k: v for k, v in self.priced.to_plain().items() if k not in ("rows", "verdict")},
            "operators_usd_per_month": rounded(self.monthly_ops_usd),
            "most_utilization": rounded(self.most_utilization, 6),
            "rows": self.table(),
            "fleet": plan
            and {
                "tokens_per_month": rounded(self.tokens_per_month, 3),
                "machines": plan.machines,
                "load": rounded(plan.load, 6),
                "headroom_tokens": rounded(plan.headroom_tokens, 3),
                "usd_per_month": rounded(plan.monthly_usd, 4),
            },
            "verdict": self.sentence,
        }


def breakeven(
    question: Question | None = None,
    *,
    operators_per_month: Decimal = Decimal(0),
    tokens_per_month: Decimal | None = None,
    currency: Currency = USD,
    progress: Progress = SILENT,
    **words: Any,
) -> BrokenEven:
    """From which monthly volume machines of one's own beat each API; see `price` for the rest.

    operators_per_month: dollars for people, in a case of their own. tokens_per_month: a volume to plan machines for.
    The utilization here is the most that a machine may have. Raises as `price`.
    """
    asked = replace(question or Question(), **words)
    if tokens_per_month is not None and not tokens_per_month > 0:
        raise ConfigError(f"--tokens-per-month {tokens_per_month}: must be above 0; a volume of zero needs no machine")
    found = priced(asked, currency, progress, as_it_is=False)
    most = found.cost.utilization
    original = _before(found)
    rows = []
    for rival in found.rivals:
        cases: list[tuple[str, Throughput, Decimal]] = [("now", found.throughput, Decimal(0))]
        if operators_per_month:
            cases.append(("with operators", found.throughput, operators_per_month))
        if original is not None:
            cases.append(("before compression", original, Decimal(0)))
        for case, throughput, ops in cases:
            even = break_even(
                usd_per_hour=found.machine.usd_per_hour,
                throughput=throughput,
                mix=found.preset.mix,
                api_usd_per_request=rival.request_usd,
                monthly_ops_usd=ops,
                most_utilization=most,
            )
            rows.append(EvenRow(rival=rival, case=case, even=even))
    plan = None
    if tokens_per_month is not None:
        plan = fleet(
            tokens_per_month=tokens_per_month,
            usd_per_hour=found.machine.usd_per_hour,
            throughput=found.throughput,
            mix=found.preset.mix,
            most_utilization=most,
        )
    return BrokenEven(
        priced=found,
        rows=tuple(rows),
        monthly_ops_usd=operators_per_month,
        most_utilization=most,
        fleet=plan,
        tokens_per_month=tokens_per_month,
    )


def _before(found: Priced) -> Throughput | None:
    """The original's speed on the same machine, as the certificate measured both; None where it did not."""
    certificate = found.subject.certificate
    if certificate is None:
        return None
    now, before = certificate.speed, certificate.original_speed
    rows = [r for r in certificate.rooflines if r.model == "original"]
    if now.prefill_tok_s is None or before.prefill_tok_s is None or not rows or found.subject.measured is None:
        return None
    prefill = before.prefill_tok_s.value / now.prefill_tok_s.value
    decode = max(r.decode_tok_s for r in rows) / found.subject.measured.decode_tok_s
    return replace(
        found.throughput,
        prefill_tok_s=found.throughput.prefill_tok_s * prefill,
        decode_tok_s=found.throughput.decode_tok_s * decode,
        origin=f"original, {found.throughput.origin}",
    )
