"""Llama 3's tool calls: the whole answer is ``{"name": …, "parameters": …}``, or several separated by semicolons."""

from __future__ import annotations

from vllmlite.server.parsers.parts import ToolParser

TAG = "<|python_tag|>"


class Llama3Json(ToolParser):
    """Calls of known tools, or content; content may follow calls."""

    def begin(self, ended: bool) -> bool:
        """Initial state: an object, optionally after the tag, begins a call."""
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if self._accept(TAG, ended) is None:
            return False
        return self._go(self._object)

    def _begins_call(self) -> bool:
        named = self._reader is not None and self._reader.begins_name
        return super()._begins_call() and (named or self._calls > 0 or TAG in self._held)

    def _object(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if self._text.startswith("{"):
            return self._read_call(self._between, known=True)
        return self._reject_call()

    def _between(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if self._accept(";", ended):
            return self._go(self._object)
        return self._reject_call()
