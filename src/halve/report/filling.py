"""Templates of all pages, with what each of them may say."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from halve.core.units import format_bytes
from halve.report import words
from halve.report.languages import Both


def fill(template: str, **values: Any) -> str:
    """The page of `templates/<template>.html.j2`."""
    return words.printable(_environment().get_template(f"{template}.html.j2").render(**values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("halve.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["t"] = Both
    environment.filters.update(
        bytes=format_bytes,
        number=words.number,
        percent=words.percent,
        measured=words.measured,
        loss=words.loss,
        unbroken=words.unbroken,
        format_words=words.format_words,
        method_words=words.method_words,
        times_smaller=words.times_smaller,
    )
    return environment
