"""`price`, `breakeven` and `plan-hardware` as commands: tables, JSON, CSV, errors."""

import csv
import io
import json

import pytest


@pytest.fixture(autouse=True)
def _catalogue_that_ships(monkeypatch, tmp_path):
    monkeypatch.setenv("HALVE_PRICES", str(tmp_path / "none.toml"))


def test_the_command_line_tells_tables_json_and_csv(shell):
    ran = shell("price", "--device", "H100", "--weights", "int8", "--vs", "gpt-5-mini")
    assert ran.code == 0
    assert "your own machine is cheaper" in ran.out
    rows = list(csv.DictReader(io.StringIO(shell("price", "--device", "H100", "--csv").out)))
    assert float(rows[0]["usd_per_mtok"]) > 0
    found = json.loads(shell("breakeven", "--device", "H100", "--tokens-per-month", "2e9", "--json").out)
    assert found["fleet"]["machines"] == 1
    assert found["rows"][0]["case"] == "now"
    assert "never" in shell("breakeven", "--device", "L40S", "--vs", "llama-3.1-8b-instant@groq").out
    assert "cheapest: " in shell("plan-hardware", "--device", "L40S").out
    bad = shell("price", "--device", "H100", "--price-per-hour", "cheap")
    assert (bad.code, bad.out) == (1, "")
    assert "--price-per-hour: 'cheap' is not a number" in bad.err
