"""Tool calls written as JSON objects, parsed incrementally, character by character."""

from __future__ import annotations

import json

ARGUMENTS = ("arguments", "parameters")
"""Keys under which models write arguments."""
_SPACE = " \t\r\n"
_CLOSERS = {"{": "}", "[": "]"}


class Nesting:
    """Finds the end of a JSON object or list."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False
        self.broken = False
        """Whether a closing bracket did not match the open one."""

    def step(self, char: str) -> bool:
        """Add the next character; return whether it closes the first bracket."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif char in "}]":
            self.broken = self._closers.pop() != char
            return not self._closers
        return False


class ArgumentsReader:
    """Parses a JSON object of arguments."""

    def __init__(self) -> None:
        self.ended = False
        self.broken = False
        self._nesting = Nesting()
        self._new = ""

    def feed(self, text: str) -> int:
        """Add ``text`` up to the object's end; return the number of characters used. The first must be ``{``."""
        for at, char in enumerate(text):
            closed = self._nesting.step(char)
            if closed or self._nesting.broken:
                self.ended, self.broken = closed and not self._nesting.broken, self._nesting.broken
                self._new += text[: at + 1]
                return at + 1
        self._new += text
        return len(text)

    def take_arguments(self) -> str:
        """Return the arguments' text that is new since the last call."""
        new, self._new = self._new, ""
        return new


class CallReader:
    """Parses an object with ``name`` and one of :data:`ARGUMENTS`, in any order; ignores other keys.

    The name is known once its string has ended; from then on arguments that are an object are available incrementally.
    A string is taken as the JSON text it contains; null or missing arguments become ``{}``."""

    def __init__(self, names: frozenset[str] | None = None) -> None:
        """Accept calls of the functions ``names``; None accepts all."""
        self.name: str | None = None
        self.ended = False
        self.broken = False
        """Whether the text is not such an object; nothing more of it is used then."""
        self._names = names
        self._step = self._open
        self._key = ""
        self._value = ""
        self._nesting: Nesting | None = None
        self._escaped = False
        self._has_arguments = False
        self._new = ""

    def feed(self, text: str) -> int:
        """Add ``text`` up to the object's end or the first invalid character; return the number of characters used."""
        for at, char in enumerate(text):
            self._step(char)
            if self.ended or self.broken:
                return at + (not self.broken)
        return len(text)

    @property
    def begins_name(self) -> bool:
        """Whether the name is known to be accepted, or the part that has arrived can still become an accepted name."""
        if self.name is not None:
            return True
        prefix = self._value[1:] if self._step == self._in_string and self._key == "name" else None
        return prefix is not None and (
            self._names is None or any(name.startswith(prefix) for name in self._names)
        )

    def take_arguments(self) -> str:
        """Return the arguments' text that is new since the last call."""
        new, self._new = self._new, ""
        return new

    def _open(self, char: str) -> None:
        if char == "{":
            self._step = self._before_key
        else:
            self.broken = True

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._value = char
            self._step = self._in_key
        elif char == "}":
            self._end()
        elif char not in _SPACE:
            self.broken = True

    def _in_key(self, char: str) -> None:
        if self._string_ends(char):
            self._key = str(self._loaded())
            self._step = self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._step = self._before_value
        elif char not in _SPACE:
            self.broken = True

    def _before_value(self, char: str) -> None:
        if char in _SPACE:
            return
        self._value = char
        if char == '"':
            self._step = self._in_string
        elif char in _CLOSERS:
            self._nesting = Nesting()
            self._nesting.step(char)
            self._step = self._in_container
            if self._gives_arguments():
                self._new += char
        elif char in ",:}]":
            self.broken = True
        else:
            self._step = self._in_scalar

    def _in_string(self, char: str) -> None:
        if self._string_ends(char):
            self._set_value(self._loaded())

    def _in_container(self, char: str) -> None:
        assert self._nesting is not None
        closed = self._nesting.step(char)
        if self._nesting.broken:
            self.broken = True
            return
        if self._gives_arguments():
            self._new += char
        if closed:
            self._has_arguments |= self._key in ARGUMENTS
            self._step = self._after_value

    def _in_scalar(self, char: str) -> None:
        if char in _SPACE or char in ",}":
            self._set_value(None if self._value == "null" else self._loaded())
            if not self.broken:
                self._after_value(char)
        else:
            self._value += char

    def _after_value(self, char: str) -> None:
        if char == ",":
            self._step = self._before_key
        elif char == "}":
            self._end()
        elif char not in _SPACE:
            self.broken = True

    def _string_ends(self, char: str) -> bool:
        self._value += char
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        else:
            return char == '"'
        return False

    def _gives_arguments(self) -> bool:
        return self._key in ARGUMENTS and not self._has_arguments

    def _set_value(self, value: object) -> None:
        self._step = self._after_value
        if self._key == "name" and self.name is None:
            if isinstance(value, str) and value and (self._names is None or value in self._names):
                self.name = value
            else:
                self.broken = True
        elif self._gives_arguments() and value is not None:
            self._new += value if isinstance(value, str) else json.dumps(value)
            self._has_arguments = True

    def _loaded(self) -> object:
        try:
            return json.loads(self._value, strict=False)
        except ValueError:
            self.broken = True
            return ""

    def _end(self) -> None:
        self.ended = self.name is not None
        self.broken = not self.ended
        if not self._has_arguments:
            self._new += "{}"
