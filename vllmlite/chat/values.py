"""Values of messages that read in a template as whatever the template expects them to be.

Templates disagree about two things. Content that is absent is tested with ``is none`` by some and concatenated by
others; arguments of a tool call are walked as a mapping by some and concatenated as JSON text by others. One value
serves both kinds, so that neither sees ``None`` or a Python literal where text belongs.
"""

from __future__ import annotations

import json
from typing import Any


class NoContent(str):
    """Content that is absent: an empty text for which the tests ``is none`` and ``is not defined`` hold."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        """Equal to None as well as to the empty text."""
        return other is None or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        """The opposite."""
        return not self == other

    __hash__ = str.__hash__


NO_CONTENT = NoContent()


class Arguments(dict[str, Any]):
    """Arguments of a tool call: a mapping that is its JSON where a template uses it as text."""

    def __init__(self, value: dict[str, Any], text: str | None) -> None:
        """``text`` is the JSON as the client wrote it; None: as it is usually written."""
        super().__init__(value)
        self._text = json.dumps(value, ensure_ascii=False) if text is None else text

    def __str__(self) -> str:
        """The JSON."""
        return self._text

    def __add__(self, other: str) -> str:
        """The JSON before another text."""
        return self._text + other

    def __radd__(self, other: str) -> str:
        """The JSON after another text."""
        return other + self._text
