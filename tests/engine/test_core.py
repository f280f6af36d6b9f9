import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError, RequestError
from halve.engine import EngineConfig, EngineCore, StepError
from halve.engine.batch import sampling_batch
from halve.kernels.sampling import Sampled

from .toy import ScriptedRunner, ToyRunner, alone, completions, finish, request, run_steps


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, size=rng.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("max_tokens_per_step", [4, 5, 16, 512])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_ragged_batch_gives_each_request_what_it_gets_alone(core, max_tokens_per_step, max_num_seqs):
    one = core(max_tokens_per_step=max_tokens_per_step, max_num_seqs=max_num_seqs)
    wanted = {f"r{i}": (prompt, 1 + 3 * i) for i, prompt in enumerate(prompts(9))}
    done = finish(one, [request(name, prompt, max_tokens=n) for name, (prompt, n) in wanted.items()])
    for completion in done:
        prompt, n = wanted[completion.request_id]
        assert completion.token_ids == alone(prompt, n)
        assert (completion.prompt_tokens, completion.completion_tokens) == (len(prompt), n)
        assert completion.finish_reason == "length"
        assert completion.text == ""
    assert [c.request_id for c in done] == list(wanted)
    assert max(batch.num_tokens for batch in one.runner.batches) <= max_tokens_per_step
    assert max(batch.num_sequences for batch in one.runner.batches) <= max_num_seqs


