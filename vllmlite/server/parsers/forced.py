"""Tool calls that a grammar holds the output to: nothing else can be in it."""

from __future__ import annotations

from vllmlite.server.parsers.parts import CallArguments, CallBegin, Part, ToolParser


class RequiredCalls(ToolParser):
    """A JSON list of calls: ``tool_choice`` ``required``."""

    def __init__(self) -> None:
        super().__init__({})

    def begin(self, ended: bool) -> bool:
        """The first state: the list opens."""
        if not self._skip_space():
            return False
        return self._go(self.list_of_calls) if self._takes("[", ended) else self._give_back()


class NamedCall:
    """The arguments of the one tool that ``tool_choice`` names."""

    def __init__(self, name: str) -> None:
        self._parts: list[Part] = [CallBegin(0, name)]

    def feed(self, text: str) -> list[Part]:
        """See :class:`~vllmlite.server.parsers.parts.Parser`."""
        parts, self._parts = self._parts, []
        return [*parts, CallArguments(0, text)]

    def finish(self, cut: bool = False) -> list[Part]:
        """See :class:`~vllmlite.server.parsers.parts.Parser`."""
        parts, self._parts = self._parts, []
        return parts
