"""What a measurement says in words, and the page that is drawn of it."""

from dataclasses import replace

import pytest

from halve.api.versus.chart import ceiling_words, headline, notes, page_of, write_plot
from halve.api.versus.figures import Ratio, Run
from halve.api.versus.record import Benched, EngineFacts, WorkloadFacts

WHO = {"engine": "halve", "model": "m", "name": "halve:m", "format": "int8"}
FACTS = EngineFacts(
    **WHO,
    version="0.1",
    failed=None,
    how="served",
    load_s=1.0,
    weight_bytes=10**9,
    peak_bytes_at_batch_1=None,
    peak_bytes=2 * 10**9,
    new_tokens={},
)
PEER = replace(FACTS, engine="onnx", name="onnx:m", format=None, version=None, load_s=None, weight_bytes=None, how=None)
RUN = Run(
    **WHO, metric="decode_b1_tok_s", value=20.0, low=18.0, high=21.0, runs=3, ceiling="memory", ceiling_fraction=0.5
)
OVER = Ratio(engine="halve:m", over="onnx:m", metric="decode_b1_tok_s", value=1.25, low=1.2, high=1.3, runs=3)
RESULT = Benched(
    runs=(RUN,),
    ratios=(OVER,),
    engines=(FACTS, PEER),
    ceilings={"read_gb_s": {"value": 40.0, "low": 39.0, "high": 41.0, "n": 9}},
    device="CPU, 2 cores",
    features=(),
    threads=2,
    threads_reason="one for each of 2 physical cores",
    usd_per_hour=None,
    workload=None,
    command="halve bench m",
    date="2026-01-31",
    versions={},
    rounds={},
    replays={},
)
WORKLOAD = WorkloadFacts(
    name="azure",
    num_requests=16,
    num_prompt_tokens=4000,
    num_output_tokens=1000,
    natural_load=0.5,
    time_per_token_ms=200.0,
    share=0.95,
)


def test_the_first_line_says_how_fast_and_beside_whom():
    assert headline(RESULT) == ("m makes 20 tokens/s (decode, batch 1), 50% of what memory allows; 1.25 times onnx:m.")
    two = replace(RESULT, ratios=(OVER, replace(OVER, over="vllm:m", value=0.9)))
    assert headline(two).endswith("0.90 times vllm:m, the fastest of 2 beside it.")
    assert headline(replace(RESULT, ratios=(), runs=(replace(RUN, ceiling=None, ceiling_fraction=None),))) == (
        "m makes 20 tokens/s (decode, batch 1)."
    )


def test_without_a_figure_the_first_line_says_why():
    refused = replace(RUN, value=None, refused=("too fast",))
    assert headline(replace(RESULT, runs=(refused,))) == "halve:m has no figure: every turn was refused."
    broken = replace(FACTS, failed="Illegal instruction")
    assert headline(replace(RESULT, runs=(), engines=(broken,))) == "halve:m has no figure: Illegal instruction."


def test_notes_tell_what_a_reader_must_know():
    plain = notes(RESULT)
    assert plain[0] == "Threads of every engine: 2, one for each of 2 physical cores."
    assert plain[1] == "No price was given, so that nothing is priced."
    assert len(plain) == 2
    bad = (replace(RUN, disturbed=True), replace(RUN, value=None, refused=("too fast",)))
    more = notes(replace(RESULT, runs=bad, workload=WORKLOAD, usd_per_hour="0.2"))
    assert more[1].startswith("Replayed: azure: 16 requests, 4,000 tokens of prompts and 1,000 of answers; 95% of the")
    assert more[2].startswith("Other programs ran")
    assert more[3] == "halve:m, decode, batch 1: refused: too fast"


@pytest.mark.parametrize(
    ("name", "words"),
    [("read_gb_s", "memory, GB/s"), ("int8_gmac_s", "int8, GMAC/s"), ("memory", "memory"), ("bf16", "bf16 arithmetic")],
)
def test_ceilings_are_said_in_words(name, words):
    assert ceiling_words(name) == words


def test_a_page_has_a_bar_for_each_engine_and_a_point_for_each_load():
    replays = {
        "halve:m": [
            {"load": None, "tok_s": 40.0, "time_per_token_s": [0.3, 0.4]},
            {"load": 2.0, "tok_s": 30.0, "time_per_token_s": [0.1, None]},
            {"load": 1.0, "tok_s": 9.0, "time_per_token_s": [None]},
        ]
    }
    priced = (replace(RUN, usd_per_mtok=2.0, disturbed=True), replace(RUN, metric="replay_ttft_p50_ms"))
    page = page_of(replace(RESULT, runs=priced, workload=WORKLOAD, replays=replays))
    assert [(block.metric, [bar.note for bar in block.bars]) for block in page.charts] == [
        ("decode_b1_tok_s", ["50% of memory, $2 a million, disturbed"])
    ]
    assert [(p.tok_s, p.time_per_token_ms, p.load) for p in page.points] == [
        (40.0, 400.0, "all at once"),
        (30.0, 100.0, "2 requests/s"),
    ]
    assert page.facts[1] == ("onnx:m", "", "", "", "", "", "")
    assert page.level_ms == 200.0


def test_a_figure_that_was_refused_is_marked():
    page = page_of(replace(RESULT, runs=(replace(RUN, value=None, ceiling_fraction=None, refused=("too fast",)),)))
    assert page.charts[0].bars[0].note == "mismeasured"


@pytest.mark.parametrize(("name", "start"), [("b.html", "<!DOCTYPE html>"), ("b.svg", "<svg")])
def test_a_plot_is_a_page_or_a_drawing_by_its_name(tmp_path, name, start):
    write_plot(RESULT, tmp_path / name)
    assert (tmp_path / name).read_text().lstrip().startswith(start)
