import re

import pytest
import typer

import halve
from halve.cli.main import app
from tests.docs.pages import ROOT, commands, read, rows, section

GUIDE = "docs/GUIDE.md"
CLI = typer.main.get_command(app)
GLOBAL = [p for p in CLI.params if p.name != "help"]
SHOWN = [(name, words) for name in ("README.md", GUIDE) for words in commands(name)]


def flags_of(parameters):
    return {flag for p in parameters for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}


def parameters_of(verb):
    """Of a verb, or of all verbs of a group."""
    command = CLI.commands[verb]
    return [p for one in getattr(command, "commands", {"": command}).values() for p in one.params]


def documented(text):
    return {flag: row for row in rows(text, "flag") for flag in re.findall(r"`(--?[\w-]+)`", row[0])}


def test_pages_show_command_lines():
    assert len(SHOWN) > 15


@pytest.mark.parametrize(("name", "words"), SHOWN, ids=[" ".join(words) for _, words in SHOWN])
def test_a_command_line_of_the_docs_parses(name, words):
    while words and words[0].startswith("-"):
        assert words[0] in flags_of(GLOBAL)
        words = words[1:]
    if words:
        verb = CLI.commands[words[0]]
        verb.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize("verb", sorted(CLI.commands))
def test_the_guide_lists_the_flags_of_a_verb_and_no_others(verb):
    text = section(GUIDE, verb.capitalize())
    assert text is not None, f"docs/GUIDE.md has no section {verb.capitalize()!r}"
    assert documented(text).keys() == flags_of(parameters_of(verb))


@pytest.mark.parametrize("verb", sorted(CLI.commands))
def test_the_guide_states_the_defaults_of_a_verb(verb):
    table = documented(section(GUIDE, verb.capitalize()))
    for parameter in parameters_of(verb):
        flags = flags_of([parameter])
        if not flags or isinstance(parameter.default, bool) or parameter.default in (None, ()) or parameter.required:
            continue
        default = getattr(parameter.default, "value", parameter.default)
        assert table[min(flags, key=len)][-1] == f"`{default}`", flags


def test_the_guide_lists_the_flags_before_the_verb():
    assert documented(section(GUIDE, "Install")).keys() == flags_of(GLOBAL)


@pytest.mark.parametrize("name", halve.__all__)
def test_the_guide_names_every_public_name(name):
    assert f"`halve.{name}`" in section(GUIDE, "Python")


def test_the_guide_lists_every_verb_that_prints_json():
    printing = {name for name, verb in CLI.commands.items() if "--json" in flags_of(parameters_of(name))}
    assert {row[0].strip("`") for row in rows(section(GUIDE, "JSON"), "verb")} == printing


def test_the_guide_lists_the_exit_codes():
    assert [row[0] for row in rows(section(GUIDE, "Exit codes"), "code")] == ["0", "1", "2", "130"]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readme_names_both_make_commands(target):
    assert f"make {target}" in read("README.md")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
