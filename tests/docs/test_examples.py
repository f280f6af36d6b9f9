import os
import runpy
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, blocks

SLOW_EXAMPLES = {"optimize_and_verify.py"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def parameter(value, name, slow):
    return pytest.param(value, id=name, marks=[pytest.mark.slow] if slow else [])


SNIPPETS = [parameter(b, b.name, b.slow) for name in ("README.md", "docs/GUIDE.md") for b in blocks(name, "python")]
PROGRAMS = [parameter(path, path.name, path.name in SLOW_EXAMPLES) for path in EXAMPLES]


@pytest.mark.parametrize("block", SNIPPETS)
def test_a_python_example_of_the_docs_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "example.py"
    file.write_text(block.text)
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", PROGRAMS)
def test_an_example_program_runs(path, tmp_path):
    arguments = [str(tmp_path / "out")] if path.name in SLOW_EXAMPLES else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
