"""What an answer is made of, and the state machine that all parsers of answers are.

A parser takes text as it comes and says at once whatever can no longer turn out to be something else. What it says
depends on the text alone: any split of the text into pieces gives the same parts, once neighbours are merged.
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
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The ``index``-th tool call of the answer begins; its name is known."""

    index: int
    name: str
    id: str = ""
    """The id that the model has given it, if its format has one."""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, a JSON text."""

    index: int
    text: str


Part: TypeAlias = Content | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """Text in pieces to parts in pieces."""

    def feed(self, text: str) -> list[Part]:
        """What more is certain, with ``text`` after what came before."""
        ...

    def finish(self, cut: bool = False) -> list[Part]:
        """Return the rest, now that nothing more comes. ``cut``: the model had not ended, a limit ended the text."""
        ...


def merged(parts: Iterable[Part]) -> list[Part]:
    """``parts`` with neighbours of one kind made one, empty ones left out."""
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
"""The JSON Schemas of the parameters of each tool, by its name."""
State: TypeAlias = Callable[[bool], bool]
"""A step of a machine: whether it got on. Told whether the text has ended, when it must decide on what there is."""


class ToolParser:
    """What parsers of tool calls share. A subclass has states, the first of which is ``begin``.

    White space between content and a call, or between two calls, belongs to neither. Text that begins like a call and
    turns out to be none becomes content, as it was written. If the text is cut inside what begins like a call, that
    beginning is left out: it is neither content nor a call."""

    def __init__(self, tools: Tools) -> None:
        """``tools``: those that there are."""
        self._tools = tools
        self._text = ""
        """What has come and is not used up."""
        self._parts: list[Part] = []
        self._space = ""
        """White space after content, which a call would swallow."""
        self._calls = 0
        self._reader: CallReader | None = None
        self._taken = ""
        """The beginning of what may be a call, to be given back if it is none."""
        self._after: State = self.content
        self._after_list: State = self.content
        self._state: State = self.begin

    def feed(self, text: str) -> list[Part]:
        """See :class:`Parser`."""
        self._text += text
        while self._state(False):
            pass
        return self._take()

    def finish(self, cut: bool = False) -> list[Part]:
        """See :class:`Parser`."""
        if cut and self._begins_call():
            self._text = self._taken = ""
        while self._state(True):
            pass
        if not self._calls:
            self._parts.append(Content(self._space))
        return self._take()

    def _begins_call(self) -> bool:
        """Return whether the text that is held back can only belong to a call, which a whole mark has opened."""
        return self._state not in (self.begin, self.content)

    def begin(self, ended: bool) -> bool:
        """The first state."""
        return self.content(ended)

    def content(self, ended: bool) -> bool:
        """A state: everything is content."""
        self._say(self._text)
        self._text = ""
        return False

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return merged(parts)

    def _go(self, state: State) -> bool:
        self._state = state
        return True

    def _say(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._parts.append(Content(kept))

    def _give_back(self) -> bool:
        """What was taken for a call is content."""
        self._say(self._taken)
        self._taken = ""
        return self._go(self.content)

    def _content_until(self, marks: Iterable[str], ended: bool) -> bool:
        """Say what stands before the first of ``marks``; whether one has come, and is taken."""
        before, mark, self._text = split_at(self._text, marks, ended)
        self._say(before)
        self._taken = mark
        return bool(mark)

    def _skip_space(self) -> bool:
        """Take white space; whether something else follows."""
        rest = self._text.lstrip()
        self._taken += self._text[: len(self._text) - len(rest)]
        self._text = rest
        return bool(rest)

    def _takes(self, literal: str, ended: bool) -> bool | None:
        """Take ``literal`` if it comes next; None while that is open."""
        if self._text.startswith(literal):
            self._text = self._text[len(literal) :]
            self._taken += literal
            return True
        return None if literal.startswith(self._text) and not ended else False

    def _read_closing(self, mark: str, ended: bool) -> bool:
        """Take the ``mark`` that ends calls, if it comes next; what follows is content."""
        if not self._skip_space() and not ended:
            return False
        closes = self._takes(mark, ended)
        if closes is None:
            return False
        if closes:
            self._taken = ""
        return self._give_back()

    def _read_arguments(self, reader: ArgumentsReader) -> None:
        """Hand on the arguments of the last call as far as ``reader`` finds them in the text, which it takes."""
        count = reader.feed(self._text)
        self._text = self._text[count:]
        self._parts.append(CallArguments(self._calls - 1, reader.take_arguments()))

    def _read_call(self, after: State, *, known: bool = False) -> bool:
        """Go and read an object with a name and arguments, then to ``after``. ``known``: its name must be a tool's."""
        self._reader = CallReader(frozenset(self._tools) if known else None)
        self._after = after
        return self._go(self._reading)

    def _reading(self, ended: bool) -> bool:
        reader = self._reader
        assert reader is not None
        begun = reader.name is not None
        count = reader.feed(self._text)
        if not begun:
            self._taken += self._text[:count]
        self._text = self._text[count:]
        if reader.name is not None:
            if not begun:
                self._begin_call(reader.name)
            self._parts.append(CallArguments(self._calls - 1, reader.take_arguments()))
        if reader.ended:
            return self._go(self._after)
        if reader.broken or ended:
            return self._go(self.content) if reader.name is not None else self._give_back()
        return False

    def _begin_call(self, name: str, call_id: str = "") -> None:
        self._parts.append(CallBegin(self._calls, name, call_id))
        self._calls += 1
        self._space = self._taken = ""

    def list_of_calls(self, ended: bool) -> bool:
        """A state: inside of a JSON list of calls."""
        if not self._skip_space():
            return self._give_back() if ended and self._taken else False
        if self._takes(",", ended):
            return True
        if self._takes("]", ended):
            self._taken = ""
            return self._go(self._after_list)
        return self._read_call(self.list_of_calls)


def split_at(text: str, marks: Iterable[str], ended: bool) -> tuple[str, str, str]:
    """Split ``text`` at the first of ``marks``: (what stands before it, the mark, the rest).

    Without a mark, the rest is what may be the beginning of one, unless the text has ``ended``."""
    found = min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)
    if found is not None:
        at, mark = found
        return text[:at], mark, text[at + len(mark) :]
    at = len(text) - (0 if ended else max(overlap(text, mark) for mark in marks))
    return text[:at], "", text[at:]


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may begin ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