def test_a_prompt_in_chunks_gives_what_it_gives_whole(core):
    prompt = prompts(1, seed=5)[0] * 2
    for size in (1, 2, 3, 7, 100):
        one = core(max_tokens_per_step=size, max_num_seqs=1)
        assert finish(one, [request("a", prompt, max_tokens=5)])[0].token_ids == alone(prompt, 5)
        assert len(one.runner.batches) == -(-len(prompt) // size) + 4


def test_requests_may_arrive_at_any_step(core):
    one = core(max_num_seqs=4, max_tokens_per_step=8)
    wanted = {f"r{i}": prompt for i, prompt in enumerate(prompts(7, seed=2))}
    todo, got = dict(wanted), {name: [] for name in wanted}
    while todo or one.has_unfinished:
        if todo:
            name = next(iter(todo))
            one.add(request(name, todo.pop(name), max_tokens=6))
        for output in one.step():
            got[output.request_id].append(output)
    for (name, _), done in completions(o for outputs in got.values() for o in outputs).items():
        assert done.token_ids == alone(wanted[name], 6)


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_neighbours(core):
    def run(seeds: list[int | None], **config: int) -> dict[int | None, tuple[int, ...]]:
        requests = [request(str(i), [1, 2, 3], temperature=1.0, seed=s, max_tokens=12) for i, s in enumerate(seeds)]
        return {s: c.token_ids for s, c in zip(seeds, finish(core(**config), requests), strict=True)}

    alone_7 = run([7])[7]
    together = run([3, 7, 9, 2**64 - 1], max_tokens_per_step=4, max_num_seqs=3)
    assert together[7] == alone_7
    assert len(set(together.values())) == 4
    assert run([None])[None] != run([None])[None]  # 12 tokens of 50: equal once in 10^16 at most


def test_text_ends_at_the_context_when_max_tokens_goes_beyond(core):
    one = core(ToyRunner(context=10))
    [done] = finish(one, [request("a", range(7), max_tokens=500)])
    assert (done.finish_reason, done.completion_tokens) == ("length", 3)


def test_end_of_sequence_ends_a_request(core, tokenizer):
    eos = tokenizer.eos_token_id
    script = [*tokenizer.encode("hi"), eos, *tokenizer.encode("more")]
    runner = ScriptedRunner(tokenizer.vocab_size, {1: script})
    one = core(runner, tokenizer, eos=(eos,))
    [done] = finish(one, [request("a", [1])])
    assert (done.text, done.finish_reason, done.token_ids) == ("hi", "stop", tuple(script[:3]))
    [done] = finish(one, [request("a", [1], ignore_eos=True, max_tokens=5)])
    assert (done.text, done.finish_reason) == ("himo", "length")


def test_a_stop_token_ends_a_request_and_is_not_in_its_text(core, tokenizer):
    script = tokenizer.encode("one.two")
    one = core(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
    [done] = finish(one, [request("a", [1], stop_token_ids=tuple(tokenizer.encode(".")), ignore_eos=True)])
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
def test_a_stop_string_ends_the_text_before_it(core, tokenizer, said, stop, text, reason):
    for script in (tokenizer.encode(said), bytes_of(tokenizer, said)):
        one = core(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
        one.add(request("a", [1], stop=stop, max_tokens=len(script)))
        outputs = run_steps(one)
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
        one = EngineCore(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
        [done] = finish(one, [request("a", [1], stop=tuple(stops), max_tokens=len(script))])
        assert done.text == expected
        assert done.finish_reason == ("stop" if ends else "length")
        one.check_invariants()


def test_a_text_cut_within_a_character_ends_in_a_replacement(core, tokenizer):
    script = tokenizer.encode("a🙂")[:3]
    one = core(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer)
    [done] = finish(one, [request("a", [1], max_tokens=3, stop=("z",))])
    assert done.text == "a\ufffd" == tokenizer.decode(script)


def test_an_abort_frees_the_blocks_at_once_and_is_told_by_the_next_step(core, tokenizer):
    script = tokenizer.encode("stostostosto")
    one = core(ScriptedRunner(tokenizer.vocab_size, {1: script, 2: script}), tokenizer)
    one.add(request("a", [1], max_tokens=5, stop=("stop",)))
    one.add(request("b", [2], max_tokens=2))
    first = one.step()
    assert one.abort("a")
    one.check_invariants()
    assert one.scheduler.pool.num_used == 1
    assert not one.abort("a")
    told, other = one.step()
    assert (told.request_id, told.token_id, told.finish_reason) == ("a", None, "abort")
    assert first[0].text + told.text == "sto"
    assert (other.request_id, other.finish_reason) == ("b", "length")
    assert not one.has_unfinished
    assert one.step() == []


def test_an_abort_of_a_waiting_request_is_told_too(core):
    one = core(max_num_seqs=1)
    one.add(request("a", [1], max_tokens=2))
    one.add(request("b", [1]))
    one.step()
    assert one.abort("b")
    assert {o.request_id: o.finish_reason for o in one.step()} == {"a": "length", "b": "abort"}


def test_an_id_may_be_used_again_once_its_end_is_told(core):
    one = core()
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
    one = EngineCore(
        runner, None, EngineConfig(max_num_seqs=min(3, size), max_tokens_per_step=size), eos_token_ids=(4, 5)
    )
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
            try:
                note(one.step())
            except StepError as error:
                dropped |= error.request_ids
            runner.run = run
        one.check_invariants()
    while one.has_unfinished:
        note(one.step())
        one.check_invariants()
    assert one.scheduler.pool.num_used == 0
    assert all(count == (0 if name in dropped else 1) for name, count in ends.items())


def broken(batch, rows, sampling):
    raise OSError("the device is gone")


def test_an_error_of_the_runner_ends_the_requests_of_its_step_and_no_others(core):
    one = core(max_num_seqs=1)
    one.add(request("a", [1, 2], max_tokens=3))
    one.add(request("b", [1, 2], max_tokens=4))
    one.step()
    run, one.runner.run = one.runner.run, broken
    with pytest.raises(StepError, match="a step with 1 requests failed: the device is gone") as caught:
        one.step()
    assert caught.value.request_ids == {"a"}
    assert isinstance(caught.value.__cause__, OSError)
    one.check_invariants()
    one.runner.run = run
    done = completions(run_steps(one))
    assert done.keys() == {("b", 0)}
    assert done["b", 0].token_ids == alone([1, 2], 4)
    assert one.metrics().num_failed == 1


def test_an_error_ends_every_answer_of_its_requests(core):
    one = core()
    one.add(request("a", [1, 2, 3, 4, 5], n=3))
    one.step()
    one.runner.run = broken
    with pytest.raises(StepError):
        one.step()
    assert not one.has_unfinished


def test_an_interrupt_frees_what_ran(core):
    one = core()

    def interrupt(batch, rows, sampling):
        raise KeyboardInterrupt

    one.add(request("a", [1]))
    one.runner.run = interrupt
    with pytest.raises(KeyboardInterrupt):
        one.step()
    assert not one.has_unfinished


@pytest.mark.parametrize("ids", [[1, 2], [50], [-1]])
def test_tokens_of_the_wrong_shape_or_outside_the_vocabulary_are_refused(core, ids):
    one = core()
    none = np.empty((len(ids), 0))
    one.runner.run = lambda *_: Sampled(np.array(ids, np.int32), none, none, none)
    one.add(request("a", [1]))
    with pytest.raises(StepError, match="its `run` is broken"):
        one.step()


def test_logits_without_a_largest_end_the_step(core):
    one = core()
    one.runner.next = lambda ids: np.full(50, np.nan)
    one.add(request("a", [1]))
    with pytest.raises(StepError, match=r"failed: .*logits hold NaN"):
        one.step()


@pytest.mark.parametrize(
    ("prompt", "sampling", "error"),
    [
        (range(40), {}, r"request 'a': the prompt has 40 tokens, the context holds 40 for prompt and answer together"),
        (range(20), {"max_tokens": 10}, r"need 29 tokens of cache, there are 28 in all; lower max_tokens"),
        (range(5), {"max_tokens": 500}, r"need 39 tokens of cache, there are 28"),
        ([3, 50], {}, r"prompt_token_ids holds 50, the vocabulary ends at 49"),
        ([3], {"stop_token_ids": (50,)}, r"stop_token_ids holds 50, the vocabulary ends at 49"),
        ([3], {"logit_bias": {50: 1.0}}, r"logit_bias holds 50, the vocabulary ends at 49"),
        ([3], {"stop": ("x",)}, r"stop strings need a tokenizer; use stop_token_ids"),
        ([3], {"n": 33}, r"n is 33, the engine runs 32 sequences at once \(max_num_seqs\)"),
        ([3], {"min_tokens": 1, "stop_token_ids": tuple(range(50))}, r"min_tokens forbids every token"),
    ],
)
def test_what_can_never_be_served_is_refused_when_it_is_added(core, prompt, sampling, error):
    one = core(ToyRunner(context=40, num_blocks=7))
    with pytest.raises(RequestError, match=error):
        one.add(request("a", prompt, **sampling))
    assert not one.has_unfinished


def test_the_settings_of_an_engine_are_checked():
    with pytest.raises(ConfigError, match="max_num_seqs: 0 must be 1 or more"):
        EngineConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match="max_prefill_beside_decode: 0 must be 1 or more, or None"):
        EngineConfig(max_prefill_beside_decode=0)
    with pytest.raises(ConfigError, match="overtakes_per_priority: 0 must be 1 or more"):
        EngineConfig(overtakes_per_priority=0)
    with pytest.raises(ConfigError, match=r"max_tokens_per_step: 3 must be at least max_num_seqs \(4\)"):
        EngineConfig(max_num_seqs=4, max_tokens_per_step=3)


# Samples, penalties, log-probabilities


def test_n_answers_share_the_prompt_and_each_is_what_its_seed_gives_alone(core):
    prompt = list(range(10))
    one = core()
    group = finish(one, [request("a", prompt, n=4, temperature=1.0, seed=7, max_tokens=9)])
    assert [c.index for c in group] == [0, 1, 2, 3]
    assert len({c.token_ids for c in group}) == 4
    assert one.runner.batches[0].num_tokens == 10  # once for all four
    assert one.runner.num_copied == 3  # of the half-filled third block; its last holder writes in place
    [first] = finish(core(), [request("a", prompt, temperature=1.0, seed=7, max_tokens=9)])
    assert group[0].token_ids == first.token_ids
    again = finish(
        core(max_tokens_per_step=4, max_num_seqs=4), [request("a", prompt, n=4, temperature=1.0, seed=7, max_tokens=9)]
    )
    assert [c.token_ids for c in again] == [c.token_ids for c in group]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("num_blocks", [5, 32])
def test_greedy_answers_of_one_prompt_are_the_same_also_when_blocks_run_out(core, length, num_blocks):
    prompt = list(range(length))
    one = core(ToyRunner(num_blocks=num_blocks))
    group = finish(one, [request("a", prompt, n=5, max_tokens=8), request("b", [9, *prompt], max_tokens=8)])
    assert {c.token_ids for c in group[:5]} == {alone(prompt, 8)}
    assert group[5].token_ids == alone([9, *prompt], 8)
    assert (one.metrics().num_preemptions > 0) == (num_blocks == 5)


def test_each_of_n_texts_is_decoded_and_stopped_by_itself(core, tokenizer):
    """Two that split within a character: the first samples say one thing, the others another."""
    said = ["🙂 stop", "🙃 sto"]
    runner = ToyRunner(tokenizer.vocab_size)

    def next_token(token_ids):
        scripts = [bytes_of(tokenizer, text) for text in said]
        answer = token_ids[1:].tolist()
        possible = {script[len(answer)] for script in scripts if script[: len(answer)] == answer}
        logits = np.full(tokenizer.vocab_size, -np.inf)
        logits[list(possible)] = 0.0
        return logits

    runner.next = next_token
    params = {"n": 6, "temperature": 1.0, "seed": 2, "stop": ("stop", "p"), "max_tokens": len(said[1].encode())}
    group = finish(core(runner, tokenizer), [request("a", [1], **params)])
    assert {(c.text, c.finish_reason) for c in group} == {("🙂 sto", "length"), ("🙃 sto", "length")}
    params["max_tokens"] += 1
    runner.next, said[1] = next_token, "🙃 stick"
    group = finish(core(runner, tokenizer), [request("a", [1], **params)])
    assert {(c.text, c.finish_reason) for c in group} == {("🙂 ", "stop"), ("🙃 stic", "length")}


def test_an_abort_ends_each_of_n_answers_once(core):
    for steps in (0, 1, 2):
        one = core(max_tokens_per_step=32)
        one.add(request("a", range(5), n=3))
        outputs = [o for _ in range(steps) for o in one.step()]
        assert one.abort("a")
        one.check_invariants()
        outputs += run_steps(one)
        assert sorted(o.index for o in outputs if o.finish_reason == "abort") == [0, 1, 2]
        assert one.metrics().num_aborted == 3


def test_log_probabilities_are_told_for_each_token(core):
    runner = ToyRunner()
    [done] = finish(core(runner), [request("a", [1, 2], max_tokens=3, logprobs=2)])
    assert done.logprobs is not None
    tokens = [1, 2]
    for token, told in zip(done.token_ids, done.logprobs, strict=True):
        logits = runner.next(np.array(tokens)).astype(np.float32).astype(float)
        exact = logits - np.log(np.exp(logits).sum())
        assert told.token_id == token == told.top[0].token_id
        assert told.logprob == pytest.approx(exact[token], abs=1e-5)
        assert [c.token_id for c in told.top] == np.argsort(-exact)[:2].tolist()
        tokens.append(token)
    [plain] = finish(core(), [request("a", [1, 2], max_tokens=3)])
    assert plain.logprobs is None
    [chosen] = finish(core(), [request("a", [1, 2], max_tokens=1, logprobs=0)])
    assert chosen.logprobs[0].top == ()


def test_a_bias_and_a_repetition_penalty_change_what_is_chosen(core):
    [done] = finish(core(), [request("a", [1], max_tokens=4, logit_bias={7: 100.0})])
    assert done.token_ids == (7,) * 4
    [done] = finish(core(), [request("a", [1], max_tokens=30, frequency_penalty=2.0, logit_bias={7: 3.0, 8: 3.0})])
    assert done.token_ids.count(7) < 5
    neighbours = [request("a", [1], max_tokens=6), request("b", [2], max_tokens=6, repetition_penalty=5.0)]
    done = finish(core(), neighbours)
    assert done[0].token_ids == alone([1], 6)


def test_min_tokens_forbids_what_ends_an_answer(core, tokenizer):
    eos = tokenizer.eos_token_id
    script = [eos] * 8
    [done] = finish(
        core(ScriptedRunner(tokenizer.vocab_size, {1: script}), tokenizer, eos=(eos,)),
        [request("a", [1], min_tokens=3, max_tokens=8, stop_token_ids=(5,))],
    )
    assert done.completion_tokens == 4
    assert eos not in done.token_ids[:3]
    said = tokenizer.encode("..ab.")
    [done] = finish(
        core(ScriptedRunner(tokenizer.vocab_size, {1: said}), tokenizer),
        [request("a", [1], min_tokens=2, max_tokens=len(said), stop=(".",))],
    )
    assert (done.text, done.finish_reason) == ("..ab", "stop")


def test_what_stopped_an_answer_stays_if_it_shall(core, tokenizer):
    script = tokenizer.encode("one.two")
    runner = ScriptedRunner(tokenizer.vocab_size, {1: script})
    for stop in ({"stop": (".",)}, {"stop_token_ids": tuple(tokenizer.encode("."))}):
        [done] = finish(core(runner, tokenizer), [request("a", [1], include_stop=True, **stop)])
        assert (done.text, done.finish_reason) == ("one.", "stop")


def test_extreme_parameters_reach_the_sampler_as_numbers_it_knows(core):
    """float32 holds neither 1e300 nor 1e-300: rounded to infinity or 0 they would fail the whole step."""
    extremes = [{"temperature": 1e300}, {"temperature": 1e-300}, {"top_p": 1e-300, "temperature": 1.0}]
    extremes += [{"typical_p": 1e-300, "temperature": 1.0}, {"min_p": 1.0, "temperature": 1.0}]
    done = finish(core(), [request(str(i), [1], max_tokens=2, seed=1, **e) for i, e in enumerate(extremes)])
    assert [c.completion_tokens for c in done] == [2] * len(extremes)


def test_greedy_rows_alone_make_a_batch_that_a_runner_can_tell_by_sight(core):
    one = core()
    one.add(request("a", [1]))
    one.add(request("b", [2], ignore_eos=True))
    step = one.scheduler.schedule()
    assert sampling_batch(step).plain_greedy
    one.scheduler.discard(step)


# The prefix cache


def test_a_prompt_seen_before_is_not_computed_again(core):
    one = core()
    prompt = list(range(18))
    [first] = finish(one, [request("a", prompt, max_tokens=3)])
    [second] = finish(one, [request("b", prompt, max_tokens=3)])
    [longer] = finish(one, [request("c", [*prompt, *first.token_ids, 1], max_tokens=3)])
    assert (first.num_cached_tokens, second.num_cached_tokens, longer.num_cached_tokens) == (0, 16, 20)
    assert second.token_ids == first.token_ids
    assert longer.token_ids == alone([*prompt, *first.token_ids, 1], 3)
    assert one.metrics().num_hit_tokens == 36
    assert one.runner.batches[3].num_tokens == 2


def test_a_prompt_that_is_cached_whole_still_computes_its_last_block(core):
    one = core()
    for name in "ab":
        [done] = finish(one, [request(name, range(16), max_tokens=3)])
        assert done.token_ids == alone(range(16), 3)
    assert done.num_cached_tokens == 12


def test_deterministic_refuses_kernels_whose_results_depend_on_the_batch():
    runner = ToyRunner()
    runner.batch_invariant = False
    EngineCore(runner)
    with pytest.raises(ConfigError, match="results depend on what else is in the batch"):
        EngineCore(runner, None, EngineConfig(deterministic=True))


def test_metrics_count_what_happened(core):
    one = core(max_num_seqs=2)
    for name in "abc":
        one.add(request(name, [1, 2, 3], max_tokens=2))
    one.step()
    before = one.metrics()
    assert (before.num_waiting, before.num_running, before.blocks_used) == (1, 2, 2)
    run_steps(one)
    after = one.metrics()
    assert (after.num_finished, after.num_sampled_tokens, after.num_computed_tokens) == (3, 6, 12)
    assert after.blocks_free + after.blocks_cached + after.blocks_used == 32
