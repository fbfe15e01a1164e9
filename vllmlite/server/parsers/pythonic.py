"""Tool calls as a Python list of calls, ``[weather(city="Oslo"), add(a=1, b=2)]``; parsed, never evaluated."""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from vllmlite.server.parsers.parts import CallArguments, ToolParser, Tools

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_WORDS = {"true": True, "false": False, "null": None}
"""JSON's names of values, which models also write in Python calls."""


@dataclass(frozen=True, slots=True)
class PythonMarks:
    """The markers with which a model family encloses calls."""

    opening: tuple[str, ...] = ()
    """Opening markers; if there are none, calls are the whole answer."""
    closing: str = ""
    bracketed: bool = True
    """Whether the calls are in a list; otherwise there is one per line."""


class Pythonic(ToolParser):
    """Calls of known tools; each is emitted when it is complete."""

    marks: ClassVar[PythonMarks] = PythonMarks()

    def __init__(self, tools: Tools) -> None:
        """Parse an answer to a request with ``tools``."""
        super().__init__(tools)
        self._scan = _Scan()

    def begin(self, ended: bool) -> bool:
        """Initial state: if there is no opening marker, a list begins the answer."""
        if self.marks.opening:
            return self.content(ended)
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        return self._go(self._opened)

    def content(self, ended: bool) -> bool:
        """State: content, until a marker opens calls."""
        if not self.marks.opening:
            return super().content(ended)
        return self._content_until(self.marks.opening, ended) and self._go(self._opened)

    def _begins_call(self) -> bool:
        opened = any(self._held.startswith(mark) for mark in self.marks.opening) or self._calls > 0
        name = re.match(r"[\w.]+\(", self._text)
        return super()._begins_call() and (opened or (name is not None and name.group()[:-1] in self._tools))

    def _opened(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._reject_call() if ended else False
        if self.marks.bracketed and not self._accept("[", ended):
            return self._reject_call()
        return self._go(self._name)

    def _name(self, ended: bool) -> bool:
        """State before a call: in a list also after a comma, on lines also before the closing marker."""
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if not self.marks.bracketed:
            closes = self._accept(self.marks.closing, ended)
            if closes is None:
                return False
            if closes:
                self._held = ""
                return self._go(self.content)
        found = _NAME.match(self._text)
        name = found.group() if found else ""
        if name == self._text and not ended:
            return False
        if name not in self._tools or not self._text.startswith("(", len(name)):
            return self._reject_call()
        self._scan = _Scan()
        return self._go(self._call)

    def _call(self, ended: bool) -> bool:
        end = self._scan.end(self._text)
        if end < 0:
            return self._reject_call() if ended or self._scan.broken else False
        read = _read(self._text[:end])
        if read is None:
            return self._reject_call()
        name, arguments = read
        self._text = self._text[end:]
        self._begin_call(name)
        self._parts.append(CallArguments(self._calls - 1, arguments))
        return self._go(self._between if self.marks.bracketed else self._name)

    def _between(self, ended: bool) -> bool:
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if self._accept(",", ended):
            return self._go(self._name)
        if self._accept("]", ended):
            self._held = ""
            return self._go(self._close)
        return self._reject_call()

    def _close(self, ended: bool) -> bool:
        if not self.marks.closing:
            return self._go(self.content)
        return self._read_closing(self.marks.closing, ended)


class _Scan:
    """Finds the end of the call that a text begins with; continues where it stopped."""

    def __init__(self) -> None:
        self.broken = False
        self._at = 0
        self._quote = ""
        self._closers: list[str] = []

    def end(self, text: str) -> int:
        """Return the position after the call's closing parenthesis, or -1 if it is not there yet."""
        while self._at < len(text):
            char = text[self._at]
            self._at += 1
            if self._quote:
                if char == "\\":
                    if self._at == len(text):  # the escaped character has not arrived
                        self._at -= 1
                        return -1
                    self._at += 1
                elif char == self._quote:
                    self._quote = ""
            elif char in "'\"":
                self._quote = char
            elif char in "([{":
                self._closers.append({"(": ")", "[": "]", "{": "}"}[char])
            elif char in ")]}":
                if not self._closers or self._closers.pop() != char:
                    self.broken = True
                    return -1
                if not self._closers:
                    return self._at
        return -1


def _read(text: str) -> tuple[str, str] | None:
    """Return a call's name and its arguments as JSON; None if it is not a call with plain keyword arguments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes
            call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            return None
        arguments = {str(word.arg): _value(word.value) for word in call.keywords}
        return ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(str() | int() | float() | bool() | None as value):
            return value
        case ast.Name(name) if name in _WORDS:
            return _WORDS[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(elements) | ast.Tuple(elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys, values):
            names = [_value(key) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise ValueError("a key that is no string")
            return dict(zip(names, map(_value, values), strict=True))
    raise ValueError("not a plain value")


class Llama4Pythonic(Pythonic):
    """Llama 4, whose calls may be enclosed in markers."""

    marks = PythonMarks(("<|python_start|>",), "<|python_end|>")

    def begin(self, ended: bool) -> bool:
        """Initial state: a list may also begin the answer without a marker."""
        if not self._skip_space():
            return self._reject_call() if ended and self._held else False
        if self._text.startswith("["):
            return self._go(self._opened)
        return self._reject_call()


class Olmo3(Pythonic):
    """Olmo 3: one call per line."""

    marks = PythonMarks(("<function_calls>",), "</function_calls>", bracketed=False)
