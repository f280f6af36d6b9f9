"""Our own engine as the benchmark asks it, what stands between it and peers, and a worker's process for real."""

import os
import sys
from pathlib import Path

import pytest

import halve
from halve.api.versus.engines import ENGINES, MODULES, Engine, Halve, Request, Settings, Stepped, batch_of, shape_of
from halve.api.versus.figures import decode_rate, prefill_rate
from halve.api.versus.processes import Worker, WorkerError
from halve.kernels import native_library
from halve.models.embedded import embedded_model_path

CPUS = tuple(sorted(os.sched_getaffinity(0))[:1])
SETTINGS = Settings(cpus=CPUS, context=256, sequences=4, cache_gb=1, serving=True)
needs_library = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")


@pytest.fixture(scope="module")
def ours():
    engine = Halve(str(embedded_model_path()), SETTINGS)
    yield engine
    engine.model.close()


def batch(count, tokens, new_tokens):
    return [Request(list(range(10 + i, 10 + i + tokens)), new_tokens) for i in range(count)]


@needs_library
def test_our_engine_gives_every_sequence_the_tokens_asked_for(ours):
    tok_s, steps_s = decode_rate(ours.serve(batch(3, 32, 6)), 3, 6)
    assert tok_s == pytest.approx(3 * steps_s)
    assert prefill_rate(ours.serve(batch(1, 40, 1)), 40)[0] > 0


@needs_library
def test_our_engine_takes_a_request_when_it_is_due(ours):
    arrivals = ours.serve([Request([5, 6, 7], 2), Request([8, 9], 3, at=0.05)])
    assert sorted(number for _, number in arrivals) == [0, 0, 1, 1, 1]
    assert min(when for when, number in arrivals if number == 1) >= 0.05


@needs_library
def test_our_engine_is_the_version_and_the_shape_under_test(ours):
    assert ours.version == halve.__version__
    assert ours.shape == {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4}


@needs_library
def test_a_worker_runs_our_engine_in_a_process_of_its_own(tmp_path):
    model = str(embedded_model_path())
    with Worker("halve", model, SETTINGS, python=Path(sys.executable), log=tmp_path / "log") as worker:
        assert worker.loaded["version"] == halve.__version__
        assert worker.loaded["how"].endswith("continuous batching")
        assert sorted(n for _, n in worker.serve(batch(2, 8, 3))) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(WorkerError, match=r"no config\.json"):
        Worker("halve", str(tmp_path), SETTINGS, python=Path(sys.executable), log=tmp_path / "log")


def test_every_peer_is_known_by_a_module():
    assert ENGINES.keys() == {"halve", *MODULES}
    assert all(issubclass(engine, Engine) for engine in ENGINES.values())


class Counting(Stepped):
    """Gives every request that it has a token a step."""

    def __init__(self):
        self.left = {}

    def busy(self):
        return bool(self.left)

    def add(self, number, request):
        self.left[number] = request.new_tokens

    def step(self):
        news = [(number, 1) for number in self.left]
        self.left = {number: count - 1 for number, count in self.left.items() if count > 1}
        return news


def test_an_engine_that_is_stepped_gets_requests_when_they_are_due():
    arrivals = Counting().serve([Request([1], 2, at=0.02), Request([1], 3)])
    assert [number for _, number in arrivals] == [1, 1, 1, 0, 0]
    assert arrivals[3][0] >= 0.02


@pytest.mark.parametrize("call", [Stepped().busy, Stepped().step, lambda: Stepped().add(0, Request([1], 1)),
                                  lambda: Engine().serve([])])  # fmt: skip
def test_what_an_engine_must_have_is_said_by_the_base(call):
    with pytest.raises(NotImplementedError):
        call()


def test_a_batch_has_prompts_of_one_length():
    assert batch_of([Request([1, 2], 4), Request([3, 4], 4)]) == ([[1, 2], [3, 4]], 4)
    for other in (Request([3], 4), Request([3, 4], 5)):
        with pytest.raises(ValueError, match="a batch has prompts of one length and one number of new tokens"):
            batch_of([Request([1, 2], 4), other])


def test_the_shape_of_a_configuration_is_what_it_says():
    assert shape_of({"vocab_size": 8, "hidden_size": None, "x": 1}) == {"vocab_size": 8}
