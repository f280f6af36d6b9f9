"""The same tiny model and text as the tests of the verbs use, and one bundle made by the command."""

import pytest

from tests.api.tiny import halve, make_model, run_as_recorded, write_text


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def optimized(tiny, text, tmp_path_factory):
    """int8 within 1 %, as `--json`: what was printed, and the bundle."""
    out = tmp_path_factory.mktemp("cli") / "out"
    arguments = ["--format", "int8", "--max-quality-loss", "1%", "--calibration", text, "--json"]
    return halve("optimize", tiny, "-o", out, *arguments), out


@pytest.fixture
def shell(monkeypatch, capsys):
    """Run the command inside this process, where only its words are tested."""
    from halve.cli import main as command
    from tests.api.tiny import Ran

    def run(*args):
        capsys.readouterr()  # what making a model has said
        monkeypatch.setattr("sys.argv", ["halve", *map(str, args)])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return run


@pytest.fixture
def as_recorded(monkeypatch):
    """`verify` in this process finds both models as fast as they were, whatever else the machine does."""
    run_as_recorded(monkeypatch)
