"""`halve route`: files, prices, verdicts, and the router that is kept."""

import gzip
import json
import re
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from halve.api.route import read_model, route
from halve.api.saved_router import SavedRouter
from halve.core.errors import ConfigError, DataError, OutputError

ARGS = {"cheap": "small=0.6/0.6", "dear": "large=10/30"}
ROOT = Path(__file__).resolve().parents[2]
REAL = next((p / "shared/data/tasks" for p in ROOT.parents if (p / "shared/data").is_dir()), ROOT / "no-shared")
EASY, HARD = "Where is the capital of the country?", "Prove the theorem of the field and its extension."


def rows(n=400, seed=0, **more):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        hard = rng.random() < 0.3
        knows = bool(rng.random() < 0.9)
        found.append({"prompt": f"{HARD if hard else EASY} {i}", "small": knows and not hard, "large": knows or hard,
                      "small_tokens": 20, "large_chars": 80, "gain": float(hard), **more})  # fmt: skip
    return found


def write(path, found):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in found))
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "questions.jsonl", rows())


def test_a_router_that_is_learned_keeps_the_limit_and_saves(file):
    found = route(file, **ARGS, max_quality_loss="5%")
    assert found.verdict.answer == "holds"
    assert (found.verdict.chosen_on, found.verdict.certified_on) == (200, 200)
    assert found.verdict.strategy.dear_share < 0.6
    assert found.is_better
    assert found.saved_share > Decimal("0.3")
    router, coin, oracle = (found.verdict.strategy, found.coin_as_good, found.oracle_as_good)
    assert oracle.usd_per_million <= router.usd_per_million < coin.usd_per_million
    assert router.usd_per_million < found.short_as_good.usd_per_million
    assert found.more_than_short.low > 0
    assert set(found.notes) == {
        "tokens of prompts are counted by pieces of words",
        "tokens of answers are their characters over 4",
    }


def test_a_score_of_ones_own(file, tmp_path):
    found = route(file, **ARGS, score="gain", max_quality_loss="5%")
    assert found.scores == "column gain"
    assert found.verdict.strategy.threshold == 1.0
    with pytest.raises(ConfigError, match="--save: there is no router to save where --score has its own"):
        route(file, **ARGS, score="gain", save=tmp_path / "r.npz")


def test_the_router_that_was_certified_is_kept(file, tmp_path):
    found = route(file, **ARGS, max_quality_loss="5%", save=tmp_path / "router.npz")
    kept = SavedRouter.load(tmp_path / "router.npz")
    assert kept.threshold == found.verdict.strategy.threshold
    assert kept.choose(f"{HARD} 7") == "large"
    assert kept.choose(f"{EASY} 7") == "small"
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for name, text in (("other.npz", None), ("none.npz", None), ("text.npz", "x")):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}: is no router of `halve route --save`"):
            SavedRouter.load(tmp_path / name)
    with pytest.raises(OutputError, match="can't be written"):
        route(file, **ARGS, save=tmp_path / "none" / "router.npz")


def test_json_is_whole(file):
    plain = route(file, **ARGS, requests_per_month=2_000_000).to_plain()
    json.dumps(plain, allow_nan=False)
    by = {one["name"]: one for one in plain["strategies"]}
    assert by["always dear"]["usd_per_month"] == 2 * by["always dear"]["usd_per_million"]
    assert plain["curve"][0]["dear_share"] == 0
    assert plain["curve"][-1]["dear_share"] == 1
    assert plain["models"]["dear"] == {"name": "large", "input_usd_per_mtok": 10, "output_usd_per_mtok": 30,
                                       "origin": "stated on the command line"}  # fmt: skip


def test_pages_and_drawings(file, tmp_path):
    found = route(file, **ARGS, plot=tmp_path / "r.html")
    route(file, **ARGS, plot=tmp_path / "r.svg", requests_per_month=10)
    ElementTree.parse(tmp_path / "r.svg")
    html = (tmp_path / "r.html").read_text()
    assert not re.search(r"<script|<link|<img|url\(|(?:src|href)=\"(?!#)", html)
    assert html.count('<span lang="en">') == html.count('<span lang="ja">') > 20
    assert f"{found.verdict.certified_on:,} questions that it was not chosen on" in html
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
    with pytest.raises(ConfigError, match=r"--plot .*r\.png: ends in neither \.svg nor \.html"):
        route(file, **ARGS, plot=tmp_path / "r.png")
    with pytest.raises(OutputError, match="can't be written"):
        route(file, **ARGS, plot=tmp_path / "none" / "r.svg")


def test_models_that_leave_nothing_to_save(tmp_path):
    same = [{**row, "large": row["small"]} for row in rows()]
    found = route(write(tmp_path / "q.jsonl", same), cheap="small=10/30", dear="large=1/3")
    assert found.recovered is None
    assert not found.is_better
    assert any("large is not right more often than small here: always ask small" in note for note in found.notes)
    assert any("small costs no less than large" in note for note in found.notes)


