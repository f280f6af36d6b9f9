import re

import pytest

from halve.formats import FORMATS
from tests.docs.pages import FENCE, PAGES, ROOT, read, rows

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def headings(text):
    """Anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_and_headings_resolve(page):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_in_the_text_exist(page):
    named = re.findall(r"`((?:src|tests|scripts|benchmarks|examples|docs)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_architecture_names_every_room():
    rooms = {path.parent.name for path in (ROOT / "src" / "halve").glob("*/__init__.py")}
    named = set(re.findall(r"^\*\*(\w+)\*\*", read("docs/ARCHITECTURE.md"), re.MULTILINE))
    assert named == rooms


def test_the_architecture_names_every_module_and_no_other():
    source = ROOT / "src" / "halve"
    modules = {str(p.relative_to(source)) for p in source.glob("*/*.py") if not p.name.startswith("__")}
    named = set(re.findall(r"`(\w+/\w+\.py)`", read("docs/ARCHITECTURE.md")))
    assert not modules - named, "docs/ARCHITECTURE.md does not say what these are for"
    assert not {name for name in named - modules if not (ROOT / name).exists()}


def test_every_format_is_in_the_table():
    assert [row[0].strip("`") for row in rows(read("docs/FORMATS.md"), "format")] == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_says_how_many_bits_a_weight_takes(name):
    row = next(row for row in rows(read("docs/FORMATS.md"), "format") if row[0] == f"`{name}`")
    fmt = FORMATS[name]
    per_row = 1 if fmt.scaled and fmt.group_size is None else 0  # one scale for a row of 4096: not counted there
    shape = (1, 4096)
    assert float(row[1]) * 4096 == 8 * (fmt.size_bytes(shape) - 2 * per_row)
    assert ("one for" in row[3], "one a row" in row[3]) == (fmt.group_size is not None, per_row == 1)
