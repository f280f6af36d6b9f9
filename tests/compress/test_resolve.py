"""Plans to assignments: every rule of the target is checked before any work."""

from dataclasses import replace

import pytest

from halve.compress import resolve, uniform_plan
from halve.core.errors import FormatError, PlanError
from halve.core.plan import Activations, KVCache, Plan, WeightRule, Weights
from halve.formats import FORMATS
from halve.models import LayerSpec, ModelConfig
from halve.models.config import Rope
from halve.models.names import modules

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=50,
    context=64,
    rms_norm_eps=1e-5,
    tied=False,
    attention_bias=False,
    mlp_bias=False,
    layers=(LayerSpec(rope=Rope(theta=1e4)),) * 2,
)
TIED = replace(CONFIG, tied=True)


def plan(*rules, portable=False):
    return Plan(
        portable=portable,
        kv_cache=KVCache(format="fp32" if portable else "bf16"),
        weights=Weights(
            rules=tuple(WeightRule(pattern=r[0], format=r[1], method=r[2] if len(r) > 2 else None) for r in rules)
        ),
    )


def assigned(*rules, config=CONFIG, portable=False):
    return {a.module.name: a for a in resolve(plan(*rules, portable=portable), config)}


def test_every_module_gets_one_assignment_in_the_models_order():
    found = resolve(plan(("model.layers.*", "int8", "rtn")), CONFIG)
    assert [a.module for a in found] == list(modules(CONFIG))


def test_the_first_rule_that_matches_wins_and_what_none_matches_stays():
    found = assigned(("*.0.self_attn.*", "int8", "rtn"), ("model.layers.*", "int4-g32", "clip"))
    q, up = found["model.layers.0.self_attn.q_proj"], found["model.layers.0.mlp.up_proj"]
    assert (q.format, q.method) == (FORMATS["int8"], "rtn")
    assert (up.format, up.method) == (FORMATS["int4-g32"], "clip")
    assert (found["lm_head"].format, found["lm_head"].method) == (None, None)


def test_groups_name_the_energy_of_a_modules_input():
    found = assigned(("lm_head", "int8", "rtn"))
    assert found["model.layers.1.self_attn.k_proj"].group == "layers.1.qkv"
    assert found["model.layers.1.mlp.down_proj"].group == "layers.1.down"
    assert found["lm_head"].group == "lm_head"
    assert found["model.embed_tokens"].group == "embedding"


def test_a_tied_table_is_a_product_and_of_the_heads_group():
    found = assigned(("model.embed_tokens", "int8", "rtn"), config=TIED)
    assert found["model.embed_tokens"].group == "lm_head"
    assert "lm_head" not in found


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*", "int7", "rtn")], r"rules\[0\] \('\*'\): unknown format 'int7'; known formats are fp32, "),
        ([("*", "bf16", "rtn")], "format bf16 is stored as it is and takes no method"),
        ([("*", "int8")], "format int8 needs a method: rtn, clip or gptq"),
        ([("model.layer.*", "int8", "rtn")], r"rules\[0\]: pattern 'model\.layer\.\*' matches no module"),
        ([("*", "int8", "rtn"), ("lm_head", "bf16")], r"rules\[1\]: pattern 'lm_head' matches no module that is still"),
        ([("lm_head", "bf16"), ("lm_head", "bf16")], r"rules\[1\]: pattern 'lm_head' matches no module"),
    ],
)
def test_a_rule_that_can_not_be_kept_is_named(rules, message):
    with pytest.raises(PlanError, match=message):
        resolve(plan(*rules), CONFIG)


def test_a_width_that_groups_do_not_divide_names_the_module_and_what_fits():
    with pytest.raises(FormatError) as caught:
        assigned(("model.layers.*", "int4-g64", "rtn"))
    message = str(caught.value)
    assert message.startswith(
        "model.layers.0.mlp.down_proj: format int4-g64: group_size 64 does not divide in_features 96; "
    )
    fitting = message.partition("formats that fit it: ")[2].split(", ")
    assert fitting == [f.name for f in FORMATS.values() if f.scaled and f.group_size in (None, 32)]


@pytest.mark.parametrize(("config", "words"), [(CONFIG, "its embedding table"), (TIED, "its tied embedding table")])
def test_a_portable_bundle_keeps_its_table_in_16_bits(config, words):
    with pytest.raises(PlanError, match=rf"model\.embed_tokens: a portable bundle keeps {words} in 16 bits, not int8"):
        assigned(("*", "int8", "rtn"), config=config, portable=True)
    assigned(("model.embed_tokens", "bf16"), config=config, portable=True)
    assigned(("*", "int8", "rtn"), config=config)


