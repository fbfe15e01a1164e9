"""The Jinja environment of chat templates: what transformers offers them, in Jinja's immutable sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from vllmlite.chat.values import NoContent
from vllmlite.errors import ParameterError


class Refusal(Exception):
    """A chat template called ``raise_exception``."""


class Generation(Extension):
    """``{% generation %}`` blocks, which mark an assistant's text for training; they render what they hold."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """A call block, as transformers makes of it: variables set inside stay inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return caller()


class PublicNamespace(Namespace):
    """``namespace()`` without names that begin with an underscore, by which Python's own functions find methods."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        """Jinja's own arguments: mappings, and values by name, ``self`` included."""
        for name in dict(*args[1:], **kwargs):
            _check_public(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        """``{% set namespace.name = value %}``."""
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name}")


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _is_none(value: object) -> bool:
    return value is None or isinstance(value, NoContent)


def _is_undefined(value: object) -> bool:
    return isinstance(value, (Undefined, NoContent))


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=PublicNamespace
    )
    made.tests.update(none=_is_none, undefined=_is_undefined, defined=lambda value: not _is_undefined(value))
    return made


ENVIRONMENT = _environment()

_FAILURES = (
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
    MemoryError,
)  # fmt: skip
"""What a template raises that meets values which it does not expect."""


@lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """The template ``source``. Raises :class:`ParameterError` if it is not one."""
    try:
        return ENVIRONMENT.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise ParameterError("chat_template", source, f"is not a Jinja template: {error}") from None


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """The text of ``template``. Raises :class:`ParameterError`, naming messages, where the template refuses them."""
    try:
        return template.render(variables)
    except Refusal as refusal:
        reason = str(refusal)
    except _FAILURES as error:
        reason = f"the chat template refuses them: {error}"
    raise ParameterError("messages", variables["messages"], reason)
