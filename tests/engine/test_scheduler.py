import random

import numpy as np
import pytest

from halve.engine.batch import block_copies, token_batch
from halve.engine.block_pool import BlockPool
from halve.engine.scheduler import Scheduler, Step
from halve.engine.sequence import Status
from halve.kernels.ops import TokenBatch
from halve.kernels.sampling import SamplingBatch

from .toy import ToyRunner, alone, request


@pytest.fixture
def scheduler():
    """Make schedulers; at the end of the test every count must be right and no block lost."""
    made = []

    def make(num_blocks=16, block_size=4, **sizes):
        sizes = {"context": 64, "max_num_seqs": 4, "max_tokens_per_step": 8, **sizes}
        made.append(Scheduler(BlockPool(num_blocks, block_size), **sizes))
        return made[-1]

    yield make
    for one in made:
        one.check_invariants()


def advance(one, step):
    """Pretend that the step ran and that token 1 was sampled everywhere; end what is full."""
    for sequence, _, _ in one.commit(step, [1] * step.num_sampled):
        if sequence.status is not Status.FINISHED and len(sequence.token_ids) >= sequence.max_tokens:
            one.remove(sequence)
    one.check_invariants()


def plan(step):
    return [(chunk.sequence.request.request_id, chunk.num_tokens) for chunk in step.chunks]


def run(one, on_step=None):
    """Step until nothing is left; the plans."""
    plans = []
    while one.has_unfinished:
        step = one.schedule()
        assert step.chunks
        plans.append(plan(step))
        advance(one, step)
        if on_step:
            on_step(len(plans))
    return plans


def test_decodes_go_first_and_prompts_fill_the_step(scheduler):
    one = scheduler()
    one.add(request("a", range(3), max_tokens=4))
    step = one.schedule()
    assert plan(step) == [("a", 3)]
    advance(one, step)
    one.add(request("b", range(10, 20), max_tokens=4))
    one.add(request("c", range(20, 25), max_tokens=4))
    for expected in ([("a", 1), ("b", 7)], [("a", 1), ("b", 3), ("c", 4)], [("a", 1), ("b", 1), ("c", 1)]):
        step = one.schedule()
        assert plan(step) == expected
        advance(one, step)


def test_prompts_take_no_more_of_a_step_with_decodes_than_they_may(scheduler):
    one = scheduler(max_prefill_beside_decode=2)
    one.add(request("a", range(8), max_tokens=3))
    one.add(request("b", range(10, 18), max_tokens=1))
    assert run(one) == [[("a", 8)], [("a", 1), ("b", 2)], [("a", 1), ("b", 2)], [("b", 4)]]


def test_a_prefix_that_another_request_has_just_computed_is_shared_at_once(scheduler):
    one = scheduler(max_tokens_per_step=16)
    one.add(request("a", range(10), max_tokens=4))
    advance(one, one.schedule())
    one.add(request("b", range(10), max_tokens=4))
    step = one.schedule()
    assert plan(step) == [("a", 1), ("b", 2)]
    assert one.pool.num_used == 4  # two shared, and the third of each
    advance(one, step)
    run(one)


def test_the_first_to_come_is_not_overtaken_by_one_that_would_fit(scheduler):
    one = scheduler(num_blocks=4)
    one.add(request("a", range(8), max_tokens=3))
    one.add(request("big", [*range(10, 17)], max_tokens=4))
    one.add(request("small", range(2), max_tokens=2))
    plans = run(one)
    assert plans[0] == [("a", 8)]
    assert plans[1] == [("a", 1)]  # big needs two blocks, and one must be left for a to grow
    order = [name for p in plans for name, _ in p]
    assert order.index("big") < order.index("small")


def test_blocks_are_taken_as_tokens_come(scheduler):
    one = scheduler(max_tokens_per_step=16)
    one.add(request("a", range(8), max_tokens=50))
    held = []
    for _ in range(6):
        advance(one, one.schedule())
        held.append(one.pool.num_used)
    assert held == [2, 3, 3, 3, 3, 4]
    one.remove(one.of_request("a")[0])


def test_no_more_than_max_num_seqs_run_and_samples_count_from_the_start(scheduler):
    one = scheduler(max_num_seqs=4)
    for name, n in (("a", 3), ("b", 2), ("c", 1)):
        one.add(request(name, [1], max_tokens=2, n=n))
    step = one.schedule()
    assert plan(step) == [("a", 1)]
    assert len(step.sampled) == 3
    advance(one, step)
    assert one.num_running == 3
    run(one)


