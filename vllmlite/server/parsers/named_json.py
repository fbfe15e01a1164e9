"""Tool calls as a name between markers and a JSON object of arguments: DeepSeek V3 and V3.1, Kimi K2."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from vllmlite.server.parsers.call_json import ArgumentsReader
from vllmlite.server.parsers.parts import ToolParser, Tools

MAX_HEADER = 512
"""Maximum characters between a call's opening marker and its arguments."""


@dataclass(frozen=True, slots=True)
class NamedMarks:
    """The markers of a model family."""

    section: tuple[str, str]
    """Markers around all calls."""
    call: tuple[str, str]
    """Markers around each call."""
    header: re.Pattern[str]
    """Text between a call's opening marker and its arguments, with a group ``name`` and optionally ``id``."""
    fence: str = ""
    """Text between the arguments and the call's closing marker."""


class NamedJson(ToolParser):
    """Content, followed by calls. Subclasses define ``marks``."""

    marks: ClassVar[NamedMarks]

    def __init__(self, tools: Tools) -> None:
        """Parse an answer to a request with ``tools``."""
        super().__init__(tools)
        self._arguments = ArgumentsReader()

    def content(self, ended: bool) -> bool:
        """State: content, until a section or a call opens."""
        section, call = self.marks.section[0], self.marks.call[0]
        if not self._content_until((section, call), ended):
            return False
        return self._go(self._header if self._held == call else self._between)

    def _between(self, ended: bool) -> bool:
        """State before a call or the end of the section."""
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        for mark, state in ((self.marks.call[0], self._header), (self.marks.section[1], self.content)):
            taken = self._accept(mark, ended)
            if taken is None:
                return False
            if taken:
                if state == self.content:
                    self._held = ""
                return self._go(state)
        return self._reject_call()

    def _header(self, ended: bool) -> bool:
        at = self._text.find("{")
        if at < 0:
            return self._reject_call() if ended or len(self._text) > MAX_HEADER else False
        found = self.marks.header.fullmatch(self._text[:at])
        if found is None or at > MAX_HEADER:
            return self._reject_call()
        self._text = self._text[at:]
        self._begin_call(found["name"], found.groupdict().get("id", ""))
        self._arguments = ArgumentsReader()
        return self._go(self._object)

    def _object(self, ended: bool) -> bool:
        self._read_arguments(self._arguments)
        if self._arguments.broken:
            return self._go(self.content)
        return self._arguments.ended and self._go(self._close)

    def _close(self, ended: bool) -> bool:
        """State after the arguments."""
        for mark in (self.marks.fence, self.marks.call[1]):
            self._skip_space()
            if self._accept(mark, ended) is None:
                return False
        self._held = ""
        return self._go(self._between)


class DeepSeekV3(NamedJson):
    """DeepSeek V3 and R1."""

    marks = NamedMarks(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        re.compile(r"\s*function<｜tool▁sep｜>\s*(?P<name>[^\s<]+)\s*```json\s*"),
        fence="```",
    )


class DeepSeekV31(NamedJson):
    """DeepSeek V3.1."""

    marks = NamedMarks(
        DeepSeekV3.marks.section,
        DeepSeekV3.marks.call,
        re.compile(r"\s*(?P<name>[^\s<]+)\s*<｜tool▁sep｜>\s*"),
    )


class KimiK2(NamedJson):
    """Kimi K2, whose chat template shows the model's own call ids."""

    marks = NamedMarks(
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ("<|tool_call_begin|>", "<|tool_call_end|>"),
        re.compile(r"\s*(?P<id>(functions\.)?(?P<name>[^\s<:]+)(:\d+)?)\s*<\|tool_call_argument_begin\|>\s*"),
    )
