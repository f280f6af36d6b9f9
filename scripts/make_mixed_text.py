"""Rebuild the calibration and certification text that ships in src/halve/data/mixed: four kinds, many short documents.

Every excerpt comes from another place (book, work, module, tool), because an interval over documents is only as
narrow as the documents are independent. What is taken is decided by SHA-256 ranks, not by a random generator, so the
same inputs give the same bytes on every Python. SOURCES.md beside the text says where it all comes from.
"""

import argparse
import ast
import gzip
import hashlib
import json
import lzma
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

Document = dict[str, Any]

MIN_BYTES, MAX_BYTES = 300, 4000
BUDGET = {"english": 270_000, "japanese": 90_000, "code": 120_000, "chat": 160_000}  # bytes of JSON Lines
PER_GROUP = {"english": 6, "japanese": 2, "code": 2, "chat": 120}
MAX_SHARED = 0.15  # of a document's word runs that an earlier one may hold

# Excerpts whose words would need a context that an excerpt has not.
AVOID = re.compile(
    r"\b(?:negro(?:es)?|darky|darkies|squaws?|redskins?|chinam[ae]n|savages?|heathens?|half-breeds?|mulatto|gyps(?:y|ies)"
    r"|gips(?:y|ies)|jew(?:s|ess|ish)?|cannibals?|slaves?|colou?red (?:man|boy|woman|people)|moors?|hottentots?"
    r"|kaffirs?|coolies?|idiots?|suicide|blacks|blackies?|black (?:fellow|man|men|woman|people)\w*|mohammedans?"
    r"|infidels?|arabs?|hindoos?|natives|injuns?|indians?)\b"
    r"|支那|毛唐|穢多|非人|癩|気違|気狂|きちがい|狂人|白痴|乞食|めくら|盲目|つんぼ|唖|跛|びっこ|黒ん坊|土人|朝鮮|"
    r"娼婦|売笑|淫売|自殺|強姦|妾",
    re.IGNORECASE,
)
PERSONAL = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|https?://|www\.|\+\d[\d ()-]{8,}|\b\d{3}[-. ]\d{3}[-. ]\d{4}\b"
    r"|\b(?:copyright|license|licence)\b",
    re.IGNORECASE,
)
FAMOUS = re.compile(
    r"\b(?:obama|trump|biden|musk|swift|clinton|putin|zuckerberg|bezos|bill gates|steve jobs|federer|messi|ronaldo"
    r"|lebron|lincoln|einstein|kardashian|beyonc|bieber|jackson|jolie|brad pitt|hanks|dicaprio)\b",
    re.IGNORECASE,
)

# Tasks around other people's texts, addresses or groups of people.
TOUCHY = re.compile(
    r"lyrics?\b|\bsongs?\b|guardian|forbes|stereotyp|\bbias|religio|christian|atheis|asian|directions between|resume\b"
    r"|podcast|complete the paragraph|\bpoem|street\b|\bave\b|immigra|terroris|church|quotes?\b|\barticle",
    re.IGNORECASE,
)


def names(text: str) -> tuple[str, ...]:
    """Words of a paragraph."""
    return tuple(text.split())


# Modules under the Python licence alone: a file that carries somebody else's notice is not in this list.
PYTHON_MODULES = names(
    """
    argparse ast asyncio/locks asyncio/queues asyncio/tasks base64 bisect calendar cmd code codeop
    collections/__init__ concurrent/futures/thread configparser contextlib copy csv dataclasses difflib dis
    email/header email/message enum filecmp fileinput fnmatch fractions functools getopt gettext glob gzip
    hashlib heapq hmac html/parser http/client http/cookiejar importlib/abc importlib/util inspect ipaddress
    json/decoder json/encoder json/scanner keyword linecache locale mailbox
    mimetypes multiprocessing/pool multiprocessing/queues netrc nntplib ntpath numbers operator pathlib pdb
    pkgutil plistlib poplib posixpath pprint pyclbr queue random reprlib rlcompleter sched selectors shelve
    shutil smtplib ssl stat statistics string subprocess tempfile threading timeit tokenize
    traceback types typing unittest/case unittest/loader unittest/mock urllib/parse urllib/request
    weakref webbrowser wsgiref/handlers xml/dom/minidom zipapp zipfile
    zoneinfo/_zoneinfo
    """
)
NPM_PACKAGES = names(  # ISC and MIT, JavaScript as its authors wrote it
    """
    @npmcli/arborist @npmcli/config @npmcli/git @npmcli/run-script @npmcli/package-json archy bin-links cacache
    hosted-git-info libnpmdiff libnpmexec libnpmversion make-fetch-happen negotiator nopt npm-audit-report
    pacote promise-call-limit semver text-table treeverse which
    """
)
CPP_HEADERS = names(
    """
    fmt/args.h fmt/chrono.h fmt/color.h fmt/compile.h fmt/format-inl.h fmt/format.h fmt/os.h fmt/ostream.h
    fmt/printf.h fmt/ranges.h fmt/std.h pybind11/buffer_info.h pybind11/cast.h pybind11/chrono.h
    pybind11/functional.h pybind11/gil.h pybind11/iostream.h pybind11/numpy.h pybind11/stl.h pybind11/stl_bind.h
    pybind11/warnings.h
    """
)
AOZORA_CARDS = ("000148", "000879", "000081")  # Soseki (1916), Akutagawa (1927), Miyazawa (1933): dead before 1946


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A document that may be taken. group: what no more than PER_GROUP documents may share (author, module, set)."""

    key: str
    group: str
    document: Document

    @property
    def text(self) -> str:
        """All the words of the document."""
        if "text" in self.document:
            return str(self.document["text"])
        return "\n".join(message["content"] for message in self.document["messages"])


def rank(key: str) -> int:
    """A fixed, even, meaningless order: the first 8 bytes of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(f"halve mixed text 1:{key}".encode()).digest()[:8], "big")


