"""Tool calls as JSON objects between markers: ``<tool_call>{"name": …, "arguments": …}</tool_call>`` and similar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllmlite.server.parsers.parts import ToolParser, Tools


@dataclass(frozen=True, slots=True)
class JsonMarks:
    """The markers of a model family."""

    opening: tuple[str, ...]
    """Each of them opens an object or a list of objects."""
    closing: str


class MarkedJson(ToolParser):
    """Content and calls in any order. Subclasses define ``marks``."""

    marks: ClassVar[JsonMarks]

    def __init__(self, tools: Tools) -> None:
        """Parse an answer to a request with ``tools``."""
        super().__init__(tools)
        self._after_list = self._close

    def content(self, ended: bool) -> bool:
        """State: content, until a marker opens a call."""
        return self._content_until(self.marks.opening, ended) and self._go(self._opened)

    def _opened(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._reject_call() if ended else False
        if self._accept("[", ended):
            return self._go(self.list_of_calls)
        return self._read_call(self._close)

    def _close(self, ended: bool) -> bool:
        return self._read_closing(self.marks.closing, ended)


class Hermes(MarkedJson):
    """Hermes, Qwen 2.5 and 3, Granite 4."""

    marks = JsonMarks(("<tool_call>",), "</tool_call>")


class Granite(MarkedJson):
    """Granite 3: a list of calls after either marker, without an end marker."""

    marks = JsonMarks(("<|tool_call|>", "<tool_call>"), "</tool_call>")


class Jamba(MarkedJson):
    """Jamba: a list of calls."""

    marks = JsonMarks(("<tool_calls>",), "</tool_calls>")
