"""Experts of a layer in tiers: who lies with whom, what a tier loses and costs, what a plan of tiers says."""

from dataclasses import replace

import numpy as np
import pytest

from halve.compress import Choice, grouped_plan, resolve
from halve.compress.resolve import number_patterns
from halve.core.errors import PlanError
from halve.formats import FORMATS
from halve.models.config import Experts
from halve.models.names import experts_of, kind_of, layer_groups
from halve.search import candidates, in_words
from halve.search.front import Offer, bytes_cost
from halve.search.reads import Reads
from halve.search.sensitivity import Score, Sensitivity, parts_of
from halve.search.settings import Setting
from halve.search.tiers import PRIOR_TOKENS, TIERS, tiered
from tests.search.test_device_table import CONFIG as DENSE

EXPERTS, TOP_K = 12, 3
SPARSE_LAYER = replace(
    DENSE.layers[1],
    experts=Experts(num_experts=EXPERTS, top_k=TOP_K, intermediate_size=32, renormalize=True),
)
CONFIG = replace(DENSE, layers=(DENSE.layers[0], SPARSE_LAYER))
PARTS = parts_of(CONFIG)
SPARSE = [p.name for p in PARTS if p.of_experts]
LOSSES = {"int8": 1e-4, "int4-g32": 2e-3, "int2-g32": 5e-1, "bf16": 0.0}
TOKENS = np.full(EXPERTS, 1000)
SCREENED = 1 << 30  # tokens, so that what the screen says is believed
# What each loses per token: expert 7 most, then 2, and so on.
ORDER = [7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6]
HURT = np.array([3.0 ** -ORDER.index(e) for e in range(EXPERTS)])


def scores(loss_of_part=1.0, tokens=TOKENS):
    """Of every option, what each expert loses by its hurt and its tokens."""
    shares = HURT * tokens / (HURT * tokens).sum()
    return tuple(
        Score(
            format=f,
            method="clip" if FORMATS[f].scaled else None,
            predicted=loss / 2,
            measured=loss * loss_of_part if FORMATS[f].scaled else None,
            loss=loss * loss_of_part,
            by_expert=tuple((loss / 2 * shares).tolist()) if FORMATS[f].scaled else (),
        )
        for f, loss in LOSSES.items()
    )


def sensitivity(**options):
    dense = tuple(
        Score(format=f, method="clip" if loss else None, predicted=loss, measured=None, loss=loss)
        for f, loss in LOSSES.items()
    )
    return Sensitivity(parts={p.name: scores(**options) if p.of_experts else dense for p in PARTS}, num_tokens=100)


def test_experts_lie_with_those_that_lose_as_much_and_losses_add_up_to_the_whole():
    parts, found = tiered(PARTS, sensitivity(), {1: TOKENS}, SCREENED)
    down = [p for p in parts if p.name.startswith("layers.1.down")]
    assert [experts_of(p.name)[1] for p in down] == [tuple(sorted(ORDER[i : i + 3])) for i in (9, 6, 3, 0)]
    assert down[0].name == "layers.1.down[4,6,8]"
    assert [kind_of(p.name) for p in down] == ["down"] * TIERS
    assert {m.expert for m in down[0].modules} == {4, 6, 8}
    assert [p.name for p in parts if not p.of_experts] == [p.name for p in PARTS if not p.of_experts]
    for i, f in enumerate(LOSSES):
        assert [found.parts[p.name][i].format for p in down] == [f] * TIERS
        assert sum(found.parts[p.name][i].loss for p in down) == pytest.approx(LOSSES[f])
    assert found.parts[down[-1].name][1].loss > 100 * found.parts[down[0].name][1].loss
    assert found.parts["layers.1.down"] == sensitivity().parts["layers.1.down"]  # for changes of experts


def test_tiers_together_cost_what_the_whole_costs():
    tokens = np.arange(EXPERTS) * 100 + 64
    parts, _ = tiered(PARTS, sensitivity(tokens=tokens), {1: tokens}, SCREENED)
    for name in SPARSE:
        whole = next(p for p in PARTS if p.name == name)
        tiers = [p for p in parts if experts_of(p.name)[0] == name]
        assert sum(bytes_cost(p, FORMATS["int8"]) for p in tiers) == pytest.approx(bytes_cost(whole, FORMATS["int8"]))
        for count in (1, 4, 32.5, 512):
            assert sum(p.reads.of_step(count) for p in tiers) == pytest.approx(1)
        rare = next(p for p in tiers if 0 in experts_of(p.name)[1])
        assert rare.reads.top_k == TOP_K
        busy = max(tiers, key=lambda p: sum(p.reads.own))
        assert busy.reads.of_step(1) > busy.reads.of_step(64) > 3 / EXPERTS  # of few tokens, mostly the popular ones


