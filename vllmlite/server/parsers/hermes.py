"""Hermes's tool calls, which Qwen has taken over: ``<tool_call>{"name": …, "arguments": …}</tool_call>``."""

from __future__ import annotations

from vllmlite.server.parsers.parts import ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolParser):
    """Content and calls in any order."""

    def content(self, ended: bool) -> bool:
        """A state: content, until a call opens."""
        return self._content_until(OPEN, ended) and self._go(self._opened)

    def _opened(self, ended: bool) -> bool:
        if self._skip_space():
            return self._read_call(self._close)
        return self._give_back() if ended else False

    def _close(self, ended: bool) -> bool:
        if not self._skip_space() and not ended:
            return False
        closes = self._takes(CLOSE, ended)
        if closes is None:
            return False
        if closes:
            self._taken = ""
        return self._give_back()
