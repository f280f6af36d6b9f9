"""An engine over a device that is told the next step before it has told the tokens of the last."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from halve.engine import AheadModelRunner, AheadRunner, EngineCore, StepError
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch

from .toy import ScriptedRunner, ToyRunner, alone, completions, finish, request, run_steps


class Late:
    """A step of the device below."""

    def __init__(self, device: "Device", number: int) -> None:
        self.device, self.number = device, number

    def result(self) -> Sampled:
        self.device.trace.append(f"result {self.number}")
        self.device.finish_until(self.number)
        outcome = self.device.outcomes[self.number]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Device(ToyRunner):
    """Works as late as it may: a step runs when its tokens are asked for, in the order in which they were given."""

    def __init__(self, *, toy: ToyRunner | None = None, **sizes: int) -> None:
        super().__init__(**sizes)
        self.toy = toy or self
        self.queue: list[Callable[[], None]] = []
        self.trace: list[str] = []
        self.outcomes: dict[int, Sampled | Exception] = {}
        self.num_submitted = self.num_done = 0
        self.last = np.empty(0, np.int32)
        self.fail_at: dict[int, Exception] = {}
        self.refuse_at: set[int] = set()

    def next(self, token_ids: Array) -> Array:
        return super().next(token_ids) if self.toy is self else self.toy.next(token_ids)

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        raise AssertionError("an engine that can submit does not run")

    def submit(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Late:
        number = self.num_submitted
        self.num_submitted += 1
        self.trace.append(f"submit {number}")
        if number in self.refuse_at:
            raise RuntimeError("no room on the device")
        self.queue.append(lambda: self._work(number, batch, rows, sampling))
        return Late(self, number)

    def _work(self, number: int, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> None:
        flying = batch.token_ids < 0
        known = batch.token_ids.copy()
        known[flying] = self.last[-1 - batch.token_ids[flying]]
        full = TokenBatch(
            token_ids=known,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            slot_mapping=batch.slot_mapping,
            block_tables=batch.block_tables,
        )
        sampled = super().run(full, rows, sampling)
        self.last = sampled.token_ids
        self.outcomes[number] = self.fail_at.get(number, sampled)
        self.num_done = number + 1

    def copy_blocks(self, pairs: Array) -> None:
        self.queue.append(lambda: super(Device, self).copy_blocks(pairs))

    def finish_until(self, number: int) -> None:
        while number not in self.outcomes:
            self.queue.pop(0)()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, size=rng.integers(1, 30)).tolist() for _ in range(count)]


SETTINGS = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"n": 3, "temperature": 1.0, "seed": 5},
    {"temperature": 1.0, "seed": 1, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3, "logprobs": 3},
    {"min_tokens": 3, "stop_token_ids": (7, 11, 30, 31, 32)},
    {"stop_token_ids": tuple(range(10))},
]


@pytest.mark.parametrize("blocks", [12, 40])
@pytest.mark.parametrize("max_tokens_per_step", [4, 7, 64])
def test_looking_ahead_changes_no_token_whatever_is_asked_for(core, blocks, max_tokens_per_step):
    """The same requests, in a memory that makes them wait and give way, on a device and without one."""
    asked = [
        request(f"r{i}", prompt, max_tokens=2 + i % 9, priority=i % 3 - 1, **SETTINGS[i % len(SETTINGS)])
        for i, prompt in enumerate(prompts(21, seed=4))
    ]
    config = {"max_num_seqs": 4, "max_tokens_per_step": max_tokens_per_step}
    expected = finish(core(ToyRunner(num_blocks=blocks), **config), asked)
    found = finish(core(Device(num_blocks=blocks), **config), asked)
    told = [(c.token_ids, c.finish_reason, c.logprobs) for c in found]
    assert told == [(c.token_ids, c.finish_reason, c.logprobs) for c in expected]


def test_a_device_that_looks_ahead_is_known_by_its_submit():
    assert isinstance(Device(), AheadRunner)
    assert not isinstance(ToyRunner(), AheadRunner)


def test_the_next_step_is_submitted_before_the_tokens_of_the_last_are_asked_for(core):
    one = core(Device())
    finish(one, [request("a", [1, 2, 3], max_tokens=4)])
    steps = ["submit 0", "submit 1", "result 0", "submit 2", "result 1", "submit 3", "result 2", "result 3"]
    assert one.runner.trace == steps


def test_penalties_wait_for_the_tokens_that_they_count(core):
    one = core(Device())
    finish(one, [request("a", [1, 2, 3], max_tokens=3, frequency_penalty=0.5)])
    assert one.runner.trace == ["submit 0", "result 0", "submit 1", "result 1", "submit 2", "result 2"]


def test_a_stop_is_found_one_step_late_its_extra_token_is_dropped_and_its_blocks_are_free(core):
    runner = Device(toy=ScriptedRunner(50, {1: [9, 8, 7, 6, 5, 4]}), block_size=1)
    one = core(runner)
    one.add(request("a", [1], max_tokens=6, stop_token_ids=(8,)))
    outputs = [one.step() for _ in range(3)]
    assert [[o.token_id for o in told] for told in outputs] == [[], [9], [8]]
    assert outputs[-1][0].finish_reason == "stop"
    assert one.has_unfinished  # the device still works at a token that nobody wants
    assert one.scheduler.pool.num_used == 0
    assert one.step() == []
    assert not one.has_unfinished
    assert runner.num_done == 3
    assert one.metrics().num_finished == 1


def test_blocks_of_an_answer_that_ended_serve_the_next_while_the_device_still_writes_there(core):
    """Two requests that fill the cache each; the second is admitted while the first's last token is in flight."""
    stops = {"stop_token_ids": tuple(range(25)), "max_tokens": 6}
    wanted = prompts(6, seed=9)
    expected = finish(core(ToyRunner(num_blocks=9)), [request(str(i), p, **stops) for i, p in enumerate(wanted)])
    found = finish(core(Device(num_blocks=9)), [request(str(i), p, **stops) for i, p in enumerate(wanted)])
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_an_abort_frees_the_blocks_of_a_request_in_flight_and_its_token_is_dropped(core):
    one = core(Device())
    for name in "ab":
        one.add(request(name, [1, 2, 3], max_tokens=5))
    one.step()
    one.step()
    assert one.abort("a")
    one.check_invariants()
    told = completions(run_steps(one))
    assert told["a", 0].finish_reason == "abort"
    assert told["a", 0].token_ids == ()
    assert len(told["b", 0].token_ids) == 4  # the first was told before
    assert alone([1, 2, 3], 5)[1:] == told["b", 0].token_ids


