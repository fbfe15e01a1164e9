"""Mistral's tool calls: ``[TOOL_CALLS]`` and a JSON list of them; since its eleventh tokenizer ``name{…}`` after each
such mark, perhaps with ``[ARGS]`` between."""

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
    """An id as Mistral's templates demand it: nine letters and digits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class Mistral(ToolParser):
    """Content, then calls."""

    def __init__(self, tools: Tools) -> None:
        """See :class:`ToolParser`."""
        super().__init__(tools)
        self._name = ""
        self._arguments = ArgumentsReader()

    def content(self, ended: bool) -> bool:
        """A state: content, until calls come."""
        return self._content_until((MARKER,), ended) and self._go(self._opened)

    def _opened(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._give_back() if ended else False
        self._name = ""
        return self._go(self.list_of_calls if self._takes("[", ended) else self._named)

    def _named(self, ended: bool) -> bool:
        found = _NAME.match(self._text)
        piece = found.group() if found else ""
        self._name += piece
        self._taken += piece
        self._text = self._text[len(piece) :]
        if not self._text and not ended:
            return False
        return self._go(self._marked) if self._name else self._give_back()

    def _marked(self, ended: bool) -> bool:
        if self._takes(ARGS, ended) is None:
            return False
        return self._go(self._before_arguments)

    def _before_arguments(self, ended: bool) -> bool:
        if not self._text and not ended:
            return False
        if not self._text.startswith("{"):
            return self._give_back()
        self._begin_call(self._name)
        self._arguments = ArgumentsReader()
        return self._go(self._object)

    def _object(self, ended: bool) -> bool:
        self._read_arguments(self._arguments)
        return (self._arguments.ended or self._arguments.broken) and self._go(self.content)