def test_a_step_says_where_every_token_lies(scheduler):
    one = scheduler(max_tokens_per_step=6)
    one.add(request("a", [10, 11, 12, 13, 14], max_tokens=2))
    one.add(request("b", [20, 21, 22], max_tokens=2))
    first = one.schedule()
    batch, rows = token_batch(first, 4)
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 14, 20]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 6]
    assert batch.block_tables.tolist() == [[0, 1], [2, -1]]
    assert batch.slot_mapping.tolist() == [0, 1, 2, 3, 4, 8]
    assert rows.tolist() == [4]
    advance(one, first)
    second = one.schedule()
    batch, rows = token_batch(second, 4)
    assert batch.token_ids.tolist() == [1, 21, 22]
    assert batch.positions.tolist() == [5, 1, 2]
    assert batch.slot_mapping.tolist() == [5, 9, 10]
    assert batch.block_tables.tolist() == [[0, 1], [2, -1]]
    assert rows.tolist() == [0, 2]
    advance(one, second)
    run(one)


# Order


def test_the_lower_priority_number_goes_first(scheduler):
    one = scheduler(max_num_seqs=1)
    for name, priority in (("late", 1), ("usual", 0), ("urgent", -1)):
        one.add(request(name, [1], max_tokens=1, priority=priority))
    assert [p[0][0] for p in run(one)] == ["urgent", "usual", "late"]


def test_a_request_is_overtaken_by_a_bounded_number_however_many_urgent_ones_come(scheduler):
    """Fewer than (p - q) * overtakes_per_priority, as the scheduler's file says; reached to the last one."""
    one = scheduler(max_num_seqs=1, overtakes_per_priority=5)
    one.add(request("patient", [1], max_tokens=1, priority=3))
    served = []
    for i in range(40):
        for half in range(2):
            one.add(request(f"{i}.{half}", [1], max_tokens=1, priority=1))
        step = one.schedule()
        served += [name for name, _ in plan(step)]
        advance(one, step)
        if not one.of_request("patient"):
            break
    assert served.index("patient") == 2 * 5 - 1
    run(one)


def test_a_removed_request_is_never_run_and_the_queue_does_not_keep_it(scheduler):
    one = scheduler(max_num_seqs=1)
    for i in range(1000):
        one.add(request(str(i), [1], max_tokens=1))
    for i in range(999):
        one.remove(one.of_request(str(i))[0])
    assert one.num_waiting == 1
    assert len(one._waiting) < 40
    assert run(one) == [[("999", 1)]]


# Preemption


def test_when_blocks_run_out_the_last_to_come_gives_way_and_comes_back(scheduler):
    one = scheduler(num_blocks=5, max_tokens_per_step=16)
    one.add(request("a", range(6), max_tokens=9))
    one.add(request("b", range(10, 16), max_tokens=5))
    plans = run(one)
    assert one.counts.num_preemptions == 1
    assert plans[0] == [("a", 6), ("b", 6)]
    assert all("a" in dict(p) for p in plans[:9])  # the first is never held up
    back = next(p for p in plans[4:] if "b" in dict(p))
    assert back == [("b", 5)]  # its first block was still in the cache


def test_a_more_urgent_one_never_gives_way_to_an_earlier_one(scheduler):
    one = scheduler(num_blocks=5, max_tokens_per_step=16)
    one.add(request("a", range(6), max_tokens=9))
    one.add(request("urgent", range(10, 16), max_tokens=9, priority=-1))
    plans = run(one)
    assert all("urgent" in dict(p) for p in plans[:9])
    assert one.counts.num_preemptions == 1


@pytest.mark.parametrize("seed", range(8))
def test_however_small_the_cache_every_request_ends(scheduler, seed):
    """No livelock: the first in rank always gets its token."""
    rng = random.Random(seed)
    one = scheduler(num_blocks=7, max_num_seqs=rng.choice([2, 4]), max_tokens_per_step=rng.choice([4, 9]), context=28)
    total = 0
    for i in range(40):
        n, tokens = rng.choice([1, 1, 2]), rng.randint(1, 14)
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
        one.add(request(str(i), prompt, n=n, max_tokens=tokens, priority=rng.randint(-2, 2)))
        total += n * tokens
    first = []
    while one.has_unfinished:
        before = min((s.key for s in one._running), default=None)
        step = one.schedule()
        running = {id(chunk.sequence) for chunk in step.chunks}
        if before is not None:
            first.append(any(s.key == before and id(s) in running for s in one._running))
        advance(one, step)
    assert all(first)
    assert one.counts.num_sampled_tokens == total


