"""Guesses change how fast answers come, and nothing else."""

import itertools
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.core.plan import Speculation
from halve.engine import Completion, EngineConfig, EngineCore, Request, StepError
from halve.engine.draft_model import DraftModel
from halve.engine.sequence import Sequence
from halve.engine.speculative import Guess, NgramProposer, Speculator
from halve.kernels import native_library
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch

from .toy import ScriptedRunner, ToyRunner, completions, finish, request, run_steps


class Repeating(ToyRunner):
    """What comes next follows from the last two tokens, so that texts repeat themselves."""

    def next(self, token_ids: Array) -> Array:
        return super().next(token_ids[-2:] % 7)


class Similar(Repeating):
    """Says mostly what `Repeating` says."""

    def next(self, token_ids: Array) -> Array:
        logits = super().next(token_ids)
        return -logits if int(token_ids.sum()) % 5 == 0 else logits


class Eager(Speculator):
    """Asks for all guesses there are, up to a number that changes from token to token, whether they pay or not."""

    def plan(self, sequences: Iterable[Sequence]) -> None:
        for one in sequences:
            most = min(1 + len(one.token_ids) % self.max_tokens, one.max_tokens - one.num_tokens - 1)
            ready = one.num_pending == 1 and len(one.token_ids) == one.num_tokens
            if ready and most > 0 and (guess := self.proposer.look(one, most)):
                one.num_drafts = guess.most


def eager(method: str, *, draft: Any = None, target: Any = None, max_tokens: int = 5, **sizes: Any) -> EngineCore:
    """A core that guesses wherever it can."""
    target = target or Repeating(**{"num_blocks": 40, **sizes})
    size = {"num_blocks": target.num_blocks, "block_size": target.block_size, "context": target.context}
    drafting = (draft or Similar)(**size) if method == "draft" else None
    speculation = Speculation(method=method, max_tokens=max_tokens, path="draft" if drafting else None)
    core = EngineCore(target, config=EngineConfig(max_num_seqs=6, speculation=speculation), draft=drafting)
    core.speculator = Eager(core.speculator.proposer, max_tokens=max_tokens)
    return core


def plain(**sizes: Any) -> EngineCore:
    return EngineCore(Repeating(**{"num_blocks": 40, **sizes}), config=EngineConfig(max_num_seqs=6))


def told(one: Completion) -> tuple[object, ...]:
    """All that a reader of an answer sees."""
    return one.token_ids, one.finish_reason, one.logprobs


MIXED = [
    request(
        f"r{i}",
        [1 + i % 5, 2, 3, 4, 1 + i % 5, 2],
        max_tokens=40,
        temperature=0.0 if i % 2 else 0.7,
        top_p=0.9 if i % 3 else 1.0,
        seed=i,
        n=3 if i % 3 == 0 else 1,
        logprobs=2 if i % 4 == 0 else None,
        repetition_penalty=1.0 if i % 5 else 1.1,
        presence_penalty=0.3 if i % 5 == 2 else 0.0,
        min_tokens=9 if i % 4 == 1 else 0,
        stop_token_ids=(17,) if i % 4 < 2 else (),
    )
    for i in range(12)
]


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_answers_are_the_same_with_every_way_of_sampling_and_little_memory(method):
    expected = finish(plain(), MIXED)
    core = eager(method)
    found = finish(core, MIXED)
    assert [told(one) for one in found] == [told(one) for one in expected]
    metrics = core.metrics()
    assert metrics.num_preemptions > 0
    assert metrics.num_draft_tokens > metrics.num_accepted_tokens > 0
    assert metrics.num_steps < sum(one.completion_tokens for one in expected) / 4


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_an_answer_says_how_many_guesses_it_had_and_how_many_were_right(method):
    core = eager(method)
    found = finish(core, [request("a", [1, 2, 3, 1, 2], max_tokens=40), request("b", [3, 1], max_tokens=30)])
    metrics = core.metrics()
    assert sum(one.num_draft_tokens for one in found) == metrics.num_draft_tokens
    assert sum(one.num_accepted_tokens for one in found) == metrics.num_accepted_tokens > 0
    assert metrics.num_sampled_tokens == 70
    assert metrics.num_computed_tokens == 7 + 70 - 2 + metrics.num_draft_tokens - metrics.num_accepted_tokens


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_is_aborted_and_preempted_the_rest_is_the_same_and_no_block_is_lost(data):
    method = data.draw(st.sampled_from(["ngram", "draft"]))
    sizes = {"num_blocks": data.draw(st.integers(8, 30)), "block_size": data.draw(st.sampled_from([1, 2, 4]))}
    sizes["num_blocks"] = max(sizes["num_blocks"], -(-32 // sizes["block_size"]))
    count = data.draw(st.integers(1, 6))
    requests = [
        request(
            f"r{i}",
            data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12)),
            max_tokens=data.draw(st.integers(1, 20)),
            temperature=data.draw(st.sampled_from([0.0, 1.0])),
            seed=i,
            n=data.draw(st.integers(1, 2)),
        )
        for i in range(count)
    ]
    doomed = {f"r{i}": data.draw(st.integers(0, 12)) for i in range(0, count, 2)}
    expected = completions(_outputs(plain(**sizes), requests, {}))
    core = eager(method, **sizes)
    found = completions(_outputs(core, requests, doomed))
    assert core.scheduler.pool.num_used == 0
    for key, answer in found.items():
        whole = expected[key].token_ids
        if answer.finish_reason == "abort":
            assert answer.token_ids == whole[: len(answer.token_ids)]
        else:
            assert answer.token_ids == whole