def test_a_name_may_be_used_again_while_the_aborted_request_is_in_flight_and_does_not_fail_with_it(core):
    one = core(Device())
    one.runner.fail_at[1] = ValueError("broken logits")
    one.add(request("a", [1, 2, 3], max_tokens=5))
    one.step()
    one.step()  # step 1 is in flight
    one.abort("a")
    aborted = one.scheduler.of_request("a")
    assert aborted == ()
    one._aborted.clear()  # as if told
    one.add(request("a", [4, 5], max_tokens=3))
    with pytest.raises(StepError, match="a step with 0 requests failed: broken logits"):
        one.step()
    assert completions(run_steps(one))["a", 0].token_ids == alone([4, 5], 3)


def test_a_step_that_fails_on_the_device_ends_its_requests_and_leaves_the_others(core):
    one = core(Device(), max_num_seqs=1)
    one.runner.fail_at[1] = ValueError("broken logits")
    one.add(request("a", [1, 2, 3], max_tokens=5))
    one.add(request("b", [4, 5], max_tokens=3))
    one.step()
    one.step()
    with pytest.raises(StepError, match="a step with 1 requests failed: broken logits") as caught:
        one.step()
    assert caught.value.request_ids == {"a"}
    one.check_invariants()
    assert completions(run_steps(one))["b", 0].token_ids == alone([4, 5], 3)
    assert one.metrics().num_failed == 1


