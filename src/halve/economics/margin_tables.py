"""Margins as plain tables, for JSON, CSV and spreadsheets: names of columns, rows of values.

Amounts are dollars to the micro-dollar, shares to nine digits, prices of a request to twelve: what stands in a row
recomputes from the other columns of the row within its last digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from halve.economics.margin import ScenarioRow, Statement
from halve.economics.outlook import DemandResponse, Month
from halve.economics.sensitivity import Bar
from halve.economics.tenants import Account

Row = dict[str, Any]
TABLES = ("scenarios", "sensitivity", "demand", "months", "tenants", "models")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Rows of each table; those of tenants and models are empty without a ledger."""

    scenarios: list[Row]
    sensitivity: list[Row]
    demand: list[Row]
    months: list[Row]
    tenants: list[Row]
    models: list[Row]


def rounded(value: Decimal | None, places: int = 6) -> float | int | None:
    """A number of JSON with the same digits, as far as a float holds them: amounts below 10^9 to the micro-dollar."""
    if value is None:
        return None
    digits = value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN) if value.adjusted() < 22 else value
    return int(digits) if digits == digits.to_integral_value() else float(digits)


def statement_row(one: Statement) -> Row:
    """Columns of a statement."""
    return {
        "seats": rounded(one.seats),
        "requests": rounded(one.requests),
        "tokens": rounded(one.tokens),
        "revenue_usd": rounded(one.revenue_usd),
        "token_usd": rounded(one.token_usd),
        "seat_usd": rounded(one.seat_usd),
        "fixed_usd": rounded(one.fixed_usd),
        "payment_usd": rounded(one.payment_usd),
        "gross_profit_usd": rounded(one.gross_profit_usd),
        "gross_margin": rounded(one.gross_margin, 9),
        "token_share": rounded(one.token_share, 9),
        "usd_per_request": rounded(one.usd_per_request, 12),
        "usd_per_mtok": rounded(one.usd_per_mtok, 9),
        "machines": one.machines,
    }


def margin_tables(
    rows: Sequence[ScenarioRow],
    bars: Sequence[Bar],
    demand: Sequence[tuple[Decimal, DemandResponse]],
    months: Sequence[Month],
    tenants: Sequence[Account] = (),
    models: Sequence[Account] = (),
) -> Tables:
    """All tables of a product."""
    return Tables(
        scenarios=[
            {
                "scenario": row.case,
                "name": row.name,
                "compressed": row.compressed,
                "quality_loss": rounded(row.quality_loss, 9),
                "usd_per_seat": rounded(row.usd_per_seat),
                **statement_row(row.statement),
                "most_requests_per_seat": row.most_requests_per_seat,
                **_source_row(row),
            }
            for row in rows
        ],
        sensitivity=[
            {
                "driver": bar.driver,
                "value": rounded(bar.value, 9),
                "low": rounded(bar.low, 9),
                "high": rounded(bar.high, 9),
                "gross_margin_at_low": rounded(bar.at_low, 9),
                "gross_margin_at_high": rounded(bar.at_high, 9),
                "gross_profit_usd_at_low": rounded(bar.profit_at_low),
                "gross_profit_usd_at_high": rounded(bar.profit_at_high),
                "swing": rounded(bar.swing, 9),
            }
            for bar in bars
        ],
        demand=[
            {
                "elasticity": rounded(elasticity, 9),
                "cost_per_request_ratio": rounded(one.cost_per_request_ratio, 9),
                "requests_per_seat": rounded(one.requests_per_seat),
                "usd_per_seat": rounded(one.usd_per_seat),
                "saved_usd": rounded(one.saved_usd),
                "more_tokens_usd": rounded(one.more_tokens_usd),
                "lower_price_usd": rounded(one.lower_price_usd),
                "more_seats_usd": rounded(one.more_seats_usd),
                "kept_usd": rounded(one.kept_usd),
                "spent_share": rounded(one.spent_share, 9),
                **statement_row(one.after),
            }
            for elasticity, one in demand
        ],
        months=[
            {"month": month.number, "compressed": compressed, **statement_row(one)}
            for month in months
            for compressed, one in ((False, month.now), (True, month.compressed))
            if one is not None
        ],
        tenants=[_account("tenant", account) for account in tenants],
        models=[_account("model", account) for account in models],
    )


def _source_row(row: ScenarioRow) -> Row:
    """What a row's dollars of tokens recompute from: tokens of the month and prices; null where there is none."""
    traffic, source = row.product.traffic, row.product.source
    names = ("input_usd_per_mtok", "cached_input_usd_per_mtok", "output_usd_per_mtok", "usd_per_hour",
             "operator_usd_per_month")  # fmt: skip
    return {
        "prompt_tokens": rounded(traffic.prompt),
        "cached_tokens": rounded(traffic.cached),
        "answer_tokens": rounded(traffic.answer),
        **{name: rounded(getattr(source, name, None), 9) for name in names},
    }


def _account(kind: str, account: Account) -> Row:
    return {
        kind: account.name,
        "requests": account.requests,
        "tokens": account.tokens,
        "usage_micro_usd": account.usage_micro_usd,
        "idle_micro_usd": account.idle_micro_usd,
        "cost_known": account.cost_known,
        "usd_per_mtok": rounded(account.usd_per_mtok, 9),
        "revenue_usd": rounded(account.revenue_usd),
        "other_usd": rounded(account.other_usd),
        "contribution_usd": rounded(account.contribution_usd),
        "margin": rounded(account.margin, 9),
    }
