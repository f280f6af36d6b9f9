"""What the screen predicts against KL measured on whole models, and how both become one estimate."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halve.compress import Choice, Hessians, Statistics, calibrate
from halve.core.errors import DataError
from halve.core.record import from_json, to_json
from halve.evaluate import compare
from halve.evaluate.scorer import DecoderScorer
from halve.formats import FORMATS
from halve.kernels.reference import TorchOps
from halve.models import Decoder, read_config
from halve.models.names import EMBEDDING
from halve.search.fisher import Rows, fisher
from halve.search.sensitivity import (
    Score,
    Screen,
    Sensitivity,
    analyse,
    anchors,
    fitted,
    options_of,
    parts_of,
    typical_slope,
)
from halve.search.swaps import Swapped, Swaps
from tests.tools import StateDictSource

WINDOW = 48


class Case:
    """A random model with everything that the screen needs."""

    def __init__(self, folder, tied):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=90,
            max_position_embeddings=64,
            initializer_range=0.15,
            tie_word_embeddings=tied,
        )
        self.source = StateDictSource(LlamaForCausalLM(config).eval().state_dict())
        self.config = read_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).with_kv_format("fp32")
        rng = np.random.default_rng(0)
        self.windows = [rng.integers(0, 90, WINDOW).astype(np.int32) for _ in range(40)]
        hessians = Hessians(folder=folder)
        energies = calibrate(self.config, self.source, self.windows, window_tokens=WINDOW, hessians=hessians)
        self.statistics = Statistics(energies=energies, hessians=hessians)
        self.fisher = fisher(self.config, self.source, TorchOps(), self.windows)
        self.original = Decoder(self.config, TorchOps(), self.source)
        self.swaps = Swaps(self.original, self.source, self.windows[:20], device="cpu")
        self.screen = Screen(self.config, self.source, self.statistics, self.fisher, self.swaps)
        self.parts = parts_of(self.config)
        self.stored = {m.name: FORMATS["fp32"] for p in self.parts for m in p.modules}

    def options(self, part, **changes):
        given = {"portable": False, "allowed": lambda f: True, **changes}
        return options_of(part, self.stored, lambda f: "gptq" if f.bits < 8 else "clip", **given)


@pytest.fixture(scope="module", name="case", params=[False, True], ids=["untied", "tied"])
def _case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("hessians"), request.param)


def test_the_parts_are_the_fused_groups_and_an_untied_table(case):
    names = [p.name for p in case.parts]
    assert names[-1] == "lm_head"
    assert ("embedding" in names) != case.config.tied
    assert {m.name for p in case.parts for m in p.modules} == set(case.stored)


def test_the_screen_predicts_what_a_swap_measures(case):
    for part in case.parts:
        options = [Choice(format=f, method="rtn") for f in ("int6-g32", "int4-g32")]
        for score in case.screen.score(part, options, measure=lambda o: True):
            assert 0.5 < score.measured / score.predicted < 2, (part.name, score)


def test_rows_that_are_drawn_say_what_all_rows_say(case):
    sampled = Screen(case.config, case.source, case.statistics, case.fisher, None, 40)
    whole = Screen(case.config, case.source, case.statistics, case.fisher, None)
    for part in case.parts:
        options = [Choice(format=f, method="clip") for f in ("int6-g32", "int4-g32", "int3-g32")]
        pairs = zip(*(s.score(part, options, measure=lambda o: False) for s in (sampled, whole)), strict=True)
        for some, every in pairs:
            assert some.predicted == pytest.approx(every.predicted, rel=0.15), (part.name, some)
            assert some.predicted != every.predicted  # it was drawn


def test_drawn_rows_are_few_certain_where_they_count_most_and_without_bias():
    rng = np.random.default_rng(0)
    importance = rng.pareto(1.5, 5000)
    rows = Rows.drawn(importance, 200)
    assert len(rows.index) == len(set(rows.index)) == pytest.approx(200, abs=1)
    assert int(importance.argmax()) in rows.index
    assert rows.stands_for.min() == 1
    assert rows.stands_for.sum() == pytest.approx(5000, rel=0.4)
    values = importance * rng.uniform(0.5, 1.5, 5000)
    assert rows.stands_for @ values[rows.index] == pytest.approx(values.sum(), rel=0.05)
    nothing = Rows.drawn(np.zeros(5000), 100)  # no token asked for any of them
    assert nothing.stands_for @ np.ones(5000)[nothing.index] == pytest.approx(5000)
    assert np.array_equal(Rows.drawn(importance[:30], 30).index, np.arange(30))


def test_a_swap_measures_the_kl_of_the_whole_model_with_that_group_stored_so(case):
    originals = DecoderScorer(case.original)
    for part in (case.parts[0], case.parts[2], case.parts[-1]):
        weights = case.screen.weights(part, Choice(format="int3-g32", method="rtn"))
        other = DecoderScorer(Decoder(case.config, TorchOps(), Swapped(case.source, weights)))
        scores = compare(originals, other, case.windows[:20], window_tokens=WINDOW)
        # A window's last position predicts no token of the text, but counts in a swap.
        assert case.swaps.kl(part.group, weights) == pytest.approx(float(scores.kl.mean()), rel=0.05)


def test_a_swap_leaves_the_original_as_it_was(case):
    part = next(p for p in case.parts if p.name == "layers.0.down")
    weights = {part.modules[0].name: case.source.weight(part.modules[0].name, part.modules[0].shape)}
    assert case.swaps.kl(part.group, weights) < 1e-9


def test_options_are_what_fits_and_the_group_as_it_is(case):
    down = next(p for p in case.parts if p.name == "layers.0.down")  # 96 inputs
    names = [o.format for o in case.options(down)]
    assert names[-1] == "fp32"
    assert {n for n in names if "-g64" in n or "-g128" in n} == set()
    assert {"int8", "int2-g32"} <= set(names)
    assert all(o.method == ("gptq" if "int8" not in o.format else "clip") for o in case.options(down)[:-1])
    head = case.parts[-1]
    tables = [o.format for o in case.options(head, portable=True)]
    assert tables == ["bf16"] if case.config.tied else "int8" in tables
    if not case.config.tied:
        assert case.parts[0].modules[0].name == EMBEDDING
        assert [o.format for o in case.options(case.parts[0], portable=True)] == ["bf16"]


def test_one_option_of_each_number_of_bits_is_an_anchor(case):
    options = case.options(case.parts[-1])
    assert [o.format for o in anchors(options, 9)] == [
        "int4-g64", "int8", "int3-g64", "int5-g64", "int2-g64", "int6-g64",
    ]  # fmt: skip
    assert [o.format for o in anchors([Choice(format="int8", method="rtn")], 4)] == ["int8"]


def score(predicted, measured=None, name="int4-g32"):
    return Score(format=name, method="clip", predicted=predicted, measured=measured, loss=predicted)


def test_a_fit_finds_the_slope_and_what_does_not_depend_on_weights():
    scores = [score(p, m) for p, m in ((1e-3, 0.7e-3 + 1e-4), (4e-3, 2.8e-3 + 1e-4), (1e-2, None), (1e-6, None))]
    found = fitted(scores)
    assert [s.loss for s in found] == pytest.approx([8e-4, 2.9e-3, 7.1e-3, 1.007e-4], rel=1e-6)


def test_of_one_or_no_measurement_the_slope_is_scaled_or_given():
    one = fitted([score(1e-3, 2e-3), score(3e-3)])
    assert [s.loss for s in one] == pytest.approx([2e-3, 6e-3])
    none = fitted([score(1e-3), score(0.0, name="bf16")], slope=0.5)
    assert [s.loss for s in none] == pytest.approx([5e-4, 0.0])
    assert typical_slope({"a": [score(1.0, 0.5), score(1.0, 0.6)], "b": [score(1.0, 0.7)]}) == pytest.approx(0.6)
    assert typical_slope({"a": [score(1.0)]}) == 1.0


def run(case, **options):
    parts = case.parts[-2:]
    return analyse(
        case.screen, parts, {p.name: case.options(p) for p in parts}, num_tokens=case.swaps.num_tokens, **options
    ), parts


def test_every_option_has_a_loss_and_fewer_bits_lose_more(case):
    sensitivity, parts = run(case)
    assert sensitivity.num_tokens == 20 * WINDOW
    for part in parts:
        scores = {s.format: s for s in sensitivity.parts[part.name]}
        assert scores.keys() == {o.format for o in case.options(part)}
        assert scores["int2-g32"].loss > scores["int4-g32"].loss > scores["int8-g32"].loss > scores["fp32"].loss == 0
    assert from_json(Sensitivity, to_json(sensitivity)) == sensitivity


def test_when_time_is_over_the_rest_is_screened_only(case):
    now = iter(range(1000))
    sensitivity, parts = run(case, time_s=2.5, clock=lambda: float(next(now)))
    measured = [s for p in parts for s in sensitivity.parts[p.name] if s.measured is not None]
    assert 0 < len(measured) < 5


def test_parts_that_were_scored_are_taken_as_they_are(case):
    kept = {}
    first, parts = run(case, keep=lambda name, scores: kept.update({name: scores}))
    assert kept.keys() == {p.name for p in parts}
    screen, case.screen = case.screen, None
    try:
        assert run(case, known=kept)[0] == first
    finally:
        case.screen = screen


def test_a_text_without_tokens_is_refused(case):
    with pytest.raises(DataError, match="the calibration text holds no tokens"):
        fisher(case.config, case.source, TorchOps(), [np.zeros(0, np.int32)])
