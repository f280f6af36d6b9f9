"""The last product keeps the likeliest tokens of each row in place of all logits: they are those, and draw the same."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import HalveError
from halve.formats import FORMATS, Weight
from halve.hardware import detect_cpu
from halve.kernels import native_library, native_rows
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import Step
from halve.kernels.native_checks import check_batch
from halve.kernels.ops import AttentionSpec, TokenBatch
from halve.kernels.program import MOST_CANDIDATES, Program
from halve.kernels.sampling import SamplingBatch

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")
BUILT = native_library.available() is None
RUNNABLE = [isa for isa in native_rows.ISAS if BUILT and set(isa.features) <= detect_cpu().features]
every_isa = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
HIDDEN = 32


@cache
def ops_for(isa):
    return NativeOps(replace(detect_cpu(), features=frozenset(isa.features)), num_threads=2, activations="fp32")


class Head:
    """A product whose outputs are logits [tokens, vocab]: token t's input picks input t of its weights.

    rows: the tokens whose logits are wanted; all, without it.
    """

    def __init__(self, isa, logits, rows=None):
        self.ops, (tokens, vocab) = ops_for(isa), logits.shape
        codes = np.zeros((vocab, HIDDEN), np.float32)
        codes[:, :tokens] = logits.T
        linear = self.ops.linear(Weight(format=FORMATS["fp32"], shape=codes.shape, codes=codes, scale=None))
        each = np.arange(tokens, dtype=np.int32)
        self.rows = each if rows is None else rows
        self.few, self.all = (Program(self.ops, tokens, len(self.rows)) for _ in range(2))
        x = np.eye(tokens, HIDDEN, dtype=np.float32)
        self.values, self.ids = self.few.likeliest(self.few.prepare(x, linear.layout, of_rows=True), linear)
        self.logits = self.all.floats(vocab, of_rows=True)
        ready = self.all.prepare(x, linear.layout, of_rows=True)
        self.all.product(ready, [linear], [self.logits], of_rows=True)
        self.tokens = np.zeros(tokens, np.int32)
        spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2, kv_format="fp32")
        alone = TokenBatch(
            token_ids=self.tokens,
            positions=self.tokens,
            cu_seqlens=np.arange(tokens + 1, dtype=np.int32),
            slot_mapping=each,
            block_tables=each[:, None],
        )
        self.step = Step(check_batch(alone, spec, self.ops.kv_cache(tokens, 1, spec)))

    def run(self, k):
        """All logits; values and ids of k candidates of each row."""
        self.all.run(self.step, self.tokens, self.rows)
        self.few.run(self.step, self.tokens, self.rows, k)
        size = len(self.rows) * k
        return self.logits, self.values[:size].reshape(-1, k), self.ids[:size].reshape(-1, k)


def same_tokens(head, k, batch):
    """Draw from the candidates and from all logits."""
    logits, values, ids = head.run(k)
    few = head.ops.sample(values, batch).token_ids
    drawn, wanted = ids[np.arange(len(ids)), few], head.ops.sample(logits, batch).token_ids
    assert drawn.tolist() == wanted.tolist()


def check(head, k):
    logits, values, ids = head.run(k)
    for row, found, tokens in zip(logits, values, ids, strict=True):
        expected = np.sort(np.argsort(-row, kind="stable")[: min(k, np.count_nonzero(row > -np.inf))])
        assert tokens[: len(expected)].tolist() == expected.tolist()
        assert found[: len(expected)].tobytes() == row[expected].tobytes()
        assert (found[len(expected) :] == -np.inf).all()


@every_isa
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 511, 513, 5000])
def test_the_candidates_are_the_likeliest_in_order_of_ids_step_after_step(isa, vocab):
    rng = np.random.default_rng(vocab)
    for logits in (
        rng.standard_normal((3, vocab)),
        rng.integers(-3, 3, (2, vocab)),
        np.sort(rng.standard_normal((2, vocab))),
        np.zeros((1, vocab)),
        np.where(rng.random((1, vocab)) < 0.9, -np.inf, rng.standard_normal((1, vocab))),
    ):
        head = Head(isa, logits.astype(np.float32))
        for k in (1, 5, MOST_CANDIDATES):
            check(head, k)


@every_isa
def test_more_rows_than_go_together_keep_their_own(isa):
    logits = np.random.default_rng(0).standard_normal((3, 700)).astype(np.float32)
    check(Head(isa, logits, np.arange(300, dtype=np.int32) % 3), 3)


@pytest.mark.skipif(not RUNNABLE, reason="the C++ library was not built")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_seed_draws_the_same_token_from_candidates_as_from_all_logits(data):
    vocab, num_rows = data.draw(st.integers(1, 900)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = rng.standard_normal((num_rows, vocab)) * data.draw(st.sampled_from([0.01, 1, 30, 1e30]))
    if data.draw(st.booleans()):
        logits = np.round(logits)
    top_k = rng.integers(1, MOST_CANDIDATES + 1, num_rows)
    batch = SamplingBatch.of(
        num_rows,
        temperature=rng.choice([0.0, 1e-30, 0.3, 1.0, 3.0, 1e30], num_rows),
        top_k=top_k,
        top_p=data.draw(st.floats(2.0**-20, 1.0, width=32)),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        typical_p=data.draw(st.sampled_from([1.0, 0.9, 0.2])),
        seed=rng.integers(0, 2**63, num_rows),
        step=rng.integers(0, 2**31, num_rows),
    )
    for isa in RUNNABLE:
        same_tokens(Head(isa, logits.astype(np.float32)), batch.num_candidates, batch)


@every_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 70, 600, 999])
@pytest.mark.parametrize("k", [1, 2, MOST_CANDIDATES])
def test_broken_logits_show_among_the_candidates_whatever_else_the_row_holds(isa, bad, place, k):
    logits = np.random.default_rng(0).standard_normal((1, 1000)).astype(np.float32)
    logits[0, place] = bad
    head = Head(isa, logits)
    for _ in range(2):
        _, values, _ = head.run(k)
        assert values.max() == np.inf
        with pytest.raises(HalveError, match=r"row 0 .* NaN or \+inf"):
            head.ops.sample(values, SamplingBatch.of(1, temperature=1.0, top_k=k))


@every_isa
@pytest.mark.parametrize("k", [1, 3])
def test_a_row_without_a_token_has_no_candidates(isa, k):
    _, values, _ = Head(isa, np.full((1, 600), -np.inf, np.float32)).run(k)
    assert (values == -np.inf).all()
