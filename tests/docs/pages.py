"""The pages as the tests read them: fenced blocks, sections, table rows."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<slow><!-- slow -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    slow: bool

    @property
    def name(self):
        return f"{self.page}:{self.line}"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, *languages):
    text = read(name)
    return [
        Block(name, text[: m.start("text")].count("\n"), m["language"], m["text"], bool(m["slow"]))
        for m in FENCE.finditer(text)
        if m["language"] in languages
    ]


def commands(name):
    """Words after `halve` of every command line that a page shows, without pipes and redirections."""
    found = []
    for block in blocks(name, "sh", "console"):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            for part in line.split("|"):
                words = [w for w in shlex.split(part, comments=True) if not re.fullmatch(r"\d?>.*", w)]
                if words and words[0] in ("halve", ".venv/bin/halve"):
                    found.append(words[1:])
    return found


def section(name, title):
    """The text under `## title`, up to the next heading of that level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", read(name), re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def rows(text, header):
    """Cells of the tables below `header` (the first cell of their head), without head and rule."""
    tables = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[ :|-]+\n((?:\|.*\n)+)", text + "\n", re.MULTILINE)
    return [[c.strip() for c in line.strip("|").split(" | ")] for table in tables for line in table.splitlines()]