def open_text(path: Path) -> TextIO:
    """Open plain, gzip or xz text."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    stream: TextIO = openers.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="")
    return stream


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file."""
    with open_text(path) as stream:
        return [json.loads(line) for line in stream if line.strip()]


def cut(paragraphs: list[str], start: int, max_bytes: int, joiner: str) -> str:
    """Whole paragraphs from `start` on, up to max_bytes; empty when the first is too long already."""
    taken: list[str] = []
    size = 0
    for paragraph in paragraphs[start:]:
        size += len((paragraph + joiner).encode())
        if size > max_bytes:
            break
        taken.append(paragraph)
    return joiner.join(taken).strip("\n")


def excerpts(key: str, group: str, paragraphs: list[str], lengths: tuple[int, ...], joiner: str) -> Iterator[Candidate]:
    """Three places of one work to choose from; the first that passes every test is taken, the others are spare."""
    for attempt in range(3):
        number = rank(f"{key}:{attempt}")
        start = number % max(len(paragraphs) - 3, 1)
        text = cut(paragraphs, start, lengths[number // 7919 % len(lengths)], joiner)
        yield Candidate(key=f"{key}:{attempt}", group=group, document={"text": text})


def english(data: Path) -> Iterator[Candidate]:
    """One excerpt of each public-domain book."""
    folder = data / "corpora/gutenberg"
    with open_text(folder / "titles.tsv") as stream:
        titles = [line.rstrip("\r\n").split("\t") for line in stream][1:]
    author_by_size = {(row[0], int(row[5])): row[1] for row in titles}
    for split, name in (("train", "train.txt.xz"), ("valid", "valid.txt.gz")):
        with open_text(folder / name) as stream:
            books = [book.strip("\n") for book in stream.read().split("\f")]
        for number, book in enumerate(books):
            author = author_by_size.get((split, len(book.encode())), f"unknown author of {split} {number}")
            paragraphs = [p for p in re.split(r"\n{2,}", book) if not p.startswith("[")]
            yield from excerpts(f"{split}/{number}", author, paragraphs, (700, 1100, 1500, 2000, 2600, 3400), "\n\n")


def japanese(data: Path) -> Iterator[Candidate]:
    """At most two excerpts of each work, from different halves, so that they are never neighbours."""
    for number, row in enumerate(rows(data / "corpora/aozora_ja.jsonl.gz")):
        if row["card"] not in AOZORA_CARDS or row["title"].startswith(("『春と修羅』", "鈴木三重吉宛書簡")):
            continue  # verse and private letters
        paragraphs = [p for p in row["text"].split("\n") if p.strip() and "※" not in p]
        half = len(paragraphs) // 2
        parts = [paragraphs[: half - 4], paragraphs[half + 4 :]] if len(row["text"]) > 5000 else [paragraphs]
        for part, some in enumerate(parts):
            if some:
                lengths = (700, 1100, 1500, 1900, 2300)
                yield from excerpts(f"{number}.{part}", f"{row['title']}/{part}", some, lengths, "\n")


def gsm8k(data: Path) -> Iterator[Candidate]:
    """Grade-school problems: the calculator's marks are dropped, the final answer becomes a sentence."""
    for number, row in enumerate(rows(data / "tasks/gsm8k/train.jsonl.gz")):
        steps, _, final = re.sub(r"<<[^>]*>>", "", row["answer"]).partition("\n#### ")
        answer = f"{steps}\nThe answer is {final}."
        yield chat_candidate(f"gsm8k/{number}", "gsm8k", [row["question"], answer])


def self_instruct(data: Path) -> Iterator[Candidate]:
    """Human-written tasks with an answer of some length and a short input (long inputs are other people's texts)."""
    for name in ("user_oriented", "seed_tasks"):
        for number, row in enumerate(rows(data / f"instruct/self_instruct_{name}.jsonl")):
            if len(row["input"]) > 250 or len(row["output"]) < 80 or TOUCHY.search(json.dumps(row)):
                continue
            ask = row["instruction"] + (f"\n\n{row['input']}" if row["input"].strip() else "")
            yield chat_candidate(f"self_instruct/{name}/{number}", "self_instruct", [ask, row["output"]])


def glaive(data: Path) -> Iterator[Candidate]:
    """Tool calls as user and assistant turns, which every chat template accepts; one conversation for each tool."""
    speakers = {"human": "user", "observation": "user", "gpt": "assistant", "function_call": "assistant"}
    for number, row in enumerate(rows(data / "instruct/glaive_toolcall_en_300.jsonl.gz")):
        turns = [(speakers[turn["from"]], turn) for turn in row["conversations"]]
        if any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns)) or len(turns) % 2:
            continue
        words = [("Tool result: " if t["from"] == "observation" else "") + t["value"] for _, t in turns]
        tools = json.loads(row["tools"]) if row["tools"] and row["tools"] != "[]" else []
        if tools:
            words[0] += f"\n\nTools that may be called by answering in JSON: {json.dumps(tools)}"
        name = tools[0]["name"] if tools else f"none {number}"
        yield chat_candidate(f"glaive/{name}", "glaive tools" if tools else "glaive talk", words)


