"""Mistral's tool calls: ``[TOOL_CALLS]`` and a JSON list; since the eleventh tokenizer version ``name{…}`` after each
marker, optionally with ``[ARGS]`` in between."""

from __future__ import annotations

import re
import secrets
import string

from vllmlite.server.parsers.call_json import ArgumentsReader
from vllmlite.server.parsers.parts import ToolParser, Tools

MARKER, ARGS = "[TOOL_CALLS]", "[ARGS]"
_NAME = re.compile(r"[\w.-]*")
_ALPHABET = string.ascii_letters + string.digits


def call_id() -> str:
    """Return an id as Mistral's templates require: nine letters and digits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class Mistral(ToolParser):
    """Content, followed by calls."""

    def __init__(self, tools: Tools) -> None:
        """Parse an answer to a request with ``tools``."""
        super().__init__(tools)
        self._name = ""
        self._arguments = ArgumentsReader()

    def content(self, ended: bool) -> bool:
        """State: content, until the marker."""
        return self._content_until((MARKER,), ended) and self._go(self._opened)

    def _opened(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._reject_call() if ended else False
        self._name = ""
        return self._go(self.list_of_calls if self._accept("[", ended) else self._named)

    def _named(self, ended: bool) -> bool:
        found = _NAME.match(self._text)
        piece = found.group() if found else ""
        self._name += piece
        self._held += piece
        self._text = self._text[len(piece) :]
        if not self._text and not ended:
            return False
        return self._go(self._marked) if self._name else self._reject_call()

    def _marked(self, ended: bool) -> bool:
        if self._accept(ARGS, ended) is None:
            return False
        return self._go(self._before_arguments)

    def _before_arguments(self, ended: bool) -> bool:
        if not self._text and not ended:
            return False
        if not self._text.startswith("{"):
            return self._reject_call()
        self._begin_call(self._name)
        self._arguments = ArgumentsReader()
        return self._go(self._object)

    def _object(self, ended: bool) -> bool:
        self._read_arguments(self._arguments)
        return (self._arguments.ended or self._arguments.broken) and self._go(self.content)
