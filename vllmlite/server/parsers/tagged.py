"""Tool calls whose arguments are texts between tags, one tag per parameter: GLM 4.5, Qwen3-Coder.

The format does not show whether ``5`` is a number or a string; the tool's JSON Schema decides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vllmlite.server.parsers.parts import CallArguments, ToolParser, Tools, split_at

MAX_NAME = 512
"""Maximum characters of a name."""


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of a model family."""

    opening: tuple[str, ...]
    """Tags that may open a call; the last one directly precedes the name."""
    name_end: tuple[str, ...]
    """Texts that may end the name; a parameter's tag or the closing tag is processed again."""
    key: tuple[str, str]
    """Tags around a parameter's name."""
    value: tuple[str, str]
    """Tags around a parameter's text; the opening one may be empty."""
    closing: tuple[str, ...]
    """Tags that close a call, in order; all but the first are optional."""
    lines: bool
    """Whether names and values are on lines of their own."""


class Tagged(ToolParser):
    """Content and calls in any order. Subclasses define ``tags``."""

    tags: ClassVar[Tags]

    def __init__(self, tools: Tools) -> None:
        """Parse an answer to a request with ``tools``."""
        super().__init__(tools)
        self._name = self._key = self._value = ""
        self._is_text = False
        """Whether the argument is a string, which is emitted incrementally."""
        self._count = 0
        """Number of arguments of the call so far."""
        self._closed = 0
        """Number of closing tags found."""

    def finish(self, cut: bool = False) -> list[Any]:
        """Return the remaining parts of the answer. ``cut``: a limit ended the text, not the model. A call that the
        model ended early is completed; a truncated one is not."""
        if not cut:
            while self._state(True):
                pass
            if self._state == self._in_value:
                self._end_value()
            if self._state in (self._in_value, self._between, self._in_key, self._before_value):
                self._emit_arguments("}" if self._count else "{}")
        return super().finish(cut)

    def content(self, ended: bool) -> bool:
        """State: content, until a call opens."""
        if not self._content_until(self.tags.opening, ended):
            return False
        return self._go(self._in_name if self._held == self.tags.opening[-1] else self._opened)

    def _opened(self, ended: bool) -> bool:
        """State after the first of two opening tags."""
        if not self._skip_space():
            return self._reject_call() if ended else False
        opens = self._accept(self.tags.opening[-1], ended)
        if opens is None:
            return False
        return self._go(self._in_name) if opens else self._reject_call()

    def _in_name(self, ended: bool) -> bool:
        self._skip_space()
        name, mark, rest = split_at(self._text, self.tags.name_end, ended)
        if len(name) > MAX_NAME or (mark and (not name.strip() or "<" in name)):
            return self._reject_call()
        if not mark:
            return self._reject_call() if ended else False
        self._name, self._count = name.strip(), 0
        self._text = (mark if mark in (self.tags.key[0], self.tags.closing[0]) else "") + rest
        self._begin_call(self._name)
        return self._go(self._between)

    def _between(self, ended: bool) -> bool:
        """State: a parameter or the end of the call comes next. Return whether the state changed."""
        if not self._skip_space():
            return False
        for mark, state in ((self.tags.key[0], self._in_key), (self.tags.closing[0], self._close)):
            taken = self._accept(mark, ended)
            if taken is None:
                return False
            if taken:
                self._held = ""
                if state == self._close:
                    self._emit_arguments("}" if self._count else "{}")
                    self._closed = 1
                return self._go(state)
        self._emit_arguments("}" if self._count else "{}")
        return self._reject_call()

    def _in_key(self, ended: bool) -> bool:
        key, mark, rest = split_at(self._text, (self.tags.key[1],), ended)
        if not mark:
            return False
        self._key, self._text = key.strip(), rest
        return self._go(self._before_value)

    def _before_value(self, ended: bool) -> bool:
        if self.tags.value[0] and not self._skip_space():
            return False
        if self.tags.lines and not self._text:
            return False
        if self._accept(self.tags.value[0], ended) is None:
            return False
        if self.tags.lines:
            self._text = self._text.removeprefix("\n")
        self._held = self._value = ""
        self._is_text = kinds_of(self._schema()) == {"string"}
        self._emit_arguments(("," if self._count else "{") + json.dumps(self._key, ensure_ascii=False) + ":")
        self._count += 1
        if self._is_text:
            self._emit_arguments('"')
        return self._go(self._in_value)

    def _in_value(self, ended: bool) -> bool:
        closing = self.tags.value[1]
        marks = ("\n" + closing, closing) if self.tags.lines else (closing,)
        text, mark, self._text = split_at(self._text, marks, ended)
        if self._is_text:
            self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value += text
        if not mark:
            return False
        self._end_value()
        return self._go(self._between)

    def _end_value(self) -> None:
        if self._is_text:
            self._emit_arguments('"')
        else:
            self._emit_arguments(json.dumps(converted(self._value, self._schema()), ensure_ascii=False))

    def _close(self, ended: bool) -> bool:
        """State after the closing tag, before optional further ones."""
        if self._closed == len(self.tags.closing):
            return self._reject_call()
        if not self._skip_space() and not ended:
            return False
        closes = self._accept(self.tags.closing[self._closed], ended)
        if closes is None:
            return False
        if closes:
            self._held = ""
        self._closed = self._closed + 1 if closes else len(self.tags.closing)
        return True

    def _emit_arguments(self, text: str) -> None:
        self._parts.append(CallArguments(self._calls - 1, text))

    def _schema(self) -> Any:
        parameters = self._tools.get(self._name)
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        return properties.get(self._key) if isinstance(properties, dict) else None


def kinds_of(schema: Any) -> set[str]:
    """Return the JSON types that a parameter's schema names at its top level; empty if it names none."""
    return set(_kinds(schema))


def _kinds(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if kind is not None:
        yield from (name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str))
        return
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        for branch in branches if isinstance(branches, list) else ():
            yield from _kinds(branch)
    values = (
        schema["enum"]
        if isinstance(schema.get("enum"), list)
        else [schema["const"]]
        if "const" in schema
        else []
    )
    yield from map(_kind, values)


def _kind(value: Any) -> str:
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


_WORDS = {"True": True, "False": False, "None": None}


def converted(text: str, schema: Any) -> Any:
    """Return the value of ``text``: parsed as JSON or as Python's True, False or None if ``schema`` allows its type,
    else the text itself."""
    kinds = kinds_of(schema)
    stripped = text.strip()
    try:
        value = _WORDS[stripped] if stripped in _WORDS else json.loads(stripped)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    kind = _kind(value)
    fits = not kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits or "string" not in kinds else text


class Glm45(Tagged):
    """GLM 4.5 to 4.7."""

    tags = Tags(
        opening=("<tool_call>",),
        name_end=("\n", "<arg_key>", "</tool_call>"),
        key=("<arg_key>", "</arg_key>"),
        value=("<arg_value>", "</arg_value>"),
        closing=("</tool_call>",),
        lines=False,
    )


class Qwen3Coder(Tagged):
    """Qwen3-Coder and Qwen3.5."""

    tags = Tags(
        opening=("<tool_call>", "<function="),
        name_end=(">",),
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
        closing=("</function>", "</tool_call>"),
        lines=True,
    )
