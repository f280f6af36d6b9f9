"""Plans: JSON and back, rules in order, and old files brought up to date."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import PlanError
from halve.core.plan import (
    MIGRATIONS,
    VERSIONS,
    Activations,
    KVCache,
    KVFormat,
    LayerCaches,
    Plan,
    Speculation,
    WeightRule,
    Weights,
    migrate,
)
from halve.core.record import to_dict

PLAN = Plan(
    portable=True,
    weights=Weights(
        rules=(
            WeightRule(pattern="model.layers.0.*", format="int8", method="rtn"),
            WeightRule(pattern="model.layers.*.mlp.*", format="int4-g32", method="clip"),
            WeightRule(pattern="*", format="bf16"),
        )
    ),
    activations=Activations(format="bf16"),
    kv_cache=KVCache(format="bf16"),
    speculation=Speculation(method="draft", path="draft", max_tokens=4),
)

rules = st.builds(WeightRule, pattern=st.text(), format=st.text(), method=st.sampled_from(["rtn", "clip", None]))
plans = st.builds(
    Plan,
    portable=st.booleans(),
    weights=st.builds(Weights, rules=st.lists(rules, max_size=4).map(tuple)),
    activations=st.builds(Activations, format=st.sampled_from(["fp32", "bf16", "int8", "fp8"])),
    kv_cache=st.builds(KVCache.of_layers, st.lists(st.sampled_from(get_args(KVFormat)), min_size=1, max_size=5)),
    speculation=st.builds(Speculation, method=st.sampled_from(["none", "ngram"]), max_tokens=st.integers(1, 32)),
)


@given(plans)
def test_every_plan_survives_json(plan):
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ('"method": "draft"', "speculation.path: None with method 'draft'; name a model"),
        ('"method": "ngram", "path": "x"', "speculation.path: 'x' with method 'ngram'"),
        ('"method": "ngram", "max_tokens": 0', "speculation.max_tokens: 0 must be from 1 to 32"),
        ('"method": "eagle"', "'eagle' is not one of"),
    ],
)
def test_speculation_that_cannot_be_is_refused(fields, what):
    with pytest.raises(PlanError, match=what):
        Plan.from_json(f'{{"version": 1, "speculation": {{{fields}, "version": 1}}}}')


def test_sections_that_are_left_out_take_their_defaults():
    assert Plan.from_json('{"version": 1}') == Plan()


def test_the_first_rule_that_matches_wins():
    rule_for = PLAN.weights.rule_for
    assert rule_for("model.layers.0.mlp.up_proj").format == "int8"
    assert rule_for("model.layers.1.mlp.up_proj").format == "int4-g32"
    assert rule_for("model.layers.1.self_attn.q_proj").format == "bf16"


def test_a_module_that_no_rule_matches_has_none():
    assert Weights(rules=PLAN.weights.rules[:2]).rule_for("lm_head") is None


def test_patterns_tell_capitals_apart_and_a_star_spans_dots():
    weights = Weights(rules=(WeightRule(pattern="model.*.q_proj", format="bf16"),))
    assert weights.rule_for("model.layers.11.self_attn.q_proj") is not None
    assert weights.rule_for("Model.layers.11.self_attn.q_proj") is None


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "model.layers.1*",
        "model.layers.[12].mlp*",
        "model.layers.?1.*",
        "lm_head",
        "model.layers.11.*",
        "mode*d",
        "",
    ],
)
def test_rules_of_names_that_begin_alike_are_all_that_can_match_them(pattern):
    weights = Weights(rules=(WeightRule(pattern=pattern, format="int8"),))
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in (1, 2, 11, 21) for part in ("up", "down")]
    for name in [*names, "lm_head", "model.embed_tokens"]:
        for length in range(len(name)):
            assert weights.of_names(name[:length]).rule_for(name) == weights.rule_for(name)


def test_rules_of_other_layers_are_left_out():
    rules = tuple(WeightRule(pattern=f"model.layers.{i}.mlp.*", format="int8") for i in range(12))
    assert Weights(rules=rules).of_names("model.layers.1.").rules == rules[1:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guesses": {"version": 1}}, r"^plan: unknown keys \['guesses'\]; known keys are \['activations', "),
        ({"weights": {"version": 1}}, r"^plan\.weights: missing keys \['rules'\]"),
        (
            {"weights": {"rules": [{"pattern": "*", "format": "int8", "method": "awq"}], "version": 1}},
            "rules.0..method",
        ),
        ({"kv_cache": {"format": "int3", "version": 1}}, r"^plan\.kv_cache\.format: 'int3' is not one of"),
        (
            {"kv_cache": {"format": "bf16", "layers": [{"layers": [0], "format": "int5"}], "version": 2}},
            r"^plan\.kv_cache\.layers\[0\]\.format: 'int5' is not one of",
        ),
        (
            {"kv_cache": {"format": "bf16", "layers": [{"layers": [], "format": "int8"}], "version": 2}},
            r"^kv_cache\.layers: \[\] in int8; name layers, 0 for the first",
        ),
        (
            {"kv_cache": {"format": "bf16", "layers": [{"layers": [-1], "format": "int8"}], "version": 2}},
            r"^kv_cache\.layers: \[-1\] in int8",
        ),
        (
            {"kv_cache": {"format": "bf16", "layers": [{"layers": [1, 2, 1], "format": "int8"}], "version": 2}},
            r"^kv_cache\.layers: \[1\] are named twice; a layer has one format",
        ),
        ({"kv_cache": {"format": "bf16", "version": 3}}, "^kv_cache: version 3 was written by a newer Halve"),
        ({"activations": {"format": "fp4", "version": 1}}, r"^plan\.activations\.format: 'fp4' is not one of"),
        ({"portable": 1}, "^plan.portable: expected bool, got 1"),
        ({"version": 2}, r"^plan: version 2 was written by a newer Halve \(this one reads up to 1\)"),
        ({"version": "1"}, "^plan.version: expected a whole number, got '1'"),
        ({"version": True}, "^plan.version: expected a whole number, got True"),
        ({"version": None}, "^plan.version: expected a whole number, got None"),
        ({"version": 0}, r"^plan: version 0 can't be read any more; known steps start at \[\]"),
        ({"weights": {"rules": [], "version": 7}}, "^weights: version 7 was written by a newer Halve"),
        ({"weights": {"rules": []}}, r"^weights\.version: expected a whole number, got None"),
        ({"kv_cache": []}, r"^kv_cache: expected an object, got \[\]"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(change, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps({"version": 1, **change}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "^plan: not JSON"),
        ("[]", r"^plan: expected an object, got \[\]"),
        ('{"version": 1, "version": 1}', r"^plan: duplicate keys \['version'\]"),
        ('{"version": 1, "portable": NaN}', "^plan: NaN is not a JSON number"),
        ('{"version": ' + "9" * 5000 + "}", "^plan: not JSON: .*digits"),
        ('{"version": ' + "9" * 4000 + "}", "^plan: version 9+ was written by a newer Halve"),
        ('{"version": ' + "[" * 900 + "]" * 900 + "}", r"^plan\.version: expected a whole number"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


@given(st.lists(st.sampled_from(get_args(KVFormat)), min_size=1, max_size=6))
def test_a_cache_of_layers_has_the_format_of_each(formats):
    cache = KVCache.of_layers(formats)
    assert cache.formats(len(formats)) == tuple(formats)
    assert set(cache.names) == set(formats)


def test_a_caches_formats_are_said_in_words_and_layers_beyond_the_model_are_refused():
    cache = KVCache.of_layers(["int4", "int8", "int4", "int4", "int8", "bf16"])
    assert str(cache) == "int4, int8 in layers 1 and 4, bf16 in layer 5"
    assert str(KVCache(format="int4")) == "int4"
    with pytest.raises(PlanError, match=r"^kv_cache.layers: \[4, 5\] of a model with layers 0 to 3"):
        cache.formats(4)
    with pytest.raises(PlanError, match="named twice"):
        KVCache(layers=(LayerCaches(layers=(0,), format="int8"), LayerCaches(layers=(0,), format="int4")))


def test_a_cache_from_before_layers_had_formats_reads_as_it_did():
    old = {"version": 1, "kv_cache": {"format": "int8", "version": 1}}
    assert Plan.from_json(json.dumps(old)).kv_cache == KVCache(format="int8")


# A history that never was: "kv" became kv_cache, kv_cache.bits became .dtype, .dtype became .format.
STEPS = {
    "plan": {
        1: lambda raw: {("kv_cache" if key == "kv" else key): value for key, value in raw.items()},
    },
    "weights": {},
    "activations": {},
    "kv_cache": {
        1: lambda raw: {"dtype": {16: "bf16", 32: "fp32"}[raw["bits"]]},
        2: lambda raw: {"format": raw["dtype"]},
    },
}
TODAY = {"plan": 2, "weights": 1, "activations": 1, "kv_cache": 3}


def test_an_old_plan_is_upgraded_section_by_section_and_step_by_step():
    old = {"version": 1, "kv": {"version": 1, "bits": 32}, "weights": {"version": 1, "rules": []}}
    assert migrate(old, STEPS, TODAY) == {
        "version": 2,
        "kv_cache": {"version": 3, "format": "fp32"},
        "weights": {"version": 1, "rules": []},
    }
    assert old == {"version": 1, "kv": {"version": 1, "bits": 32}, "weights": {"version": 1, "rules": []}}


def test_a_plan_from_the_middle_takes_only_the_steps_it_needs():
    assert migrate({"version": 2, "kv_cache": {"version": 2, "dtype": "bf16"}}, STEPS, TODAY) == {
        "version": 2,
        "kv_cache": {"version": 3, "format": "bf16"},
    }


def test_a_version_that_no_step_leads_on_from_is_refused():
    with pytest.raises(PlanError, match=r"^kv_cache: version 0 can't be read any more; known steps start at \[1, 2\]"):
        migrate({"version": 2, "kv_cache": {"version": 0}}, STEPS, TODAY)


def test_a_section_newer_than_this_halve_is_refused_by_name():
    with pytest.raises(
        PlanError, match=r"^kv_cache: version 4 was written by a newer Halve \(this one reads up to 3\)"
    ):
        migrate({"version": 2, "kv_cache": {"version": 4}}, STEPS, TODAY)


def test_a_plan_of_today_passes_through_migration_unchanged():
    assert migrate(to_dict(PLAN)) == to_dict(PLAN)


def test_the_table_of_versions_is_what_the_records_write_and_every_gap_has_a_step():
    written = to_dict(Plan())
    assert {
        "plan": written["version"],
        **{key: value["version"] for key, value in written.items() if isinstance(value, dict)},
    } == VERSIONS
    assert MIGRATIONS.keys() == VERSIONS.keys()
    for section, version in VERSIONS.items():
        assert sorted(MIGRATIONS[section]) == list(range(1, version))
