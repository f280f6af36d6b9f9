"""Our own engine as the benchmark asks it; the others need their own environments."""

import pytest
from benchmarks.versus.engines import ENGINES, MODULES, Halve
from benchmarks.versus.figures import decode_rate, prefill_rate

import halve.engine
from halve.models.embedded import embedded_model_path


@pytest.fixture(scope="module")
def ours():
    if not hasattr(halve.engine, "Stream"):
        pytest.skip("needs Engine.stream")
    engine = Halve(str(embedded_model_path()), threads=1)
    yield engine
    engine.model.close()


def test_our_engine_gives_every_sequence_the_tokens_asked_for(ours):
    arrivals = ours.generate([list(range(10 + i, 42 + i)) for i in range(3)], 6)
    tok_s, steps_s = decode_rate(arrivals, 3, 6)
    assert tok_s == pytest.approx(3 * steps_s)
    assert prefill_rate(ours.generate([list(range(50, 90))], 1), 40)[0] > 0


def test_our_engine_is_the_version_under_test(ours):
    assert ours.version == halve.__version__


def test_every_peer_is_known_by_a_module():
    assert ENGINES.keys() == {"halve", *MODULES}
