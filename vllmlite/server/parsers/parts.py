"""The parts of an answer, and the state machine shared by its parsers.

A parser gets the text incrementally and emits each part as soon as later text cannot change it. Its output depends on
the text only: any split of the text gives the same parts, once adjacent ones are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from vllmlite.server.parsers.call_json import ArgumentsReader, CallReader


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The start of the answer's ``index``-th tool call, whose name is known."""

    index: int
    name: str
    id: str = ""
    """The id that the model wrote, if its format has one."""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, which are JSON text."""

    index: int
    text: str


Part: TypeAlias = Content | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """An incremental parser of text to parts."""

    def feed(self, text: str) -> list[Part]:
        """Add ``text``; return the parts that are certain now."""
        ...

    def finish(self, cut: bool = False) -> list[Part]:
        """Return the remaining parts. ``cut``: a limit ended the text, not the model."""
        ...


def merged(parts: Iterable[Part]) -> list[Part]:
    """Return ``parts`` with adjacent parts of the same kind merged and empty ones removed."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, CallBegin):
            found.append(part)
            continue
        if not part.text:
            continue
        last = found[-1] if found else None
        if type(last) is type(part) and getattr(last, "index", 0) == getattr(part, "index", 0):
            assert last is not None and not isinstance(last, CallBegin)
            found[-1] = replace(last, text=last.text + part.text)
        else:
            found.append(part)
    return found


Tools: TypeAlias = Mapping[str, Any]
"""JSON Schemas of the tools' parameters, by tool name."""
State: TypeAlias = Callable[[bool], bool]
"""A state of a parser: a method that processes received text and returns whether it made progress. The argument is True
if the text has ended, so that no more text will arrive."""


class ToolParser:
    """Base class of tool-call parsers: a state machine whose initial state is ``begin``.

    White space between content and a call, or between calls, is dropped. Text that begins like a call but is not one
    becomes content unchanged. If the text is cut off inside the possible beginning of a call, that beginning is
    dropped."""

    def __init__(self, tools: Tools) -> None:
        """Parse an answer to a request with ``tools``."""
        self._tools = tools
        self._text = ""
        """Text that was received but not yet processed."""
        self._parts: list[Part] = []
        self._space = ""
        """White space after content, which is dropped if a call follows."""
        self._calls = 0
        self._reader: CallReader | None = None
        self._held = ""
        """The possible beginning of a call, which becomes content if it is not one."""
        self._after: State = self.content
        self._after_list: State = self.content
        self._state: State = self.begin

    def feed(self, text: str) -> list[Part]:
        """Add ``text``; return the parts of the answer that are certain now."""
        self._text += text
        while self._state(False):
            pass
        return self._drain()

    def finish(self, cut: bool = False) -> list[Part]:
        """Return the remaining parts of the answer. ``cut``: a limit ended the text, not the model."""
        if cut and self._begins_call():
            self._text = self._held = ""
        while self._state(True):
            pass
        if not self._calls:
            self._parts.append(Content(self._space))
        return self._drain()

    def _begins_call(self) -> bool:
        """Return whether the held-back text can only belong to a call, because a complete marker opened it."""
        return self._state not in (self.begin, self.content)

    def begin(self, ended: bool) -> bool:
        """Initial state."""
        return self.content(ended)

    def content(self, ended: bool) -> bool:
        """State: all text is content."""
        self._emit_content(self._text)
        self._text = ""
        return False

    def _drain(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return merged(parts)

    def _go(self, state: State) -> bool:
        self._state = state
        return True

    def _emit_content(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._parts.append(Content(kept))

    def _reject_call(self) -> bool:
        """Emit the held-back text as content."""
        self._emit_content(self._held)
        self._held = ""
        return self._go(self.content)

    def _content_until(self, marks: Iterable[str], ended: bool) -> bool:
        """Emit the text before the first of ``marks`` as content; return whether a marker was found and consumed."""
        before, mark, self._text = split_at(self._text, marks, ended)
        self._emit_content(before)
        self._held = mark
        return bool(mark)

    def _skip_space(self) -> bool:
        """Consume white space; return whether other text follows."""
        rest = self._text.lstrip()
        self._held += self._text[: len(self._text) - len(rest)]
        self._text = rest
        return bool(rest)

    def _accept(self, literal: str, ended: bool) -> bool | None:
        """Consume ``literal`` if it comes next; return None if the text is too short to know."""
        if self._text.startswith(literal):
            self._text = self._text[len(literal) :]
            self._held += literal
            return True
        return None if literal.startswith(self._text) and not ended else False

    def _read_closing(self, mark: str, ended: bool) -> bool:
        """State after a call: consume the end marker ``mark`` if it comes next, then go to :meth:`content`.

        Returns False if more text is needed to decide."""
        if not self._skip_space() and not ended:
            return False
        closes = self._accept(mark, ended)
        if closes is None:
            return False
        if closes:
            self._held = ""
        return self._reject_call()

    def _read_arguments(self, reader: ArgumentsReader) -> None:
        """Emit the last call's arguments as far as ``reader`` parses them, consuming their text."""
        count = reader.feed(self._text)
        self._text = self._text[count:]
        self._parts.append(CallArguments(self._calls - 1, reader.take_arguments()))

    def _read_call(self, after: State, *, known: bool = False) -> bool:
        """Parse an object with name and arguments, then go to ``after``; ``known``: only names of tools are
        accepted."""
        self._reader = CallReader(frozenset(self._tools) if known else None)
        self._after = after
        return self._go(self._reading)

    def _reading(self, ended: bool) -> bool:
        reader = self._reader
        assert reader is not None
        had_name = reader.name is not None
        count = reader.feed(self._text)
        if not had_name:
            self._held += self._text[:count]
        self._text = self._text[count:]
        if reader.name is not None:
            if not had_name:
                self._begin_call(reader.name)
            self._parts.append(CallArguments(self._calls - 1, reader.take_arguments()))
        if reader.ended:
            return self._go(self._after)
        if reader.broken or ended:
            return self._go(self.content) if reader.name is not None else self._reject_call()
        return False

    def _begin_call(self, name: str, call_id: str = "") -> None:
        self._parts.append(CallBegin(self._calls, name, call_id))
        self._calls += 1
        self._space = self._held = ""

    def list_of_calls(self, ended: bool) -> bool:
        """State: inside a JSON list of calls."""
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if self._accept(",", ended):
            return True
        if self._accept("]", ended):
            self._held = ""
            return self._go(self._after_list)
        return self._read_call(self.list_of_calls)


def split_at(text: str, marks: Iterable[str], ended: bool) -> tuple[str, str, str]:
    """Split ``text`` at the first of ``marks``; return (text before it, the marker, the rest).

    Without a marker, the rest is the possible beginning of one, or empty if the text has ``ended``."""
    found = min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)
    if found is not None:
        at, mark = found
        return text[:at], mark, text[at + len(mark) :]
    at = len(text) - (0 if ended else max(overlap(text, mark) for mark in marks))
    return text[:at], "", text[at:]


def overlap(text: str, marker: str) -> int:
    """Return how many characters at the end of ``text`` may begin ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
