"""llama.cpp's line-based limits of a completion, used by editors while someone types."""

from __future__ import annotations

import time


class LineLimits:
    """Reads a text incrementally and decides where it ends."""

    def __init__(self, n_indent: int, seconds: float) -> None:
        """The text ends before a line, other than the first, that is indented by fewer than ``n_indent`` spaces or
        tabs; and at ``seconds`` after its beginning, once it has a second line. 0 disables a limit."""
        self._n_indent = n_indent
        self._seconds = seconds
        self._begun: float | None = None
        self._blanks: int | None = None
        """Indentation of the current line so far; None once the line has other characters, and on the first line."""
        self.has_line = False
        """Whether the text has a second line."""

    def add(self, text: str) -> tuple[str, bool]:
        """Add ``text``; return the part of it to keep, and whether the completion ends there."""
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if self._n_indent:
            for at, character in enumerate(text):
                if self._blanks is not None:
                    if character in " \t":
                        self._blanks += 1
                    elif self._blanks < self._n_indent:
                        self.has_line = True
                        return text[:at], True
                    else:
                        self._blanks = None
                if character == "\n":
                    self._blanks = 0
        self.has_line = self.has_line or "\n" in text
        return text, bool(self._seconds) and self.has_line and now - self._begun > self._seconds