def _outputs(core: EngineCore, requests: list[Request], doomed: dict[str, int]) -> list[Any]:
    """Run to the end; abort each doomed request at its step."""
    for one in requests:
        core.add(one)
    outputs = []
    for number in itertools.count():
        for name, step in doomed.items():
            if step == number:
                core.abort(name)
        if not core.has_unfinished:
            return outputs
        outputs += core.step()
        core.check_invariants()
    return outputs


def scripted(script: list[int], *, context: int = 64, **sampling: Any) -> tuple[list[Completion], EngineCore]:
    """A model that says a script after token 0, and guesses that go on as the script does."""
    core = EngineCore(ScriptedRunner(20, {0: script}, context=context), config=EngineConfig(max_num_seqs=2))

    class Knowing(NgramProposer):
        def look(self, sequence: Sequence, most: int) -> Guess | None:
            at = len(sequence.token_ids) - 1
            self._found[sequence] = array("i", script[at : at + most])
            return Guess(8, len(self._found[sequence]))

    core.speculator = Eager(Knowing(), max_tokens=8)
    return finish(core, [request("a", [0], **sampling)]), core


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_an_answer_ends_at_max_tokens_within_a_run_of_guesses(max_tokens):
    (answer,), core = scripted([5] * 60, max_tokens=max_tokens)
    assert answer.token_ids == (5,) * max_tokens
    assert answer.finish_reason == "length"
    assert core.metrics().num_sampled_tokens == max_tokens


def test_an_answer_ends_where_the_context_does():
    (answer,), _ = scripted([5] * 60, context=24, max_tokens=50)
    assert (len(answer.token_ids), answer.finish_reason) == (23, "length")


@pytest.mark.parametrize("at", range(1, 12))
def test_a_stop_token_among_the_guesses_ends_the_answer_there(at):
    script = [5] * at + [9] + [6] * 60
    (answer,), core = scripted(script, max_tokens=50, stop_token_ids=(9,))
    assert answer.token_ids == (5,) * at + (9,)
    assert answer.finish_reason == "stop"
    assert not core.has_unfinished


def test_a_stop_string_among_the_guesses_ends_the_text_there(tokenizer):
    text = "ab ab ab ab ab stop ab"
    script = [*tokenizer.encode(text), 0, 0, 0]
    size = tokenizer.vocab_size
    core = EngineCore(
        ScriptedRunner(size, {0: script}), tokenizer, EngineConfig(speculation=Speculation(method="ngram"))
    )
    core.speculator = Eager(NgramProposer(), max_tokens=8)
    (answer,) = finish(core, [request("a", [0], max_tokens=len(script), stop=("stop",))])
    assert answer.text == "ab ab ab ab ab "
    assert answer.finish_reason == "stop"
    assert answer.num_accepted_tokens > 4