def test_a_step_that_the_device_does_not_take_ends_its_requests_and_the_one_before_still_tells(core):
    one = core(Device())
    one.runner.refuse_at.add(1)
    one.add(request("a", [1, 2, 3], max_tokens=1))
    one.step()
    one.add(request("b", [4, 5], max_tokens=3))
    with pytest.raises(StepError, match="no room on the device") as caught:
        one.step()
    assert caught.value.request_ids == {"b"}
    assert completions(run_steps(one))["a", 0].token_ids == alone([1, 2, 3], 1)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("where", ["submit", "result"])
def test_an_interrupt_frees_the_blocks_of_the_step_that_it_met(core, monkeypatch, where):
    one = core(Device())

    def interrupt(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(*((Device, "submit") if where == "submit" else (Late, "result")), interrupt)
    one.add(request("a", [1, 2, 3], max_tokens=1))
    with pytest.raises(Interrupted):
        run_steps(one)
    assert one.scheduler.pool.num_used == 0
    assert not one.has_unfinished


def test_a_runner_that_tells_tokens_outside_the_vocabulary_fails_its_step(core):
    one = core(Device())
    one.add(request("a", [1], max_tokens=1))
    one.step()
    one.runner.finish_until(0)
    one.runner.outcomes[0].token_ids[:] = 50
    with pytest.raises(StepError, match="outside the vocabulary"):
        one.step()


class Threaded(Device):
    """Works in a thread of its own, a step at each `allow`."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.allowed = threading.Semaphore(0)
        self.changed = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Late:
        with self.changed:
            late = super().submit(batch, rows, sampling)
            self.changed.notify_all()
        return late

    def _serve(self) -> None:
        while True:
            self.allowed.acquire()
            with self.changed:
                self.changed.wait_for(lambda: self.queue)
                self.queue.pop(0)()
                self.changed.notify_all()

    def finish_until(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: number in self.outcomes)

    def wait_submitted(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_submitted >= count, timeout=60)


def test_behind_a_thread_the_engine_works_one_step_ahead_of_a_slow_device(engine):
    runner = Threaded()
    one = engine(runner)
    stream = one.stream([1, 2, 3])
    runner.wait_submitted(2)  # before the device has done anything
    assert runner.num_done == 0
    for _ in range(200):
        runner.allowed.release()
    assert next(stream).token_id == alone([1, 2, 3], 1)[0]
    stream.close()


def test_closing_an_engine_over_a_slow_device_waits_for_what_is_in_flight(engine):
    runner = Threaded()
    one = engine(runner)
    stream = one.stream([1, 2, 3], request_id="a")
    runner.wait_submitted(2)
    assert one.abort("a")
    for _ in range(200):
        runner.allowed.release()
    tokens = [output.finish_reason for output in stream]
    assert tokens[-1] == "abort"
    one.close()
    assert one.metrics().blocks_used == 0


class AheadDecoder:
    """The face of a decoder that submits; its cache is the device."""

    batch_invariant = True

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=50, context=64)

    def new_cache(self, num_blocks, block_size):
        return Device(num_blocks=num_blocks, block_size=block_size)

    def submit(self, batch, cache, rows, sampling):
        return cache.submit(batch, rows, sampling)

    def copy_blocks(self, cache, pairs):
        cache.copy_blocks(pairs)


def test_a_decoder_that_submits_runs_ahead_in_an_engine():
    runner = AheadModelRunner(AheadDecoder(), num_blocks=8, block_size=4)
    done = finish(EngineCore(runner), [request("a", [1, 2, 3], n=2, max_tokens=9)])
    assert [c.token_ids for c in done] == [alone([1, 2, 3], 9)] * 2
