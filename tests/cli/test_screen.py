"""The table of the plans tried so far."""

import io

from rich.console import Console

from halve.api.progress import Standing, Tried
from halve.cli import screen
from halve.cli.screen import ShellProgress, standing_table
from halve.core.certificate import Measured


def tried(plan, cost, loss, passed):
    ratio = Measured(value=1 + loss, low=1 + loss / 2, high=1 + 2 * loss, n=9)
    return Tried(plan=plan, cost_ratio=cost, ppl_ratio=ratio, passed=passed)


def standing(*plans):
    return Standing(tried=plans, limit=0.01, basis="seconds", seconds_left=125.0, guessed=True)


ONE, TWO, THREE = tried("a", 0.3, 0.02, False), tried("b", 0.4, 0.004, True), tried("c", 0.5, 0.001, True)


def shown(table):
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def test_the_best_is_the_cheapest_that_passed():
    assert standing(ONE, TWO, THREE).best is TWO
    assert standing(ONE).best is None


def test_the_table_marks_it_and_tells_cost_quality_and_time_left():
    text = shown(standing_table(standing(ONE, TWO, THREE), passed_s=5.0))
    assert "limit 1.000%, roughly 2 min 0 s left" in text
    (best,) = [line for line in text.splitlines() if "best" in line]
    for words in ("b", "0.400x", "0.400% [0.200%, 0.800%]", "yes"):
        assert words in best
    assert "2.000%" in text


def test_of_many_plans_those_around_the_best_are_shown():
    many = [tried(f"plan{i}", i / 100, 0.02, i >= 20) for i in range(40)]
    text = shown(standing_table(standing(*many)))
    assert "plan20" in text
    assert "plan0 " not in text
    assert text.count("plan") == screen.SHOWN + 1  # and the heading


def test_bars_stand_under_the_table_on_a_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(screen, "talks_to_terminal", lambda: True)
    monkeypatch.setattr(screen, "error_console", lambda: Console(file=out, force_terminal=True, width=120))
    progress = ShellProgress()
    with progress.task("Judging a", "tokens") as advance:
        advance(1, 2)
    assert "0.400x" not in out.getvalue()
    progress.standing(standing(ONE, TWO))
    with progress.task("Judging c", "tokens") as advance:
        advance(1, 2)
    assert "0.400x" in out.getvalue()
    assert out.getvalue().rindex("Judging c") > out.getvalue().index("0.400x")