def test_experts_that_no_token_came_to_are_not_taken_for_harmless():
    tokens = TOKENS.copy()
    tokens[7] = 0  # no token, so the screen saw it lose nothing
    parts, found = tiered(PARTS, sensitivity(tokens=tokens), {1: tokens}, SCREENED)
    tier = next(p for p in parts if p.name.startswith("layers.1.down") and 7 in experts_of(p.name)[1])
    assert 7 not in experts_of(next(p.name for p in parts if p.name.startswith("layers.1.down")))[1]
    assert found.parts[tier.name][1].loss > 0


def test_what_few_tokens_say_of_an_expert_is_drawn_towards_its_layer():
    spread = {}
    for screened in (1 << 30, 4 * PRIOR_TOKENS, 12):
        parts, found = tiered(PARTS, sensitivity(), {1: TOKENS}, screened)
        losses = [found.parts[p.name][1].loss for p in parts if p.name.startswith("layers.1.down")]
        spread[screened] = np.log(losses[-1] / losses[0])
        assert sum(losses) == pytest.approx(2e-3)
    assert spread[4 * PRIOR_TOKENS] == pytest.approx(spread[1 << 30] / 2, rel=0.1)
    assert len(losses) == 1 or spread[12] < 0.1


@pytest.mark.parametrize("routed", [{}, {1: np.zeros(EXPERTS, np.int64)}, {0: TOKENS}, {1: TOKENS[1:]}])
def test_experts_that_can_not_be_told_apart_stay_one_part(routed):
    parts, found = tiered(PARTS, sensitivity(), routed, SCREENED)
    assert [p.name for p in parts] == [p.name for p in PARTS]
    assert found == sensitivity()


def test_experts_without_scores_of_their_own_stay_one_part():
    known = sensitivity().parts
    plain = {name: tuple(replace(score, by_expert=()) for score in scores) for name, scores in known.items()}
    found = tiered(PARTS, Sensitivity(parts=plain, num_tokens=1), {1: TOKENS}, SCREENED)
    assert [p.name for p in found[0]] == [p.name for p in PARTS]


def test_a_plan_gives_more_bits_to_experts_that_lose_more_and_says_which():
    parts, found = tiered(PARTS, sensitivity(), {1: TOKENS}, SCREENED)
    stored = {m.name: FORMATS["bf16"] for p in PARTS for m in p.modules}
    usual = Setting(activations="int8", caches=("bf16", "bf16"))
    front = candidates(CONFIG, parts, found, bytes_cost, stored, [Offer(setting=usual)], portable=False)
    mixed = [
        c for c in front if len({c.choices[p.name].format for p in parts if p.name.startswith("layers.1.down")}) > 1
    ]
    assert mixed
    for candidate in mixed:
        by_expert = {
            a.module.expert: FORMATS[a.format.name].bits
            for a in resolve(candidate.plan, CONFIG)
            if a.group == "layers.1.down"
        }
        assert len(by_expert) == EXPERTS
        assert all(by_expert[a] >= by_expert[b] for a, b in zip(ORDER[::3], ORDER[3::3], strict=False))
        assert candidate.reads["layers.1.down[4,6,8]"].top_k == TOP_K
        words = "; ".join(in_words(candidate.choices))
        assert "down of experts " in words
        assert "[" not in words
    whole = next(c for c in front if c not in mixed)
    assert "down of experts" not in "; ".join(in_words(whole.choices))


def test_rules_of_experts_are_few_and_read_as_wildcards():
    assert number_patterns([0, 3, 5, 12, 17, 100]) == ["[035]", "1[27]", "100"]
    group = layer_groups(CONFIG, 1)["gate_up"]
    some = group.of_experts({0, 1, 2, 10})
    rest = group.of_experts(set(range(EXPERTS)) - {0, 1, 2, 10})
    assert (some.name, rest.name) == ("layers.1.gate_up[0-2,10]", "layers.1.gate_up[3-9,11]")
    four, eight = Choice(format="int4-g32", method="clip"), Choice(format="int8", method="clip")
    plan = grouped_plan(
        CONFIG, {some.name: eight, rest.name: four}, portable=False, activations="int8", kv_cache="bf16"
    )
    assigned = {a.module.name: a.format and a.format.name for a in resolve(plan, CONFIG)}
    for m in group.members:
        assert assigned[m.name] == ("int8" if m.expert in {0, 1, 2, 10} else "int4-g32")
    assert len(plan.weights.rules) == 3
    with pytest.raises(PlanError, match="are no groups of this model"):
        grouped_plan(CONFIG, {"layers.1.side[0]": four}, portable=False, activations="int8", kv_cache="bf16")


def test_reads_of_all_experts_are_all_of_them():
    even = Reads.even(8, 2)
    assert (even.top_k, even.of_token, even.of_step(3)) == (2, 0.25, 1.0)