def test_nothing_ends_an_answer_before_min_tokens_among_guesses_too():
    script = [9] * 60
    core = EngineCore(ScriptedRunner(20, {0: script}), config=EngineConfig(), eos_token_ids=(9,))
    core.speculator = Eager(NgramProposer(), max_tokens=8)
    (answer,) = finish(core, [request("a", [0], max_tokens=50, min_tokens=11)])
    assert len(answer.token_ids) == 12
    assert answer.token_ids[-1] == 9
    assert 9 not in answer.token_ids[:-1]


def test_guesses_take_no_block_that_another_sequence_needs():
    """Two sequences fill the cache to the last block; a guess would need one more."""
    core = eager("ngram", num_blocks=6, block_size=4)
    requests = [request(name, [1, 1, 1], max_tokens=10, ignore_eos=True) for name in "ab"]
    expected = finish(plain(num_blocks=6, block_size=4), requests)
    assert [told(one) for one in finish(core, requests)] == [told(one) for one in expected]
    assert core.metrics().num_preemptions == 0


def test_guesses_keep_within_a_steps_tokens_and_leave_every_sequence_its_own():
    runner = Repeating(num_blocks=100)
    core = EngineCore(runner, config=EngineConfig(max_num_seqs=5, max_tokens_per_step=9))
    core.speculator = Eager(NgramProposer(), max_tokens=8)
    requests = [request(f"r{i}", [i, 1, i, 1], max_tokens=40) for i in range(5)]
    for one in requests:
        core.add(one)
    while core.has_unfinished:
        decoding = [s for s in core.scheduler.running if s.num_pending == 1]
        told = {output.request_id for output in core.step()}
        assert told >= {sequence.request.request_id for sequence in decoding}
    sizes = [batch.num_tokens for batch in runner.batches]
    assert max(sizes) == 9
    assert core.metrics().num_accepted_tokens > 20


class Breaking(Repeating):
    """Fails once."""

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        if len(self.batches) == 3:
            self.batches.append(batch)
            raise RuntimeError("out of order")
        return super().run(batch, rows, sampling)


def test_a_draft_model_that_fails_ends_the_requests_of_its_step_and_no_others():
    core = eager("draft", draft=Breaking)
    core.add(request("a", [1, 2], max_tokens=30))
    with pytest.raises(StepError, match="out of order"):
        run_steps(core)
    assert core.scheduler.pool.num_used == 0
    (answer,) = finish(core, [request("b", [1, 2, 3], max_tokens=20)])
    assert answer.token_ids == finish(plain(), [request("b", [1, 2, 3], max_tokens=20)])[0].token_ids


def test_a_draft_model_reads_a_beginning_that_it_knows_from_the_cache():
    core = eager("draft", draft=Repeating)
    prompt = [1, 2, 3, 4] * 8
    runner = core.speculator.proposer.runner
    finish(core, [request("a", prompt, max_tokens=4)])
    first = sum(batch.num_tokens for batch in runner.batches)
    (again,) = finish(core, [request("b", prompt, max_tokens=4)])
    assert sum(batch.num_tokens for batch in runner.batches) - first < 10 < 32 < first
    assert again.num_accepted_tokens == again.num_draft_tokens > 0


def test_what_the_draft_model_knows_of_a_block_is_forgotten_when_the_block_holds_something_else():
    """The second prompt takes the blocks of the first; the third is the first again."""
    core = eager("draft", draft=Repeating, num_blocks=10, block_size=4)
    prompts = [[1, 2, 3, 4] * 7, [4, 3, 2, 1, 1] * 6, [1, 2, 3, 4] * 7]
    for i, prompt in enumerate(prompts):
        (answer,) = finish(core, [request(f"r{i}", prompt, max_tokens=8)])
        assert answer.num_accepted_tokens == answer.num_draft_tokens > 0


