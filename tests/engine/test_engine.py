import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError, HalveError, RequestError
from halve.engine import Completion, Engine, EngineConfig

from .toy import ScriptedRunner, ToyRunner, alone, request


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, size=rng.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("max_tokens_per_step", [4, 5, 16, 512])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_ragged_batch_gives_each_request_what_it_gets_alone(engine, max_tokens_per_step, max_num_seqs):
    one = engine(max_tokens_per_step=max_tokens_per_step, max_num_seqs=max_num_seqs)
    wanted = {f"r{i}": (prompt, 1 + 3 * i) for i, prompt in enumerate(prompts(9))}
    done = one.complete([request(name, prompt, max_tokens=n) for name, (prompt, n) in wanted.items()])
    for completion in done:
        prompt, n = wanted[completion.request_id]
        assert completion.token_ids == alone(prompt, n)
        assert (completion.prompt_tokens, completion.completion_tokens) == (len(prompt), n)
        assert completion.finish_reason == "length"
        assert completion.text == ""
    assert [c.request_id for c in done] == list(wanted)
    assert max(batch.num_tokens for batch in one.runner.batches) <= max_tokens_per_step
    assert max(batch.num_sequences for batch in one.runner.batches) <= max_num_seqs


def test_a_prompt_in_chunks_gives_what_it_gives_whole(engine):
    prompt = prompts(1, seed=5)[0] * 2
    for size in (1, 2, 3, 7, 100):
        one = engine(max_tokens_per_step=size, max_num_seqs=1)
        assert one.complete([request("a", prompt, max_tokens=5)])[0].token_ids == alone(prompt, 5)
        assert len(one.runner.batches) == -(-len(prompt) // size) + 4


def test_requests_may_arrive_at_any_step(engine):
    one = engine(max_num_seqs=4, max_tokens_per_step=8)
    wanted = {f"r{i}": prompt for i, prompt in enumerate(prompts(7, seed=2))}
    todo, got = dict(wanted), {name: [] for name in wanted}
    while todo or one.has_unfinished:
        if todo:
            name = next(iter(todo))
            one.add(request(name, todo.pop(name), max_tokens=6))
        for output in one.step():
            got[output.request_id].append(output)
    for name, outputs in got.items():
        assert Completion.from_outputs(outputs).token_ids == alone(wanted[name], 6)


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_neighbours(engine):
    def run(seeds: list[int | None], **config: int) -> dict[int | None, tuple[int, ...]]:
        requests = [request(str(i), [1, 2, 3], temperature=1.0, seed=s, max_tokens=12) for i, s in enumerate(seeds)]
        return {s: c.token_ids for s, c in zip(seeds, engine(**config).complete(requests), strict=True)}

    alone_7 = run([7])[7]
    together = run([3, 7, 9, 2**64 - 1], max_tokens_per_step=4, max_num_seqs=3)
    assert together[7] == alone_7
    assert len(set(together.values())) == 4
    assert run([None])[None] != run([None])[None]  # 12 tokens of 50: equal once in 10^16 at most


def test_text_ends_at_the_context_when_max_tokens_goes_beyond(engine):
    one = engine(ToyRunner(context=10))
    [done] = one.complete([request("a", range(7), max_tokens=500)])
    assert (done.finish_reason, done.completion_tokens) == ("length", 3)


def test_end_of_sequence_ends_a_request(engine, tokenizer):
    eos = tokenizer.eos_token_id
    script = [*tokenizer.encode("hi"), eos, *tokenizer.encode("more")]
    runner = ScriptedRunner(tokenizer.vocab_size, {1: script})
    one = engine(runner, tokenizer, eos=(eos,))
    [done] = one.complete([request("a", [1])])
    assert (done.text, done.finish_reason, done.token_ids) == ("hi", "stop", tuple(script[:3]))
    [done] = one.complete([request("a", [1], ignore_eos=True, max_tokens=5)])
    assert (done.text, done.finish_reason) == ("himo", "length")


def test_a_stop_token_ends_a_request_and_is_not_in_its_text(engine, tokenizer):
    script = tokenizer.encode("one.two")
    one = engine(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
    [done] = one.complete([request("a", [1], stop_token_ids=tuple(tokenizer.encode(".")), ignore_eos=True)])
    assert (done.text, done.finish_reason, done.completion_tokens) == ("one", "stop", 4)


@pytest.mark.parametrize(
    ("said", "stop", "text", "reason"),
    [
        ("go on stop here", ("stop",), "go on ", "stop"),
        ("go on sto", ("stop",), "go on sto", "length"),
        ("ssstoppp", ("stop",), "ss", "stop"),
        ("xabcy", ("bc", "abcd", "abc"), "x", "stop"),
        ("xabcy", ("bcy", "b"), "xa", "stop"),
        ("stop", ("stop",), "", "stop"),
        ("a\n\nb", ("\n\n",), "a", "stop"),
        ("über 🙂🙂 东京", ("🙂 东",), "über 🙂", "stop"),
        ("über 🙂🙂 东京", ("🙃",), "über 🙂🙂 东京", "length"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(engine, tokenizer, said, stop, text, reason):
    for script in (tokenizer.encode(said), bytes_of(tokenizer, said)):
        one = engine(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
        outputs = list(one.generate([request("a", [1], stop=stop, max_tokens=len(script))]))
        assert "".join(output.text for output in outputs) == text
        assert outputs[-1].finish_reason == reason
        assert all("\ufffd" not in output.text for output in outputs)


def bytes_of(tokenizer, text):
    """One token for each byte, as a model that knows no merges would say it."""
    by_piece = {tokenizer.decode_stream().push(i): i for i in range(1, 257)}
    single = {i for piece, i in by_piece.items() if len(piece) == 1}
    tokens = []
    for token in tokenizer.encode(text):
        piece = tokenizer.decode([token])
        tokens += [token] if token <= 256 else [by_piece[c] for c in piece]
    assert set(tokens) <= single | set(range(1, 257))
    return tokens


@settings(max_examples=200, deadline=None)
@given(
    said=st.text("abcst op🙂", max_size=14),
    stops=st.lists(st.text("abcst op🙂", min_size=1, max_size=4), max_size=3),
)
def test_where_tokens_begin_and_end_does_not_move_a_stop(tokenizer, said, stops):
    ends = [(said.find(s) + len(s), -len(s)) for s in stops if s in said]
    expected = said[: min(ends)[0] + min(ends)[1]] if ends else said
    for script in (tokenizer.encode(said), bytes_of(tokenizer, said)):
        if not script:
            continue
        one = Engine(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
        [done] = one.complete([request("a", [1], stop=tuple(stops), max_tokens=len(script))])
        assert done.text == expected
        assert done.finish_reason == ("stop" if ends else "length")
        one.pool.check()


def test_a_text_cut_within_a_character_ends_in_a_replacement(engine, tokenizer):
    script = tokenizer.encode("a🙂")[:3]
    one = engine(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
    [done] = one.complete([request("a", [1], max_tokens=3, stop=("z",))])
    assert done.text == "a\ufffd" == tokenizer.decode(script)


def test_an_abort_frees_the_blocks_at_once_and_is_told_by_the_next_step(engine, tokenizer):
    script = tokenizer.encode("stostostosto")
    one = engine(ScriptedRunner(tokenizer.vocab_size, {1: script, 2: script}), tokenizer)
    one.add(request("a", [1], max_tokens=5, stop=("stop",)))
    one.add(request("b", [2], max_tokens=2))
    first = one.step()
    assert one.abort("a")
    one.pool.check()
    assert one.pool.num_free == one.pool.num_blocks - 1
    assert not one.abort("a")
    told, other = one.step()
    assert (told.request_id, told.token_id, told.finish_reason) == ("a", None, "abort")
    assert first[0].text + told.text == "sto"
    assert (other.request_id, other.finish_reason) == ("b", "length")
    assert not one.has_unfinished
    assert one.step() == []


def test_an_abort_of_a_waiting_request_is_told_too(engine):
    one = engine(max_num_seqs=1)
    one.add(request("a", [1], max_tokens=2))
    one.add(request("b", [1]))
    one.step()
    assert one.abort("b")
    assert {o.request_id: o.finish_reason for o in one.step()} == {"a": "length", "b": "abort"}


def test_an_id_may_be_used_again_once_its_end_is_told(engine):
    one = engine()
    one.add(request("a", [1]))
    with pytest.raises(RequestError, match="request 'a': a request whose end is not told yet has this id"):
        one.add(request("a", [2]))
    one.abort("a")
    with pytest.raises(RequestError, match="not told yet"):
        one.add(request("a", [2]))
    one.step()
    one.add(request("a", [2], max_tokens=1))
    assert one.step()[0].finish_reason == "length"


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 70)),
    st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
    st.tuples(st.just("fail"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=40), size=st.integers(1, 12))
def test_whatever_happens_every_request_gets_one_end_and_every_block_comes_back(actions, size):
    runner = ToyRunner(context=24, num_blocks=8)
    one = Engine(runner, None, EngineConfig(max_num_seqs=min(3, size), max_tokens_per_step=size), eos_token_ids=(4, 5))
    ends: dict[str, int] = {}
    dropped: set[str] = set()

    def note(outputs):
        for output in outputs:
            ends[output.request_id] += output.finish_reason is not None

    for kind, number, most in actions:
        if kind == "add":
            ends[name := f"r{len(ends)}"] = 0
            one.add(request(name, range(number), max_tokens=most))
        elif kind == "abort":
            one.abort(f"r{number}")
        elif kind == "step":
            note(one.step())
        else:
            runner.run, run = broken, runner.run
            waiting = {name for name, count in ends.items() if not count}
            try:
                note(one.step())
            except OSError:
                dropped |= waiting - {output.request_id for output in one._aborted}
            runner.run = run
        one.pool.check()
    while one.has_unfinished:
        note(one.step())
        one.pool.check()
    assert one.pool.num_free == one.pool.num_blocks
    assert all(count == (0 if name in dropped else 1) for name, count in ends.items())


def broken(batch, rows):
    raise OSError("the device is gone")


def test_an_error_of_the_runner_frees_everything_and_the_engine_goes_on(engine):
    one = engine(max_num_seqs=1)
    one.add(request("a", [1, 2]))
    one.add(request("b", [1, 2]))
    one.step()
    run, one.runner.run = one.runner.run, broken
    with pytest.raises(OSError, match="the device is gone"):
        one.step()
    one.runner.run = run
    assert not one.has_unfinished
    assert one.complete([request("a", [3], max_tokens=4)])[0].token_ids == alone([3], 4)


def test_an_interrupt_frees_everything(engine):
    one = engine()

    def interrupt(batch, rows):
        raise KeyboardInterrupt

    one.runner.run = interrupt
    with pytest.raises(KeyboardInterrupt):
        one.complete([request("a", [1])])
    assert not one.has_unfinished


def test_logits_of_the_wrong_shape_or_without_a_largest_are_refused(engine):
    one = engine()
    one.runner.run = lambda batch, rows: np.zeros((len(rows), 3), np.float32)
    with pytest.raises(HalveError, match=r"logits have shape \(1, 3\), expected \(1, 50\)"):
        one.complete([request("a", [1])])
    one.runner.run = lambda batch, rows: np.full((len(rows), 50), np.nan, np.float32)
    with pytest.raises(HalveError, match="logits hold NaN"):
        one.complete([request("a", [1])])


def test_leaving_generate_early_ends_its_requests(engine):
    one = engine()
    outputs = one.generate([request("a", [1]), request("b", [2])])
    next(outputs)
    one.abort("b")
    outputs.close()
    assert not one.has_unfinished


def test_a_refused_request_ends_those_added_with_it(engine):
    one = engine()
    with pytest.raises(RequestError):
        one.complete([request("a", [1]), request("b", [99])])
    assert not one.has_unfinished


def test_generate_tells_of_requests_added_elsewhere(engine):
    one = engine()
    one.add(request("elsewhere", [9], max_tokens=2))
    outputs = list(one.generate([request("a", [1], max_tokens=3)]))
    assert [o.request_id for o in outputs] == ["elsewhere", "a"] * 2 + ["a"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "error"),
    [
        (range(40), {}, r"request 'a': the prompt has 40 tokens, the context holds 40 for prompt and answer together"),
        (range(20), {"max_tokens": 9}, r"need 29 tokens of cache, there are 28 in all; lower max_tokens"),
        (range(5), {"max_tokens": 500}, r"need 40 tokens of cache, there are 28"),
        ([3, 50], {}, r"prompt_token_ids holds 50, the vocabulary ends at 49"),
        ([3], {"stop_token_ids": (50,)}, r"stop_token_ids holds 50, the vocabulary ends at 49"),
        ([3], {"stop": ("x",)}, r"stop strings need a tokenizer; use stop_token_ids"),
    ],
)
def test_what_can_never_be_served_is_refused_when_it_is_added(engine, prompt, sampling, error):
    one = engine(ToyRunner(context=40, num_blocks=7))
    with pytest.raises(RequestError, match=error):
        one.add(request("a", prompt, **sampling))
    assert not one.has_unfinished


def test_the_settings_of_an_engine_are_checked():
    with pytest.raises(ConfigError, match="max_num_seqs: 0 must be 1 or more"):
        EngineConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match=r"max_tokens_per_step: 3 must be at least max_num_seqs \(4\)"):
        EngineConfig(max_num_seqs=4, max_tokens_per_step=3)


def test_neither_torch_nor_transformers_is_loaded():
    code = "import sys, halve.engine; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
