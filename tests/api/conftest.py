"""One tiny random model, one text and a few bundles of it, made once for all tests of the verbs."""

import pytest
import torch

import halve
from tests.api.tiny import make_model, write_text


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices here are tiny: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def measured(tiny, text, tmp_path_factory):
    """int2-g32 without a limit: far from its original."""
    return halve.optimize(tiny, tmp_path_factory.mktemp("m") / "out", format="int2-g32", calibration=text)


@pytest.fixture(scope="session")
def passed(tiny, text, tmp_path_factory):
    """int8 within 1 %."""
    out = tmp_path_factory.mktemp("p") / "out"
    return halve.optimize(tiny, out, format="int8", max_quality_loss="1%", calibration=text)


@pytest.fixture(scope="session")
def portable(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("port") / "out"
    return halve.optimize(tiny, out, format="int4-g32", portable=True, calibration=text)