def test_a_long_beginning_is_read_in_parts_and_guesses_come_when_it_is_read():
    target = Repeating(num_blocks=40)
    draft = Repeating(num_blocks=40)
    speculation = Speculation(method="draft", path="draft")
    core = EngineCore(target, config=EngineConfig(speculation=speculation), draft=draft)
    core.speculator = Eager(DraftModel(draft, target, tokens_per_step=10), max_tokens=4)
    (answer,) = finish(core, [request("a", [1, 2, 3] * 11, max_tokens=20)])
    assert [batch.num_tokens for batch in draft.batches[:4]] == [10, 10, 10, 7]  # 34 tokens, and 3 decoded meanwhile
    assert answer.num_accepted_tokens == answer.num_draft_tokens > 8


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"vocab_size": 49}, "the draft model has a vocabulary of 49 tokens, the model one of 50"),
        ({"num_blocks": 31}, "the draft model's cache has 31 blocks of 4 tokens, the model's 32 of 4"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(sizes, what):
    config = EngineConfig(speculation=Speculation(method="draft", path="draft"))
    with pytest.raises(ConfigError, match=what):
        EngineCore(ToyRunner(), config=config, draft=ToyRunner(**sizes))


@pytest.mark.parametrize("draft", [None, ToyRunner()])
def test_a_draft_model_comes_with_its_method_and_with_no_other(draft):
    method = "ngram" if draft else "draft"
    config = EngineConfig(speculation=Speculation(method=method, path=None if draft else "draft"))
    with pytest.raises(ConfigError, match=f"method '{method}' {'with' if draft else 'without'} a draft model"):
        EngineCore(ToyRunner(), config=config, draft=draft)


class Timed:
    """A runner that takes a time for each row, on a clock of its own."""

    def __init__(self, runner: ToyRunner, seconds: Callable[[int], float]) -> None:
        self._runner, self._seconds = runner, seconds
        self.now = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        self.now += self._seconds(batch.num_tokens)
        return self._runner.run(batch, rows, sampling)


def measured(
    runner: ToyRunner, seconds: Callable[[int], float], requests: list[Request], proposer: Any = None, **config: Any
) -> tuple[float, EngineCore, list[Completion]]:
    """Seconds of the runner's clock to answer all requests with guesses as they pay."""
    timed = Timed(runner, seconds)
    core = EngineCore(timed, config=EngineConfig(**config))
    core._clock = lambda: timed.now
    core.speculator = Speculator(proposer(timed) if proposer else NgramProposer())
    answers = finish(core, requests)
    return timed.now, core, answers


CHAT = [request(f"r{i}", [i, 1, 2, 3], max_tokens=120) for i in range(6)]


def bound_by_weights(rows: int) -> float:
    return 1.0 + 0.05 * (rows - 1)


def test_where_rows_are_cheap_and_text_repeats_it_is_faster():
    runner = Repeating(context=256, num_blocks=400)
    seconds, core, answers = measured(runner, bound_by_weights, CHAT[:1])
    assert seconds < 120 / 2
    assert core.metrics().num_switched_off == 0
    assert answers[0].num_accepted_tokens > 60


def test_where_guesses_are_wrong_they_cost_next_to_nothing_and_the_metrics_say_so():
    sizes = {"context": 600, "num_blocks": 400}
    requests = [request(f"r{i}", [i, 1, 2, 3], max_tokens=500, temperature=1.0, seed=i) for i in range(3)]

    class Random(ToyRunner):
        def next(self, token_ids: Array) -> Array:
            return np.where(np.arange(self.vocab_size) < 6, 1.0, -20.0)  # of six tokens any, whatever was before

    seconds, core, answers = measured(Random(**sizes), lambda rows: 1.0 + 0.3 * (rows - 1), requests, max_num_seqs=1)
    assert seconds < 1.02 * 1500
    assert 1 <= core.metrics().num_switched_off <= 3
    assert all(0 < one.num_draft_tokens < 100 for one in answers)


def test_where_steps_are_bound_by_arithmetic_nothing_is_guessed():
    runner = Repeating(context=256, num_blocks=400)
    _, core, _ = measured(runner, float, CHAT)
    assert core.metrics().num_draft_tokens < 20
    _, core, _ = measured(Repeating(context=256, num_blocks=400), bound_by_weights, CHAT)
    assert core.metrics().num_accepted_tokens > 300


def test_a_request_that_lost_is_tried_again_when_its_text_begins_to_repeat():
    script = [int(x) for x in np.random.default_rng(3).integers(0, 5, 300)] + [7, 8] * 150
    runner = ScriptedRunner(20, {0: script}, context=700, num_blocks=400)
    requests = [request("a", [0], max_tokens=600)]
    seconds, _, answers = measured(runner, lambda rows: 1.0 + 0.2 * (rows - 1), requests)
    assert answers[0].token_ids == tuple(script)
    assert seconds < 300 * 1.05 + 300 / 2
    assert answers[0].num_accepted_tokens > 180


def test_a_draft_as_slow_as_its_model_is_given_up(caplog):
    caplog.set_level("INFO", logger="halve.engine")

    def drafting(draft_s: float) -> tuple[float, EngineCore]:
        sizes = {"context": 256, "num_blocks": 400}

        def proposer(target: Timed) -> DraftModel:
            def seconds(rows: int) -> float:
                target.now += draft_s  # one clock for both
                return draft_s

            return DraftModel(Timed(Repeating(**sizes), seconds), target, clock=lambda: target.now)

        seconds, core, _ = measured(Repeating(**sizes), bound_by_weights, CHAT[:1], proposer)
        return seconds, core

    quick, _ = drafting(0.1)
    assert quick < 120 / 1.5
    slow, core = drafting(1.0)
    assert slow < 120 * 1.1
    assert core.metrics().num_switched_off == 1
    assert "speculation by the draft model does not pay for request 'r0'" in caplog.text


@pytest.mark.skipif(native_library.available() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("method", ["off", "ngram", "draft"])
def test_a_hundred_thousand_sampled_tokens_are_distributed_as_the_model_says(method):
    """Chi-square of what follows each token, in a chain whose probabilities are known; 1 - 1e-4 quantiles.

    Guesses are right sometimes and wrong sometimes: by n-grams, and by a draft model of another distribution.
    """
    states, tokens = 6, 100_000
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.2, (states, states)).astype(np.float32)
    other = logits + rng.normal(0, 0.7, logits.shape).astype(np.float32)
    runner = Chain(logits, context=600, num_blocks=100_000 // 16)
    drafting = Chain(other, context=600, num_blocks=100_000 // 16) if method == "draft" else None
    core = EngineCore(runner, config=EngineConfig(max_num_seqs=200, max_tokens_per_step=2048))
    if method != "off":
        proposer = DraftModel(drafting, runner) if drafting else NgramProposer()
        core.speculator = Eager(proposer, max_tokens=4)
    requests = [request(str(i), [i % states], max_tokens=500, temperature=0.8, seed=i) for i in range(tokens // 500)]
    for one in requests:
        core.add(one)
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
    answers = completions(outputs).values()
    counts = np.zeros((states, states))
    for answer in answers:
        ids = np.array([int(answer.request_id) % states, *answer.token_ids])
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    assert counts.sum() == tokens
    p = np.exp(logits.astype(np.float64) / np.float32(0.8))
    expected = counts.sum(1, keepdims=True) * p / p.sum(1, keepdims=True)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 10 < chi_square < 67  # 30 degrees of freedom
    metrics = core.metrics()
    if method != "off":
        assert 0.2 < metrics.num_accepted_tokens / metrics.num_draft_tokens < 0.9
        assert metrics.num_draft_tokens > 50_000


class Chain:
    """The next token's logits are those of the last token's row; the C++ draws."""

    batch_invariant = True

    def __init__(self, logits: Array, *, context: int, num_blocks: int, block_size: int = 16) -> None:
        from halve.kernels.native import NativeOps

        self.logits, self.ops = logits, NativeOps(num_threads=1)
        self.vocab_size, self.context = logits.shape[1], context
        self.num_blocks, self.block_size = num_blocks, block_size

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        return self.ops.sample(self.logits[batch.token_ids[rows]], sampling)

    def copy_blocks(self, pairs: Array) -> None:
        """There is no memory."""
