"""Print a model's text safely on a terminal."""

from __future__ import annotations

import os
import sys

from vllmlite.server.parsers.parts import Part, Reasoning
from vllmlite.terminal import is_terminal

CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
CONTROLS |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
"""Visible symbols for control characters, which could move the cursor or set the window title or clipboard."""


def visible(text: str) -> str:
    """Return ``text`` with its control characters replaced by visible symbols."""
    return text.translate(CONTROLS)


def for_output(text: str) -> str:
    """Return :func:`visible` text if standard output is a terminal, else ``text`` unchanged."""
    return visible(text) if is_terminal(sys.stdout) else text


class Screen:
    """An answer on standard output.

    On a terminal, reasoning is dim and control characters are visible symbols; elsewhere only the answer is written,
    unchanged."""

    def __init__(self) -> None:
        """Begin an empty answer."""
        self._is_terminal = is_terminal(sys.stdout)
        self._colours = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._thinks = False
        self._text = ""

    def write(self, part: Part) -> None:
        """Print the next part of the answer; tool calls are ignored."""
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
        """Whether anything was printed."""
        return bool(self._text)

    def end(self) -> None:
        """End the answer with a newline."""
        self._put("\n")

    @staticmethod
    def _put(text: str) -> None:
        print(text, end="", flush=True)
