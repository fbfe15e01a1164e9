"""llama.cpp's two ways to end a text by its lines, which editors ask for as someone types."""

from __future__ import annotations

import time


class LineLimits:
    """Reads a text as it comes, and says where it ends."""

    def __init__(self, n_indent: int, seconds: float) -> None:
        """A text ends before a line, but its first, that begins with fewer than ``n_indent`` blanks or tabs; and once
        it has gone on for ``seconds`` and has a second line. 0: no such limit."""
        self._n_indent = n_indent
        self._seconds = seconds
        self._begun: float | None = None
        self._blanks: int | None = None
        """At the beginning of the line that is being read, where that has nothing else yet; None on the first line."""
        self.has_line = False
        """Whether the text has a second line."""

    def take(self, text: str) -> tuple[str, bool]:
        """What is kept of the next ``text``, and whether that is the end."""
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