def test_a_blind_router_is_told(tmp_path):
    rng = np.random.default_rng(0)
    blind = [
        {"prompt": f"{i}", "small": bool(rng.random() < 0.5), "large": bool(rng.random() < 0.8)} for i in range(200)
    ]
    found = route(write(tmp_path / "q.jsonl", blind), **ARGS, answer_tokens=10)
    said = "the router is not shown to be better than sending the shortest prompts to the dear model"
    assert said in found.notes
    assert "answers are taken to have 10 tokens" in found.notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, r":2: prompt: None must be a text"),
        ({"small": 2}, r":2: small: 2 must be true or false, or from 0 to 1"),
        ({"small": "yes"}, r":2: small: 'yes' must be true or false"),
        ({"small_tokens": -1}, r":2: small_tokens: -1 must be a whole number"),
        ({"small_tokens": 1.5}, r":2: small_tokens: 1\.5 must be a whole number"),
    ],
)
def test_values_that_cannot_be(tmp_path, change, said):
    found = rows(50)
    found[1] |= change
    with pytest.raises(DataError, match=said):
        route(write(tmp_path / "q.jsonl", found), **ARGS)


def test_files_that_are_none(tmp_path, file):
    with pytest.raises(DataError, match=r"none\.jsonl: can't be read"):
        route(tmp_path / "none.jsonl", **ARGS)
    with pytest.raises(DataError, match=r"q\.csv: questions are a \.jsonl file"):
        route(tmp_path / "q.csv", **ARGS)
    with pytest.raises(DataError, match=r"q\.jsonl:1: not JSON"):
        route(write(tmp_path / "q.jsonl", ["{"]), **ARGS)
    with pytest.raises(DataError, match=r"q\.jsonl:1: each line is an object"):
        route(write(tmp_path / "q.jsonl", ["[]"]), **ARGS)
    with pytest.raises(DataError, match=r"q\.jsonl: 3 questions; half of them choose and half certify, so give 40"):
        route(write(tmp_path / "q.jsonl", rows(3)), **ARGS)
    with pytest.raises(DataError, match=r":1: has no column 'smal'; did you mean 'small'\? it has gain, large"):
        route(file, cheap="smal=1/1", dear="large=1/1")
    with pytest.raises(DataError, match=r"gain: 'x' must be a number"):
        route(write(tmp_path / "q.jsonl", rows(50, gain="x")), **ARGS, score="gain")
    bare = [{"prompt": "x", "small": True, "large": True}] * 50
    with pytest.raises(DataError, match=r":1: how long the answers of small are is not told; give a column small_tok"):
        route(write(tmp_path / "q.jsonl", bare), **ARGS)


def test_compressed_files_and_named_lengths(tmp_path):
    found = [{**{k: v for k, v in row.items() if not k.startswith("large_")}, "n_chars": 40} for row in rows(60)]
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in found).encode()))
    one = route(path, cheap="small=0.6/0.6", dear="large:n_chars=10/30")
    # 10 tokens of an answer at 30 $ are 300 micro-dollars, and the prompt's
    assert 300 < one.always_dear.usd_per_million < 600


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("small", r"--cheap 'small': write COLUMN=INPUT/OUTPUT"),
        ("small=1", r"--cheap 'small=1': write COLUMN=INPUT/OUTPUT"),
        ("small=-1/2", r"--cheap small: '-1' must be from 0 to 100000"),
        ("small=1/x", r"--cheap small: 'x' is not a number"),
        ("small=nobody/nothing", r"--cheap nobody/nothing: has no known price"),
    ],
)
def test_models_that_are_none(text, said):
    with pytest.raises(ConfigError, match=said):
        read_model(text, "--cheap")


def test_words_that_contradict(file):
    with pytest.raises(ConfigError, match=r"--cheap and --dear are both 'small'"):
        route(file, cheap="small=1/1", dear="small=2/2")
    with pytest.raises(ConfigError, match=r"--max-quality-loss: '-1%' must be zero or more"):
        route(file, **ARGS, max_quality_loss="-1%")
    with pytest.raises(ConfigError, match=r"answer_tokens: 0 must be from 1"):
        route(file, **ARGS, answer_tokens=0)


def test_an_api_by_its_name():
    pytest.importorskip("genai_prices")
    column, length, prices = read_model("large:n=openai/gpt-4o-mini", "--dear")
    assert (column, length, prices.name) == ("large", "n", "large")
    assert prices.input_usd_per_mtok == Decimal("0.15")
    assert "genai-prices" in prices.origin


@pytest.mark.skipif(not REAL.exists(), reason="../shared/data/tasks is not here")
def test_mixtral_and_gpt4_on_gsm8k():
    found = route(
        REAL / "routellm_gsm8k_correctness.jsonl.gz",
        cheap="mixtral_8x7b:mixtral_chars=0.6/0.6",
        dear="gpt4:gpt4_chars=10/30",
        max_quality_loss="10%",
    )
    assert found.num_questions == 1319
    assert found.always_cheap.accuracy.value == pytest.approx(0.638, abs=0.04)
    assert found.always_dear.accuracy.value == pytest.approx(0.857, abs=0.03)
    assert found.oracle_as_good.usd_per_million < found.verdict.strategy.usd_per_million
