"""What a model writes, as a terminal may see it."""

from __future__ import annotations

import os
import sys

from vllmlite.server.parsers.parts import Part, Reasoning
from vllmlite.terminal import is_terminal

CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
CONTROLS |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
"""Pictures of the characters with which text could move the cursor, or set the window's title or the clipboard."""


def visible(text: str) -> str:
    """``text`` from elsewhere, with pictures of its control characters."""
    return text.translate(CONTROLS)


def for_output(text: str) -> str:
    """``text`` as standard output gets it: :func:`visible` on a terminal, elsewhere as it is."""
    return visible(text) if is_terminal(sys.stdout) else text


class Screen:
    """An answer on standard output. On a terminal what the model thinks is dim, and control characters are pictures;
    elsewhere the answer stands alone, as it was written."""

    def __init__(self) -> None:
        """Nothing is written."""
        self._is_terminal = is_terminal(sys.stdout)
        self._colours = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._thinks = False
        self._text = ""

    def write(self, part: Part) -> None:
        """The next part of the answer; tool calls are none."""
        text = getattr(part, "text", "")
        thinks = isinstance(part, Reasoning)
        if not text or (thinks and not self._is_terminal):
            return
        if self._thinks and not thinks:
            text = text.lstrip("\n")
            if not text:
                return
            self._put("\n" * (2 - self._text.endswith("\n")))
        self._thinks = thinks
        shown = for_output(text)
        self._put(f"\x1b[2m{shown}\x1b[22m" if thinks and self._colours else shown)
        self._text = text

    @property
    def has_text(self) -> bool:
        """Whether anything is written."""
        return bool(self._text)

    def end(self) -> None:
        """The answer has ended."""
        self._put("\n")

    @staticmethod
    def _put(text: str) -> None:
        print(text, end="", flush=True)
