"""One chat template, compiled and run where it can do no harm.

A template is foreign code. It runs in jinja2's sandbox on JSON values, and a rendering has a budget: MAX_STEPS loop
turns and calls, MAX_CHARS characters in the text and in what operators make on the way to it. That stops endless
loops and runaway growth; it is no proof against every way to fill the memory.
Source of the rules: transformers 5, `utils/chat_template_utils.py`.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from jinja2 import Undefined, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from halve.core.errors import TextError

MAX_STEPS = 1_000_000
MAX_CHARS = 16_000_000


class Template:
    """A compiled template. file: where its source came from, for messages."""

    def __init__(self, source: str, file: Path) -> None:
        self._source, self._file = source, file
        self._compiled: Any = None

    def render(self, context: Mapping[str, Any]) -> str:
        """The text. Raises TextError when the template is no template, fails, refuses or exceeds its budget."""
        file = self._file
        try:
            return self._render(context)
        except RefusedError as error:
            raise TextError(f"{file}: the chat template refuses these messages: {error}") from error
        except BudgetError as error:
            raise TextError(f"{file}: the chat template was stopped: {error}") from error
        except SecurityError as error:
            raise TextError(f"{file}: the chat template does what the sandbox forbids: {error}") from error
        except TemplateSyntaxError as error:
            raise TextError(f"{file}: chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is code: it may fail in any way
            what = f"{type(error).__name__}: {error}"
            raise TextError(f"{file}: the chat template fails on these messages: {what}") from error

    def _render(self, context: Mapping[str, Any]) -> str:
        if self._compiled is None:
            self._compiled = Environment().from_string(self._source)
        budget, pieces = _Budget(), []
        for piece in self._compiled.generate({**context, _BUDGET: budget}):
            budget.spend(chars=len(piece))
            pieces.append(piece)
        return "".join(pieces)


class RefusedError(TemplateError):
    """`raise_exception` was called."""


class BudgetError(Exception):
    """The rendering exceeds MAX_STEPS or MAX_CHARS."""


_BUDGET = "the rendering's budget"  # a key of the context that no template can name


class _Budget:
    def __init__(self) -> None:
        self.steps, self.chars = MAX_STEPS, MAX_CHARS

    def spend(self, steps: int = 0, chars: int = 0) -> None:
        self.steps -= steps
        self.chars -= chars
        if self.steps < 0:
            raise BudgetError(f"more than {MAX_STEPS} loop turns and calls")
        if self.chars < 0:
            raise BudgetError(f"more than {MAX_CHARS} characters")


class _Code(CodeGenerator):
    """Counts every turn of a loop, and keeps `~` within MAX_CHARS."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802  jinja's name
        turn = self._call("count_turn", [], node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.visit(self._call("join_text", node.nodes, node), frame)

    def _call(self, name: str, args: list[nodes.Expr], node: nodes.Node) -> nodes.Expr:
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        return cast(nodes.Expr, call.set_lineno(node.lineno).set_environment(self.environment))


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  the attribute is jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _TemplateDict:
    """`dict` of a template, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of a template; names that begin with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Environment(ImmutableSandboxedEnvironment):
    """jinja2 as transformers sets it up for chat templates, on a budget."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.finalize = _check_output
        for name in ("center", "indent", "batch", "slice"):
            self.filters[name] = _bounded(self.filters[name])
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"dict": _TemplateDict(), "namespace": _Namespace}

    @pass_context
    def count_turn(self, context: Context) -> None:
        """One turn of a loop."""
        context.parent[_BUDGET].spend(steps=1)

    def join_text(self, *parts: Any) -> str:
        """`a ~ b`."""
        _check_size(parts)
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic whose result could fill the memory is refused before it is done."""
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | list | tuple):
                    _check_count(times * len(value))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            _check_count(bits * abs(right) if operator == "**" else bits + right.bit_length(), 10_000, "bits")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{6}|\*)", left):
            raise BudgetError(f"a field of {left!r:.40} is wider than 99999 characters")
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_count(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call is a step; methods of text take no large numbers (`"x".center(10 ** 10)`)."""
        context.parent[_BUDGET].spend(steps=1)
        if isinstance(getattr(obj, "__self__", None), str):
            _check_numbers(args, kwargs)
        return super().call(context, obj, *args, **kwargs)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        return function(*args, **kwargs)

    return run


def _check_numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _check_count(value)


@pass_context
def _check_output(context: Context, value: Any) -> Any:
    if not isinstance(value, Undefined):
        context.parent[_BUDGET].spend(chars=_check_size(value))
    return value


def _check_size(value: Any) -> int:
    """Characters of `str(value)`, about; BudgetError when they exceed MAX_CHARS, found without making the string."""
    total, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        total += len(item) if isinstance(item, str) else 4
        _check_count(total + len(rest))
    return total


def _check_count(count: int, limit: int | None = None, what: str = "characters") -> None:
    limit = MAX_CHARS if limit is None else limit
    if count > limit:
        raise BudgetError(f"more than {limit} {what}")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_size(value)
    _check_count(indent or 0, 64, "spaces of indent")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
