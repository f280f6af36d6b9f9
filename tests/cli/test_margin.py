"""`halve margin` as a shell sees it."""

import csv
import io
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "products" / "support-copilot.yaml"


def test_a_founder_reads_the_margin_and_what_it_hangs_on(shell):
    ran = shell("margin", EXAMPLE)
    assert ran.code == 0, ran.err
    for words in (
        "after compression",
        "twice the seats",
        "at most 0.800 %",
        "price of a machine, per hour",
        "more tokens",
    ):
        assert words in ran.out
    assert ran.out.splitlines()[-1].startswith("Gross margin is 71.48 % now; tokens take 8.85 % of revenue.")


def test_yen_by_a_stated_rate(shell, tmp_path):
    page = tmp_path / "page.html"
    ran = shell("margin", EXAMPLE, "--currency", "JPY=155.2@2026-11-20", "--report", page, "--language", "ja")
    assert ran.code == 0, ran.err
    assert "amounts in JPY: 1 USD = 155.2 JPY, 2026-11-20" in ran.out
    assert "¥9,312,000" in ran.out
    assert '<html lang="ja">' in page.read_text()
    assert ran.err == f"report  {page}\n"


def test_json_and_csv_hold_the_same_figures(shell):
    json = shell("margin", EXAMPLE, "--json").json
    ran = shell("margin", EXAMPLE, "--csv", "scenarios")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert [float(row["gross_margin"]) for row in rows] == [row["gross_margin"] for row in json["scenarios"]]
    assert shell("margin", EXAMPLE, "--csv", "demand").out.startswith("elasticity,cost_per_request_ratio,")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--csv", "tenants"], "--csv tenants: there are no such rows; it needs --ledger URL"),
        (["--currency", "JPY"], "--currency: 'JPY' is not CODE=RATE@DATE"),
        (["--api-cut", "x"], "--api-cut: 'x' is not a number, such as 30%"),
        (["--ledger", "sqlite:////no/such.db"], "there is no such file"),
    ],
)
def test_what_cannot_be_told_is_said_in_one_line(shell, words, said):
    ran = shell("margin", EXAMPLE, *words)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert said in line