def chat_candidate(key: str, group: str, words: list[str]) -> Candidate:
    """Turns that alternate, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text.strip()} for i, text in enumerate(words)]
    return Candidate(key=key, group=group, document={"messages": messages})


def chat(data: Path) -> Iterator[Candidate]:
    """Problems, tasks and tool calls."""
    yield from gsm8k(data)
    yield from self_instruct(data)
    yield from glaive(data)


def python_code(library: Path) -> Iterator[Candidate]:
    """Whole top-level functions and classes of the standard library."""
    for module in PYTHON_MODULES:
        source = (library / f"{module}.py").read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                text = "".join(lines[first - 1 : node.end_lineno])
                key = f"python/{module}.{node.name}"
                yield Candidate(key=key, group=f"python/{module}", document={"text": text.rstrip()})


def whole_files(folder: Path, pattern: str, group: str) -> Iterator[Candidate]:
    """Whole small files, without a notice at their head."""
    for path in sorted(folder.glob(pattern)):
        relative = path.relative_to(folder)
        if path.is_file() and "node_modules" not in relative.parts:
            yield Candidate(key=f"{group}/{relative}", group=group, document={"text": path.read_text("utf-8").strip()})


def blocks(path: Path, border: str, joiner: str, group: str) -> Iterator[Candidate]:
    """Runs of whole top-level blocks of a file, cut where `border` matches; the head, with its notices, is left out."""
    parts = [part.strip("\n") for part in re.split(border, path.read_text(encoding="utf-8"))][1:]
    if parts:
        yield from excerpts(group, group, parts, (1200, 2000, 2800), joiner)


def code(sources: "CodeSources") -> Iterator[Candidate]:
    """Python, JavaScript, shell, SQL and C++."""
    yield from python_code(sources.python)
    for package in NPM_PACKAGES:
        yield from whole_files(sources.npm / package, "**/*.js", f"npm/{package}")
    for path in sorted((sources.pyenv / "libexec").glob("pyenv-*")):
        yield from whole_files(path.parent, path.name, f"pyenv/{path.name}")
    for path in [sources.postgresql / "system_views.sql", sources.postgresql / "information_schema.sql"]:
        for part, text in enumerate(re.split(r"\n{2,}(?=CREATE VIEW)", path.read_text(encoding="utf-8"))[1:]):
            group = f"postgresql/{path.name}/{part // 8}"
            yield Candidate(key=f"{group}/{part}", group=group, document={"text": text.split("\n\n\n")[0].strip()})
    for name in CPP_HEADERS:
        yield from blocks(sources.torch / name, r"(?<=\n\})\n{2,}|(?<=\n\};)\n{2,}", "\n\n", f"cpp/{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeSources:
    """Where licensed source code lies on this machine."""

    python: Path
    npm: Path
    pyenv: Path
    postgresql: Path
    torch: Path


def shingles(text: str) -> frozenset[int]:
    """Runs of eight words, or of 24 characters where words are not set apart."""
    words = re.findall(r"\w+", text.lower())
    if len(words) * 12 < len(text):  # Japanese
        return frozenset(hash_run(text[i : i + 24]) for i in range(0, max(len(text) - 24, 1)))
    return frozenset(hash_run(" ".join(words[i : i + 8])) for i in range(max(len(words) - 7, 1)))


def hash_run(run: str) -> int:
    """Eight bytes that stand for a run of words."""
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big")


def fits(candidate: Candidate) -> bool:
    """True for a document of the right size, without offence, personal data or a notice that must stay with it."""
    text = candidate.text
    if not MIN_BYTES <= len(text.encode()) <= MAX_BYTES or AVOID.search(text) or PERSONAL.search(text):
        return False
    if FAMOUS.search(text) and "messages" in candidate.document:
        return False
    return "\ufffd" not in text and not any(ord(c) < 32 and c not in "\n\t" for c in text)


def choose(candidates: Iterable[Candidate], budget: int, per_group: int, openings: set[str]) -> list[Candidate]:
    """Take turns among the groups, best rank first, until the budget is used.

    openings: first 50 characters of what was taken before; it grows. A work gives one excerpt (its key without the
    attempt), and nothing is taken that repeats word runs of what was.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.group].append(candidate)
    queues = [sorted(groups[name], key=lambda c: rank(c.key)) for name in sorted(groups, key=rank)]
    taken: list[Candidate] = []
    counts: Counter[str] = Counter()
    works: set[str] = set()
    seen: set[int] = set()
    size = 0
    while any(queues) and size < budget:
        for queue in queues:
            while queue and size < budget:
                candidate = queue.pop(0)
                runs = shingles(candidate.text)
                work = re.sub(r":\d$", "", candidate.key)
                fresh = len(runs & seen) <= MAX_SHARED * len(runs) and candidate.text[:50] not in openings
                if work in works or counts[candidate.group] >= per_group or not fresh or not fits(candidate):
                    continue
                taken.append(candidate)
                works.add(work)
                counts[candidate.group] += 1
                seen |= runs
                openings.add(candidate.text[:50])
                size += len(line_of(candidate).encode())
                break
    return sorted(taken, key=lambda c: rank(f"order {c.key}"))


