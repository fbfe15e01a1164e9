"""Tool calls as a name between marks and a JSON object of arguments: DeepSeek V3 and V3.1, Kimi K2."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from vllmlite.server.parsers.call_json import ArgumentsReader
from vllmlite.server.parsers.parts import ToolParser, Tools

MAX_HEADER = 512
"""Most characters between a call's opening mark and its arguments."""


@dataclass(frozen=True, slots=True)
class NamedMarks:
    """The marks of a family of models."""

    section: tuple[str, str]
    """Around all calls."""
    call: tuple[str, str]
    """Around each."""
    header: re.Pattern[str]
    """What stands between a call's opening mark and its arguments: a group ``name``, perhaps a group ``id``."""
    fence: str = ""
    """What stands between the arguments and the call's closing mark."""


class NamedJson(ToolParser):
    """Content, then calls. A subclass names its marks."""

    marks: ClassVar[NamedMarks]

    def __init__(self, tools: Tools) -> None:
        """See :class:`ToolParser`."""
        super().__init__(tools)
        self._arguments = ArgumentsReader()

    def content(self, ended: bool) -> bool:
        """A state: content, until a section or a call opens."""
        section, call = self.marks.section[0], self.marks.call[0]
        if not self._content_until((section, call), ended):
            return False
        return self._go(self._header if self._taken == call else self._between)

    def _between(self, ended: bool) -> bool:
        """Before a call, or the end of the section."""
        if not self._skip_space():
            return self._give_back() if ended and self._taken else False
        for mark, state in ((self.marks.call[0], self._header), (self.marks.section[1], self.content)):
            taken = self._takes(mark, ended)
            if taken is None:
                return False
            if taken:
                if state == self.content:
                    self._taken = ""
                return self._go(state)
        return self._give_back()

    def _header(self, ended: bool) -> bool:
        at = self._text.find("{")
        if at < 0:
            return self._give_back() if ended or len(self._text) > MAX_HEADER else False
        found = self.marks.header.fullmatch(self._text[:at])
        if found is None or at > MAX_HEADER:
            return self._give_back()
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
        """After the arguments."""
        for mark in (self.marks.fence, self.marks.call[1]):
            self._skip_space()
            if self._takes(mark, ended) is None:
                return False
        self._taken = ""
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
    """Kimi K2, whose chat template shows the model its own ids again."""

    marks = NamedMarks(
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ("<|tool_call_begin|>", "<|tool_call_end|>"),
        re.compile(r"\s*(?P<id>(functions\.)?(?P<name>[^\s<:]+)(:\d+)?)\s*<\|tool_call_argument_begin\|>\s*"),
    )