@pytest.mark.parametrize(
    ("pattern", "group"), [("*.1.self_attn.q_proj", "layers.1.qkv"), ("*.0.mlp.up_proj", "layers.0.gate_up")]
)
@pytest.mark.parametrize("rest", ["int4-g32", None])
def test_a_portable_bundle_needs_one_format_for_a_fused_group(pattern, group, rest):
    rules = [(pattern, "int8", "rtn")] + ([("model.layers.*", rest, "rtn")] if rest else [])
    with pytest.raises(PlanError, match=rf"{group}: a portable bundle needs one format for a fused group, not .*int8"):
        assigned(*rules, portable=True)
    assert assigned(*rules)


def test_products_of_their_own_may_differ_in_a_portable_bundle():
    found = assigned(
        ("*.o_proj", "int8", "rtn"),
        ("*.down_proj", "int3-g32", "clip"),
        ("*.layers.*", "int4-g32", "clip"),
        portable=True,
    )
    assert found["model.layers.0.self_attn.o_proj"].format.name == "int8"


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("source_bits", [16, 32])
def test_a_uniform_plan_is_valid_and_compresses_every_product_it_may(config, portable, source_bits):
    made = uniform_plan(config, FORMATS["int4-g32"], "clip", portable=portable, source_bits=source_bits)
    found = {a.module.name: a.format and a.format.name for a in resolve(made, config)}
    table = found.pop("model.embed_tokens")
    assert table == ("int4-g32" if not portable else "bf16" if source_bits == 32 else None)
    assert set(found.values()) == {"int4-g32"}


def test_a_plain_format_needs_no_method():
    found = assigned(("*", "fp16"))
    assert {(a.format.name, a.method) for a in found.values()} == {("fp16", None)}


@pytest.mark.parametrize(
    ("name", "portable", "activations", "kv_format"),
    [
        ("int4-g32", False, "int8", "bf16"),
        ("int8", False, "int8", "bf16"),
        ("fp8", False, "fp32", "bf16"),
        ("int4-g32", True, "fp32", "fp32"),
        ("fp8", True, "fp32", "fp32"),
    ],
)
def test_by_default_integer_weights_meet_int8_and_a_portable_plan_rounds_nothing(
    name, portable, activations, kv_format
):
    made = uniform_plan(CONFIG, FORMATS[name], "rtn", portable=portable, source_bits=16)
    assert (made.activations.format, made.kv_cache.format) == (activations, kv_format)
    resolve(made, CONFIG)


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kv_cache", ["fp32", "bf16", "int8"])
def test_a_native_plan_rounds_activations_and_cache_as_asked(activations, kv_cache):
    made = uniform_plan(
        CONFIG, FORMATS["int8"], "rtn", portable=False, source_bits=16, activations=activations, kv_cache=kv_cache
    )
    assert (made.activations.format, made.kv_cache.format) == (activations, kv_cache)
    resolve(made, CONFIG)


@pytest.mark.parametrize("chosen", ["bf16", "int8"])
@pytest.mark.parametrize("what", ["activations", "kv_cache"])
def test_a_portable_plan_that_rounds_activations_or_cache_is_refused(what, chosen):
    made = uniform_plan(CONFIG, FORMATS["int8"], "rtn", portable=True, source_bits=16, **{what: chosen})
    message = rf"{what} {chosen}: a portable plan computes in float32, .*; leave out --portable, or take {what} fp32"
    with pytest.raises(PlanError, match=message):
        resolve(made, CONFIG)


def test_int8_activations_that_would_meet_floats_alone_are_refused():
    made = uniform_plan(CONFIG, FORMATS["fp8"], "rtn", portable=False, source_bits=16, activations="int8")
    with pytest.raises(
        PlanError, match=r"activations int8: they meet integer weights only, .* floats \(fp8\); take fp32"
    ):
        resolve(made, CONFIG)
    mixed = replace(plan(("lm_head", "int8", "rtn"), ("*", "fp8", "rtn")), activations=Activations(format="int8"))
    assert len(resolve(mixed, CONFIG)) == len(list(modules(CONFIG)))


def test_fp8_activations_that_would_meet_no_fp8_weights_are_refused():
    made = uniform_plan(CONFIG, FORMATS["int8"], "rtn", portable=False, source_bits=16, activations="fp8")
    with pytest.raises(
        PlanError, match=r"activations fp8: they meet fp8 weights only, and none .* \(int8\); take fp32"
    ):
        resolve(made, CONFIG)
    mixed = replace(plan(("lm_head", "int8", "rtn"), ("*", "fp8", "rtn")), activations=Activations(format="fp8"))
    assert len(resolve(mixed, CONFIG)) == len(list(modules(CONFIG)))