def line_of(candidate: Candidate) -> str:
    """The document as one line of JSON."""
    return json.dumps(candidate.document, ensure_ascii=False) + "\n"


def build(data: Path, sources: CodeSources, out: Path) -> None:
    """Write the four files and say how many documents of which source each holds."""
    out.mkdir(parents=True, exist_ok=True)
    openings: set[str] = set()
    candidates = {"english": english(data), "japanese": japanese(data), "code": code(sources), "chat": chat(data)}
    for kind, found in candidates.items():
        taken = choose(found, BUDGET[kind], PER_GROUP[kind], openings)
        content = "".join(line_of(c) for c in taken).encode()
        (out / f"{kind}.jsonl").write_bytes(content)
        families = Counter(c.key.split("/")[0] if kind in ("code", "chat") else kind for c in taken)
        digest = hashlib.sha256(content).hexdigest()
        print(f"{kind}.jsonl  {len(taken)} documents  {len(content)} bytes  {digest}  {dict(families)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a folder that does not exist is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("data", type=Path, help="folder with corpora/, instruct/ and tasks/ as SOURCES.md names them")
    parser.add_argument("--out", type=Path, default=root / "src/halve/data/mixed", help="default: %(default)s")
    parser.add_argument("--python", type=Path, required=True, help="CPython 3.11 library folder (lib/python3.11)")
    parser.add_argument("--npm", type=Path, required=True, help="the node_modules folder inside the npm package")
    parser.add_argument("--pyenv", type=Path, required=True, help="a pyenv checkout")
    parser.add_argument("--postgresql", type=Path, required=True, help="PostgreSQL 15 share folder with *.sql")
    parser.add_argument(
        "--torch", type=Path, required=True, help="torch's include folder, which has fmt/ and pybind11/"
    )
    args = parser.parse_args(argv)
    for name in ("data", "python", "npm", "pyenv", "postgresql", "torch"):
        if not getattr(args, name).is_dir():
            parser.error(f"{name}: {getattr(args, name)} is not a folder; give the folder that --help describes")
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse(argv)
    sources = CodeSources(
        python=args.python, npm=args.npm, pyenv=args.pyenv, postgresql=args.postgresql, torch=args.torch
    )
    try:
        build(args.data, sources, args.out)
    except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        print(
            f"make_mixed_text: {type(error).__name__}: {error}; the inputs are listed in {args.out / 'SOURCES.md'}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
