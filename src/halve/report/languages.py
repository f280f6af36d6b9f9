"""Pages in two languages: every text stands there twice, and a switch without a script shows one of them.

`Both` is a text in English and Japanese; in a template it becomes two spans of which the style shows one. A chart is
drawn once for each language.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from halve.report.svg import join, tag

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = ("en", "ja")
NAMES: dict[Language, str] = {"en": "English", "ja": "日本語"}


@dataclass(frozen=True, slots=True)
class Both:
    """A text in both languages."""

    en: str
    ja: str

    def of(self, language: Language) -> str:
        """In one of them."""
        return self.en if language == "en" else self.ja

    def bare(self) -> "Both":
        """Without the # that marks the head of a column of numbers."""
        return Both(self.en.removeprefix("#"), self.ja.removeprefix("#"))

    def __html__(self) -> str:
        """As a template writes it."""
        if self.en == self.ja:
            return str(Markup("{}").format(self.en))
        return str(join(tag("span", self.of(language), lang=language) for language in LANGUAGES))

    def __add__(self, other: "Both | str") -> "Both":
        more = other if isinstance(other, Both) else Both(other, other)
        return Both(self.en + more.en, self.ja + more.ja)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table: its name for screen readers, heads (numbers when `right`), rows of cells."""

    name: Both
    heads: tuple[Both, ...]
    rows: tuple[tuple[Both, ...], ...]


def same(text: str) -> Both:
    """A text that needs no translation: a figure, a name."""
    return Both(text, text)


def in_both(draw: Callable[[Language], Markup]) -> Markup:
    """Something drawn in each language."""
    return join(tag("div", draw(language), lang=language) for language in LANGUAGES)


def switch(language: Language) -> Markup:
    """The switch: two radio buttons that stand before everything they show, with their labels. language: at first."""
    radio = Markup('<input type="radio" name="language" id="{}" class="language" aria-label="{}"{}>')
    parts = [radio.format(one, NAMES[one], Markup(" checked") if one == language else "") for one in LANGUAGES]
    choice = Markup('<label for="{0}" lang="{0}" class="choice">{1}</label>')
    return join([*parts, tag("div", *(choice.format(one, NAMES[one]) for one in LANGUAGES), class_="choices")])


STYLE = """
.language { position: absolute; opacity: 0; width: 1px; height: 1px; }
.choices { display: flex; gap: 4px; justify-content: flex-end; font-size: 14px; margin-bottom: 12px; }
.choice { padding: 4px 12px; border: 1px solid var(--line); border-radius: 6px; cursor: pointer; color: var(--soft); }
#en:checked ~ .choices [for=en], #ja:checked ~ .choices [for=ja] { background: var(--plain-paper); color: var(--plain);
  border-color: var(--plain); font-weight: 650; }
.language:focus-visible ~ .choices { outline: 2px solid var(--plain); outline-offset: 3px; }
#en:checked ~ :not(.choices) [lang=ja], #ja:checked ~ :not(.choices) [lang=en] { display: none; }
:lang(ja) { line-break: strict; word-break: normal; }
"""
