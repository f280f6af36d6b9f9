import importlib.util
import json
import re

import pytest

from tests.docs.pages import ROOT, read

spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "scripts" / "readme_figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


def record():
    return json.loads(figures.newest_record().read_text(encoding="utf-8"))


def test_pages_agree_with_the_record_and_the_format_table():
    stale = [path.name for path, text in figures.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"{stale}: run scripts/readme_figures.py"


def test_the_readme_shows_the_figures_of_the_record():
    certificate, page = record()["certificate"], read("README.md")
    size, loss = certificate["size"], certificate["quality"]["ppl_ratio"]
    assert f"({size['bytes'] / size['original_bytes']:.2f}x)" in page
    assert f"{loss['value'] - 1:.3%} [{loss['low'] - 1:.3%}, {loss['high'] - 1:.3%}]" in page
    assert certificate["inputs"]["device"] in page
    assert f"verdict {certificate['verdict']}" in page
    assert figures.newest_record().stem.removeprefix("demo_") in page


def test_a_transcript_line_stands_in_the_readme_for_each_answer():
    for name in ("original", "smaller"):
        assert re.search(
            rf"^{name} +{re.escape(record()[name]['text'].lstrip().splitlines()[0].rstrip())}$",
            read("README.md"),
            re.MULTILINE,
        )


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"markers of results: found 0 pairs"):
        figures.fill("no markers here\n", {"results": "figures"})


def test_check_writes_nothing_and_tells_what_is_out_of_date(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("old")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "pages", lambda: {page: "new"})
    assert figures.main(["--check"]) == 1
    assert page.read_text() == "old"
    assert figures.main([]) == 0
    assert page.read_text() == "new"
    assert figures.main(["--check"]) == 0
    assert capsys.readouterr().out == "README.md: out of date\nREADME.md: written\n"
