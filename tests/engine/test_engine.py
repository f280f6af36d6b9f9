"""The engine from outside: threads, event loops, errors, the end."""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref

import pytest

from halve.core.errors import EngineError, RequestError
from halve.engine import Completion, Engine, SamplingParams

from .toy import ScriptedRunner, StubRunner, ToyRunner, alone, request


class SlowRunner(ToyRunner):
    """Lets others in between two steps; `gate` holds it back altogether."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.gate = threading.Event()
        self.gate.set()

    def run(self, batch, rows, sampling):
        time.sleep(0.001)
        self.gate.wait(20)
        return super().run(batch, rows, sampling)


async def drain(stream):
    return [output async for output in stream]


def many(**sampling):
    return SamplingParams(max_tokens=40, **sampling)


def settle(engine):
    """Wait until nothing runs."""
    for _ in range(2000):
        metrics = engine.metrics()
        if not engine._worker._inbox and metrics.num_running == metrics.num_waiting == 0:
            return metrics
        time.sleep(0.005)
    raise AssertionError(metrics)


def test_generate_answers_in_the_order_of_the_prompts(engine):
    prompts = [[i, i + 1, i + 2] for i in range(9)]
    sampling = [SamplingParams(max_tokens=9 - i) for i in range(9)]
    done = engine(max_num_seqs=3).generate(prompts, sampling)
    assert [c.token_ids for c in done] == [alone(p, s.max_tokens) for p, s in zip(prompts, sampling, strict=True)]
    group = engine().generate(prompts, SamplingParams(n=2, max_tokens=3))
    assert [(c.prompt_tokens, c.index) for c in group] == [(3, 0), (3, 1)] * 9
    assert engine().generate([]) == []


def test_text_goes_in_and_comes_out(engine, tokenizer):
    script = [0, *tokenizer.encode("über 🙂 end")]
    one = engine(ScriptedRunner(tokenizer.vocab_size, dict.fromkeys(range(300), script)), tokenizer)
    [done] = one.generate(["a"], SamplingParams(max_tokens=len(script)))
    assert done.text == "über 🙂 end"
    assert [o.text for o in one.stream("a", SamplingParams(max_tokens=4))] == ["", "", "ü", "b"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("one prompt",), "'one prompt' is one prompt; give a list of them"),
        (([[1]], [SamplingParams()] * 2), "sampling: 2 for 1 prompts; give one, or one for each"),
        (([[]],), "prompt: it is empty"),
        ((["text"],), "this engine has no tokenizer; give token ids"),
        (([[99]],), "prompt_token_ids holds 99, the vocabulary ends at 49"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_reaches_the_others(engine, arguments, error):
    with pytest.raises(RequestError, match=error):
        engine().generate(*arguments)


def test_a_refused_prompt_ends_those_begun_before_it(engine):
    one = engine(SlowRunner())
    with pytest.raises(RequestError, match="ends at 49"):
        one.generate([[1], [2], [99]], many())
    assert settle(one).blocks_used == 0


def test_a_stream_gives_tokens_as_they_come(engine):
    outputs = list(engine().stream([1, 2], SamplingParams(max_tokens=7)))
    assert Completion.from_outputs(outputs).token_ids == alone([1, 2], 7)
    assert [o.finish_reason for o in outputs] == [None] * 6 + ["length"]


def test_the_samples_of_a_stream_are_told_apart_by_their_index(engine):
    outputs = list(engine().stream([1, 2], SamplingParams(max_tokens=5, n=3, temperature=1.0, seed=1)))
    texts = {i: tuple(o.token_id for o in outputs if o.index == i) for i in range(3)}
    assert len(set(texts.values())) == 3
    assert [len(t) for t in texts.values()] == [5, 5, 5]


def test_an_event_loop_reads_many_streams_at_once(engine):
    one = engine(max_num_seqs=8)

    async def read(i):
        return [o.token_id async for o in one.stream([i, 1], SamplingParams(max_tokens=3 + i))]

    async def all_of_them():
        return await asyncio.gather(*(read(i) for i in range(20)))

    for i, tokens in enumerate(asyncio.run(all_of_them())):
        assert tuple(tokens) == alone([i, 1], 3 + i)


@pytest.mark.parametrize("way", ["break", "close", "with"])
def test_leaving_a_stream_ends_its_request(engine, way):
    one = engine(SlowRunner())
    if way == "with":
        with one.stream([1], many()) as stream:
            next(stream)
    elif way == "close":
        stream = one.stream([1], many())
        next(stream)
        stream.close()
        assert list(stream) == []
    else:
        for _ in one.stream([1], many()):
            break
    metrics = settle(one)
    assert (metrics.num_aborted, metrics.num_finished, metrics.blocks_used) == (1, 0, 0)


@pytest.mark.parametrize("way", ["break", "cancel", "with", "timeout"])
def test_leaving_an_async_stream_ends_its_request(engine, way):
    runner = SlowRunner()
    one = engine(runner)

    async def read(begun):
        async with one.stream([1], many()) as stream:
            async for _ in stream:
                begun.set()
                if way == "with":
                    return

    async def leave():
        begun = asyncio.Event()
        if way == "break":
            async for _ in one.stream([1], many()):
                break
        elif way == "timeout":
            stream = one.stream([1], many())
            await anext(stream)
            runner.gate.clear()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(drain(stream), 0.05)
            runner.gate.set()
            assert [o async for o in stream] == []
        else:
            task = asyncio.create_task(read(begun))
            await begun.wait()
            if way == "cancel":
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    metrics = settle(one)
    assert (metrics.num_aborted, metrics.num_finished, metrics.blocks_used) == (1, 0, 0)


def test_an_event_loop_that_goes_away_does_not_disturb_the_engine(engine):
    one, kept = engine(SlowRunner()), []

    async def begin():
        kept.append(one.stream([1], many()))
        waiting = asyncio.ensure_future(anext(kept[0]))
        await asyncio.sleep(0)
        return waiting

    loop = asyncio.new_event_loop()
    waiting = loop.run_until_complete(begin())
    waiting.cancel()
    loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
    loop.close()
    assert one.generate([[5]], SamplingParams(max_tokens=3))[0].token_ids == alone([5], 3)


def test_an_abort_from_another_thread_is_told_to_the_reader(engine):
    one = engine(SlowRunner())
    stream = one.stream([1], many(), request_id="mine")
    next(stream)
    threading.Thread(target=one.abort, args=("mine",)).start()
    outputs = list(stream)
    assert outputs[-1].finish_reason == "abort"
    assert not one.abort("mine")
    assert not one.abort("never was")


def test_an_id_in_use_is_refused_and_is_free_once_its_end_was_read(engine):
    one = engine(SlowRunner())
    stream = one.stream([1], SamplingParams(max_tokens=3), request_id="a")
    with pytest.raises(RequestError, match="request 'a': a request that has not ended has this id"):
        one.stream([1], request_id="a")
    list(stream)
    assert len(list(one.stream([1], SamplingParams(max_tokens=2), request_id="a"))) == 2


def test_any_number_of_requests_is_begun_only_as_there_is_room(engine):
    one, begun = engine(max_num_seqs=2), []

    def requests():
        for i in range(60):
            begun.append(i)
            yield request(str(i), [i % 50], max_tokens=2)

    most = 0
    for done, _ in enumerate(one.complete(requests(), max_in_flight=5)):
        most = max(most, len(begun) - done)
    assert len(begun) == 60
    assert most <= 6
    with pytest.raises(RequestError, match="max_in_flight: 0 must be 1 or more"):
        next(one.complete([], max_in_flight=0))


def test_many_threads_share_one_engine(engine):
    one, wrong = engine(max_num_seqs=8), []

    def user(i):
        rng = random.Random(i)
        for _ in range(6):
            prompt, tokens = [rng.randrange(50) for _ in range(rng.randint(1, 9))], rng.randint(1, 9)
            if rng.random() < 0.3:
                with one.stream(prompt, many()) as stream:
                    next(stream)
            elif one.generate([prompt], SamplingParams(max_tokens=tokens))[0].token_ids != alone(prompt, tokens):
                wrong.append(prompt)

    threads = [threading.Thread(target=user, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert settle(one).blocks_used == 0


# Errors and the end


def failing(runner, times):
    """Fail so many steps, then go on."""
    run, left = runner.run, [times]

    def broken(batch, rows, sampling):
        if left[0]:
            left[0] -= 1
            raise OSError("the device is gone")
        return run(batch, rows, sampling)

    runner.run = broken
    return runner


def test_an_error_of_the_runner_reaches_its_reader_and_the_engine_goes_on(engine):
    one = engine(failing(ToyRunner(), 2))
    for _ in range(2):
        with pytest.raises(EngineError, match="a step with 1 requests failed: the device is gone") as caught:
            one.generate([[1]])
        assert isinstance(caught.value.__cause__, OSError)
    assert one.generate([[1]], SamplingParams(max_tokens=3))[0].token_ids == alone([1], 3)
    assert one.metrics().num_failed == 2


def test_an_error_reaches_an_async_reader_too(engine):
    one = engine(failing(ToyRunner(), 1))

    async def read():
        return [o async for o in one.stream([1])]

    with pytest.raises(EngineError, match="the device is gone"):
        asyncio.run(read())


def test_an_engine_that_fails_again_and_again_says_that_it_has_stopped(engine):
    runner = SlowRunner()
    one = engine(failing(runner, 99), max_num_seqs=1)
    runner.gate.clear()
    streams = [one.stream([i]) for i in range(5)]
    runner.gate.set()
    told = []
    for stream in streams:
        with pytest.raises(EngineError) as caught:
            list(stream)
        told.append(str(caught.value))
    assert all("the engine has stopped" in words for words in told[3:])
    with pytest.raises(EngineError, match=r"the engine has stopped: .*the device is gone; make a new one"):
        one.generate([[1]])


def test_a_defect_of_the_scheduler_reaches_every_reader(engine, monkeypatch):
    one = engine()
    monkeypatch.setattr(one._worker.core.scheduler, "schedule", lambda: 1 / 0)
    with pytest.raises(EngineError, match="the engine has stopped: division by zero"):
        one.generate([[1], [2]])
    monkeypatch.undo()
    one._worker.core.step()


def test_closing_ends_what_runs_and_refuses_what_comes(engine):
    with engine(SlowRunner()) as one:
        stream = one.stream([1], many())
        next(stream)
    assert list(stream)[-1].finish_reason == "abort"
    with pytest.raises(EngineError, match="the engine is closed; make a new one"):
        one.generate([[1]])
    one.close()


def test_an_engine_that_nobody_refers_to_ends_its_thread():
    one = Engine(ToyRunner())
    one.generate([[1]], SamplingParams(max_tokens=2))
    thread, gone = one._worker._thread, weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()


def test_a_stream_keeps_its_engine():
    stream = Engine(SlowRunner()).stream([1], SamplingParams(max_tokens=5))
    gc.collect()
    assert [o.finish_reason for o in stream][-1] == "length"


def test_an_engine_without_requests_has_no_thread_and_an_idle_one_takes_no_steps(engine):
    one = engine()
    assert one._worker._thread is None
    one.generate([[1]], SamplingParams(max_tokens=2))
    settle(one)
    stepped = threading.Event()
    one._worker.core.step = stepped.set
    assert not stepped.wait(0.05)


def test_a_program_that_forgets_to_close_still_ends():
    code = """
from halve.engine import Engine, SamplingParams
from tests.engine.toy import StubRunner
engine = Engine(StubRunner())
stream = engine.stream([1], SamplingParams(max_tokens=2000))
next(stream)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_neither_torch_nor_transformers_is_loaded():
    code = "import sys, halve.engine; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_stub_runs_too(engine):
    assert len(engine(StubRunner()).generate([[1]] * 3, SamplingParams(max_tokens=50))) == 3
