"""The Jinja environment of chat templates: transformers' extensions in Jinja's immutable sandbox."""

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
    """The ``{% generation %}`` block, which marks the assistant's text for training; it renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012 -- declared this way by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block into a call block, as transformers does: variables set inside stay local to it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return caller()


class PublicNamespace(Namespace):
    """``namespace()`` that rejects names beginning with an underscore, which could replace special methods."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        """Take the arguments of Jinja's ``Namespace``: mappings and keyword values, ``self`` allowed as a keyword."""
        for name in dict(*args[1:], **kwargs):
            _check_public(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        """Handle ``{% set namespace.name = value %}``."""
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
"""Exceptions that a template raises when it meets values it does not expect."""


@lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """Return the compiled template. Raises :class:`ParameterError` if ``source`` is not a valid Jinja template."""
    try:
        return ENVIRONMENT.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise ParameterError("chat_template", source, f"is not a Jinja template: {error}") from None


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Return the rendered text. Raises :class:`ParameterError` for ``messages`` if the template rejects them."""
    try:
        return template.render(variables)
    except Refusal as refusal:
        reason = str(refusal)
    except _FAILURES as error:
        reason = f"the chat template refuses them: {error}"
    raise ParameterError("messages", variables["messages"], reason)
