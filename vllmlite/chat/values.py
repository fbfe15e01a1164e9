"""Message values that behave as a template expects, whichever of two conventions it follows.

Some templates test absent content with ``is none``, others concatenate it. Some iterate over a tool call's arguments
as a mapping, others concatenate them as JSON text. Each value here works both ways, so that no prompt contains
``None`` or a Python literal.
"""

from __future__ import annotations

import json
from typing import Any


class NoContent(str):
    """Absent content: an empty string for which the Jinja tests ``is none`` and ``is undefined`` hold."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        """Compare equal to None and to the empty string."""
        return other is None or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        """Return the negation of ``==``."""
        return not self == other

    __hash__ = str.__hash__


NO_CONTENT = NoContent()


class Arguments(dict[str, Any]):
    """Arguments of a tool call: a mapping that turns into JSON where a template uses it as text."""

    def __init__(self, value: dict[str, Any], text: str | None) -> None:
        """Wrap the mapping ``value``. ``text`` is its JSON as the client wrote it; None: ``value`` is serialised when
        needed."""
        super().__init__(value)
        self._text = json.dumps(value, ensure_ascii=False) if text is None else text

    def __str__(self) -> str:
        """Return the JSON text."""
        return self._text

    def __add__(self, other: str) -> str:
        """Return the JSON text followed by ``other``."""
        return self._text + other

    def __radd__(self, other: str) -> str:
        """Return ``other`` followed by the JSON text."""
        return other + self._text
