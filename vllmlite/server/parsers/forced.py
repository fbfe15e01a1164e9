"""Parsers of output that a grammar restricts to tool calls."""

from __future__ import annotations

from vllmlite.server.parsers.parts import CallArguments, CallBegin, Part, ToolParser


class RequiredCalls(ToolParser):
    """A JSON list of calls, for ``tool_choice`` ``required``."""

    def __init__(self) -> None:
        super().__init__({})

    def begin(self, ended: bool) -> bool:
        """Initial state: expect the opening bracket of the list."""
        if not self._skip_space():
            return False
        return self._go(self.list_of_calls) if self._accept("[", ended) else self._reject_call()


class NamedCall:
    """The arguments of the one tool named by ``tool_choice``."""

    def __init__(self, name: str) -> None:
        self._parts: list[Part] = [CallBegin(0, name)]

    def feed(self, text: str) -> list[Part]:
        """Add ``text``; return the parts of the answer that are certain now."""
        parts, self._parts = self._parts, []
        return [*parts, CallArguments(0, text)]

    def finish(self, cut: bool = False) -> list[Part]:
        """Return the remaining parts of the answer. ``cut``: a limit ended the text, not the model."""
        parts, self._parts = self._parts, []
        return parts