def test_a_block_that_is_read_and_then_written_by_copies_takes_two_calls():
    step = Step(copies=[(1, 5), (2, 6), (3, 1), (4, 7)])
    assert [pairs.tolist() for pairs in block_copies(step)] == [[[1, 5], [2, 6]], [[3, 1], [4, 7]]]
    assert block_copies(Step()) == []


# Planning ahead


class DeferredRunner:
    """A device with a queue: a step's tokens are told only after the next step was handed over."""

    def __init__(self, toy):
        self.toy, self.latest = toy, np.empty(0, np.int32)

    def launch(self, step, batch, rows):
        """Runs in order; tokens in flight are taken from the step before, on the device."""
        token_ids = batch.token_ids.copy()
        flying = token_ids < 0
        token_ids[flying] = self.latest[-1 - token_ids[flying]]
        for pairs in block_copies(step):
            self.toy.copy_blocks(pairs)
        whole = TokenBatch(
            token_ids=token_ids,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            slot_mapping=batch.slot_mapping,
            block_tables=batch.block_tables,
        )
        self.latest = self.toy.run(whole, rows, SamplingBatch.greedy(len(rows))).token_ids
        return self.latest


@pytest.mark.parametrize("num_blocks", [7, 30])
@pytest.mark.parametrize("eos", [(), (1, 2, 3)])
def test_a_step_is_planned_before_the_tokens_of_the_one_before_are_known(scheduler, num_blocks, eos):
    rng = random.Random(3)
    one = scheduler(num_blocks=num_blocks, context=28)
    device = DeferredRunner(ToyRunner(num_blocks=num_blocks))
    wanted = {}
    for i in range(12):
        prompt, n, tokens = [rng.randrange(50) for _ in range(rng.randint(1, 12))], 1 + i % 3, rng.randint(1, 12)
        one.add(request(str(i), prompt, n=n, max_tokens=tokens))
        said = alone(prompt, tokens)
        end = next((k + 1 for k, token in enumerate(said) if token in eos), tokens)
        wanted |= {(str(i), index): said[:end] for index in range(n)}
    got, flying, ahead = {}, None, 0
    while one.has_unfinished or flying:
        step = one.schedule()
        launched = None
        if step.chunks:
            batch, rows = token_batch(step, 4)
            ahead += int((batch.token_ids < 0).sum())
            launched = step, device.launch(step, batch, rows).copy()
        if flying:
            for sequence, _, _ in one.commit(flying[0], flying[1].tolist()):
                if sequence.status is Status.FINISHED:
                    continue
                answer = tuple(sequence.token_ids[sequence.num_prompt_tokens :])
                if answer[-1] in eos or len(sequence.token_ids) >= sequence.max_tokens:
                    got[sequence.request.request_id, sequence.index] = answer
                    one.remove(sequence)
        one.check_invariants()
        flying = launched
    assert got == wanted
    assert ahead > 20
    assert (one.counts.num_preemptions > 0) == (num_blocks == 7)


def test_no_more_than_one_step_is_planned_ahead(scheduler):
    one = scheduler()
    one.add(request("a", [1], max_tokens=9))
    first, second = one.schedule(), one.schedule()
    with pytest.raises(AssertionError, match="more than one step is in flight"):
        one.schedule()
    advance(one, first)
    advance(one, second)
    run(one)


def test_a_sequence_with_guesses_in_flight_sits_out_until_they_are_judged(scheduler):
    one = scheduler()
    sequence = one.add(request("a", range(3), max_tokens=10))
    advance(one, one.schedule())
    sequence.num_drafts = 5
    step = one.schedule()
    (chunk,) = step.chunks
    chunk.draft.extend([1, 1, 7])  # fewer than it asked for
    step.number_rows()
    assert step.sampled == [sequence] * 4
    assert not one.schedule().chunks
    told = one.commit(step, [1, 1, 5, 6])
    assert [(t.row, t.num_generated) for t in told] == [(0, 2), (1, 3), (2, 4)]
    assert sequence.token_ids.tolist() == [0, 1, 2, 1, 1, 1, 5]
    assert (sequence.num_pending, sequence.num_draft_tokens, sequence.num_accepted_tokens) == (1, 3, 2)
    assert (one.counts.num_draft_tokens, one.counts.num_accepted_tokens) == (3, 2)
    assert plan(one.schedule()) == [("a", 1)]
