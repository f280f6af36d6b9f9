"""What could become of the experts of a sparse model, and the ranking behind it."""

import numpy as np
import pytest

from halve.checkpoint import open_checkpoint
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import load_config, load_decoder
from halve.search.expert_moves import ExpertStatistics, expert_moves, expert_statistics
from tests.models.test_moe import IDS, sparse_model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    sparse_model("mixtral").save_pretrained(path)
    with open_checkpoint(path) as checkpoint:
        return load_decoder(checkpoint, load_config(checkpoint).with_kv_format("fp32"), TorchOps("cpu"))


def test_saliency_is_what_tokens_would_miss(decoder):
    found = expert_statistics(decoder, [IDS])
    assert sorted(found) == [0, 1]
    layer, one = decoder.layers[0], found[0]
    x = layer.attend(decoder.ops.embed(decoder.embedding, IDS), TokenBatch.whole([IDS]))
    normed = layer.normed(x)
    logits = layer.router.logits(normed)
    expected = np.zeros(4)
    for token in range(len(IDS)):
        best = np.argsort(-logits[token])[:2]
        shares = np.exp(logits[token][best] - logits[token][best].max())
        for e, share in zip(best, shares / shares.sum(), strict=True):
            gate, up = layer.projections["gate_up"].of_expert(int(e), normed[token : token + 1])
            (out,) = layer.projections["down"].of_expert(int(e), decoder.ops.silu_mul(gate, up))
            expected[e] += share * float(out.norm())
    np.testing.assert_allclose(one.saliency, expected / len(IDS), rtol=1e-4)
    assert one.tokens.sum() == 2 * len(IDS)


def statistics(saliency, mean):
    return ExpertStatistics(tokens=np.array([9, 9, 29, 1]), saliency=np.array(saliency), mean=np.array(mean))


def test_the_least_salient_go_and_merge_with_those_that_say_the_same(decoder):
    mean = [[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, 2.0]]
    found = {i: statistics([0.5, 0.4, 0.1, 0.2], mean) for i in range(2)}
    moves = expert_moves(decoder.config, found)
    assert [(m.kind, m.short) for m in moves] == [
        ("top_k", "top1"),
        ("prune", "prune3"),
        ("prune", "prune2"),
        ("merge", "merge3"),
        ("merge", "merge2"),
    ]
    pruned, merged = moves[2].plan.layers[0], moves[4].plan.layers[0]
    assert [g.members for g in pruned.groups] == [(0,), (1,)]
    assert [g.members for g in merged.groups] == [(0, 2), (1, 3)]
    assert merged.groups[0].weights == pytest.approx((0.25, 0.75))
    assert moves[1].name == "1 of 4 experts left out"


def test_a_token_keeps_as_many_experts_as_it_runs_through(decoder):
    found = {i: statistics([0.5, 0.4, 0.1, 0.2], np.eye(4, 2)) for i in range(2)}
    assert all(len(m.plan.layers[0].groups) >= 2 for m in expert_moves(decoder.config, found) if m.plan.layers)
