"""Plans of one format, and the bytes that a plan reads for a token."""

from dataclasses import replace

import pytest

from halve.compress import resolve
from halve.core.errors import PlanError
from halve.core.plan import Plan, WeightRule, Weights
from halve.formats import FORMATS
from halve.models import LayerSpec, ModelConfig, sizes
from halve.models.config import Rope
from halve.models.names import modules
from halve.search import bytes_per_token, method_for, plan_for

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


def stored(config, name):
    return {m.name: FORMATS[name] for m in modules(config)}


def test_a_plain_model_reads_its_products_and_one_row_of_an_untied_table():
    head = VOCAB * HIDDEN * 2
    assert sizes.bytes_per_token(CONFIG, stored(CONFIG, "bf16")) == 3 * LAYER * 2 + head + HIDDEN * 2 + NORMS


def test_a_tied_table_is_read_whole_and_once():
    assert sizes.bytes_per_token(TIED, stored(TIED, "bf16")) == 3 * LAYER * 2 + VOCAB * HIDDEN * 2 + NORMS


def test_biases_are_read_as_float32():
    biased = replace(CONFIG, attention_bias=True, mlp_bias=True)
    extra = 3 * (128 + 64 + 64 + 128 + 256 + 256 + 128) * 4
    plain = sizes.bytes_per_token(CONFIG, stored(CONFIG, "bf16"))
    assert sizes.bytes_per_token(biased, stored(biased, "bf16")) == plain + extra


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


@pytest.mark.parametrize(
    ("name", "asked", "method"),
    [("int4-g32", "auto", "clip"), ("int8", "auto", "clip"), ("fp8", "auto", "rtn"), ("int8", "rtn", "rtn")],
)
def test_auto_chooses_the_method_by_the_kind_of_format(name, asked, method):
    assert method_for(FORMATS[name], asked) == method


def test_a_plan_made_for_a_tied_model_names_no_head():
    plan = plan_for(TIED, FORMATS["int8"], "rtn", portable=False, source=stored(TIED, "bf16"))
    assert [a.format.name for a in resolve(plan, TIED)] == ["int8"] * (1 + 3 * 7)
    with pytest.raises(PlanError, match="matches no module"):
        resolve(plan_for(CONFIG, FORMATS["int8"], "rtn", portable=False, source=stored(CONFIG, "bf16")), TIED)
