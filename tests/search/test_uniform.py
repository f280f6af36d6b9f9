"""One format for the whole model: ranked by bytes, found by bisection."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.compress import resolve
from halve.core.certificate import Measured
from halve.core.errors import PlanError
from halve.core.plan import Plan, WeightRule, Weights
from halve.formats import FORMATS
from halve.models import LayerSpec, ModelConfig
from halve.models.config import Rope
from halve.models.names import modules
from halve.search import (
    Candidate,
    Judged,
    bytes_per_token,
    candidates,
    cheapest_passing,
    method_for,
    plain_bytes_per_token,
    plan_for,
)

HIDDEN, INNER, VOCAB = 128, 256, 100
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=VOCAB,
    context=64,
    rms_norm_eps=1e-5,
    tied=False,
    attention_bias=False,
    mlp_bias=False,
    layers=(LayerSpec(rope=Rope(theta=1e4)),) * 3,
)
TIED = replace(CONFIG, tied=True)
LAYER = 128 * 128 * 2 + 64 * 128 * 2 + 128 * 256 * 3  # weights: q, o, k, v, gate, up, down
NORMS = (3 * 2 + 1) * HIDDEN * 4  # bytes, as float32
COMPRESSED = [f.name for f in FORMATS.values() if f.scaled]


def stored(config, name):
    return {m.name: FORMATS[name] for m in modules(config)}


def ranked(config=CONFIG, name="bf16", *, portable=False, method="auto"):
    return candidates(config, method, portable=portable, source=stored(config, name))


def test_a_plain_model_reads_its_products_and_one_row_of_an_untied_table():
    head = VOCAB * HIDDEN * 2
    assert plain_bytes_per_token(CONFIG, stored(CONFIG, "bf16")) == 3 * LAYER * 2 + head + HIDDEN * 2 + NORMS


def test_a_tied_table_is_read_whole_and_once():
    assert plain_bytes_per_token(TIED, stored(TIED, "bf16")) == 3 * LAYER * 2 + VOCAB * HIDDEN * 2 + NORMS


def test_biases_are_read_as_float32():
    biased = replace(CONFIG, attention_bias=True, mlp_bias=True)
    extra = 3 * (128 + 64 + 64 + 128 + 256 + 256 + 128) * 4
    plain = plain_bytes_per_token(CONFIG, stored(CONFIG, "bf16"))
    assert plain_bytes_per_token(biased, stored(biased, "bf16")) == plain + extra


def test_a_compressed_model_reads_codes_and_scales():
    plan = plan_for(CONFIG, FORMATS["int4-g32"], "rtn", portable=False, source=stored(CONFIG, "bf16"))
    weights = 3 * LAYER + VOCAB * HIDDEN + HIDDEN
    assert bytes_per_token(CONFIG, resolve(plan, CONFIG), stored(CONFIG, "bf16")) == weights * 4.5 / 8 + NORMS


def test_a_portable_tied_model_still_reads_its_table_in_16_bits():
    plan = plan_for(TIED, FORMATS["int8"], "rtn", portable=True, source=stored(TIED, "bf16"))
    rows = 3 * (128 + 128 + 64 + 64 + 256 + 256 + 128)
    assert bytes_per_token(TIED, resolve(plan, TIED), stored(TIED, "bf16")) == (
        3 * LAYER + rows * 2 + VOCAB * HIDDEN * 2 + NORMS
    )


@pytest.mark.parametrize(("source", "table"), [("fp32", "bf16"), ("bf16", None), ("fp16", None)])
def test_a_portable_plan_brings_a_32_bit_table_to_bf16_and_leaves_others(source, table):
    plan = plan_for(CONFIG, FORMATS["int8"], "rtn", portable=True, source=stored(CONFIG, source))
    rule = plan.weights.rule_for("model.embed_tokens")
    assert (rule and rule.format) == table


def test_what_a_rule_leaves_alone_counts_as_it_is_stored():
    plan = Plan(weights=Weights(rules=(WeightRule(pattern="lm_head", format="int8", method="rtn"),)))
    source = {**stored(CONFIG, "bf16"), "model.layers.0.mlp.up_proj": FORMATS["fp32"]}
    expected = 3 * LAYER * 2 + 128 * 256 * 2 + VOCAB * HIDDEN + VOCAB * 2 + HIDDEN * 2 + NORMS
    assert bytes_per_token(CONFIG, resolve(plan, CONFIG), source) == expected


@pytest.mark.parametrize("portable", [False, True])
def test_candidates_are_ranked_by_bytes_and_every_format_is_there(portable):
    found = ranked(portable=portable)
    fitting = [c for c in found if c.plan is not None]
    assert [c.bytes_per_token for c in fitting] == sorted(c.bytes_per_token for c in fitting)
    assert sorted(c.format for c in found) == sorted(COMPRESSED)
    assert fitting[0].format == "int2-g64"
    assert all(c.refusal is None for c in fitting)
    assert {c.plan.portable for c in fitting} == {portable}


def test_fp8_is_skipped_with_the_reason():
    (fp8,) = [c for c in ranked() if c.format == "fp8"]
    assert (fp8.plan, fp8.bytes_per_token) == (None, None)
    assert fp8.refusal == "as many bytes as int8 with fewer significant bits; ask for it by --format fp8"


def test_a_format_that_does_not_fit_is_skipped_with_the_module_and_the_rule():
    config = replace(CONFIG, intermediate_size=96)
    refused = {c.format: c.refusal for c in ranked(config) if c.plan is None}
    assert {name for name in refused if name != "fp8"} == {n for n in COMPRESSED if n.endswith(("g64", "g128"))}
    assert refused["int4-g64"].startswith(
        "model.layers.0.mlp.down_proj: format int4-g64: group_size 64 does not divide"
    )
    assert [c.plan is None for c in ranked(config)] == sorted(c.plan is None for c in ranked(config))


@pytest.mark.parametrize(
    ("name", "asked", "method"),
    [("int4-g32", "auto", "clip"), ("int8", "auto", "clip"), ("fp8", "auto", "rtn"), ("int8", "rtn", "rtn")],
)
def test_auto_chooses_the_method_by_the_kind_of_format(name, asked, method):
    assert method_for(FORMATS[name], asked) == method


@pytest.mark.parametrize("method", ["auto", "rtn", "clip"])
def test_the_method_of_a_candidate_is_that_of_its_plan(method):
    for candidate in ranked(method=method):
        if candidate.plan is not None:
            assert {r.method for r in candidate.plan.weights.rules} == {candidate.method}


def line(n):
    return [Candidate(format=str(i), method="rtn", plan=Plan(), bytes_per_token=i) for i in range(n)]


def judge_from(first):
    """Those at `first` and above pass; the calls are kept."""
    calls = []

    def judge(candidate):
        calls.append(candidate.bytes_per_token)
        one = Measured(value=1, low=1, high=1, n=1)
        return Judged(
            format=candidate.format,
            method=candidate.method,
            bytes_per_token=candidate.bytes_per_token,
            ppl_ratio=one,
            kl_mean=one,
            passed=candidate.bytes_per_token >= first,
        )

    return judge, calls


@given(st.integers(0, 60), st.data())
def test_bisection_finds_the_cheapest_that_passes_with_few_judgements(n, data):
    first = data.draw(st.integers(0, n))
    judge, calls = judge_from(first)
    found, judged = cheapest_passing(line(n), judge)
    assert found == (first if first < n else None)
    assert len(calls) == len(set(calls)) <= n.bit_length()
    assert sorted(judged) == sorted(calls)
    if 0 < first < n:
        assert not judged[first - 1].passed
        assert judged[first].passed


def test_without_candidates_nothing_is_judged():
    judge, calls = judge_from(0)
    assert cheapest_passing([], judge) == (None, {})
    assert calls == []


def test_when_none_passes_the_dearest_was_judged():
    judge, calls = judge_from(99)
    found, judged = cheapest_passing(line(16), judge)
    assert found is None
    assert not judged[15].passed
    assert 15 in calls


def test_a_plan_made_for_a_tied_model_names_no_head():
    plan = plan_for(TIED, FORMATS["int8"], "rtn", portable=False, source=stored(TIED, "bf16"))
    assert [a.format.name for a in resolve(plan, TIED)] == ["int8"] * (1 + 3 * 7)
    with pytest.raises(PlanError, match="matches no module"):
        resolve(plan_for(CONFIG, FORMATS["int8"], "rtn", portable=False, source=stored(CONFIG, "bf16")), TIED)
