"""Assistant prefill: a prompt that ends with the text of the last message, for the model to continue it.

The end is found by rendering the conversation a second time with a random marker after the last message's text, so
that neither the text nor its other occurrences matter. Whitespace that the template trims from the end of the text is
removed first; the marker would otherwise preserve it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from vllmlite.errors import ParameterError

_FIELD = "continue_final_message"


def mark() -> str:
    """Return sixteen random characters of Unicode's private use area.

    No message contains them, and template filters for case, whitespace and JSON leave them unchanged."""
    return "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(16))


def open_ended(render: Callable[[str], str], text: str) -> str:
    """Return ``render(text)``, the prompt whose last message is ``text``, cut right after that text.

    Raises :class:`ParameterError` if the template omits, repeats or changes the text."""
    whole = render(text)
    text = _shown(render, text, whole)
    behind = mark()
    before, *after = render(text + behind).split(behind)
    if len(after) != 1:
        times = "does not show" if not after else "repeats"
        raise ParameterError(
            _FIELD, True, f"the chat template {times} the last message, so it cannot be continued"
        )
    # A template may omit an empty message; its prompt is still cut at the marker.
    if text and not whole.startswith(before):
        raise ParameterError(_FIELD, True, "the chat template changes the end of the last message")
    return before


def _shown(render: Callable[[str], str], text: str, whole: str) -> str:
    """Return the shortest prefix of ``text`` that renders the same, without whitespace that the template trims."""

    def renders_the_same(length: int) -> bool:
        try:
            return render(text[:length]) == whole
        except ParameterError:
            return False

    low, high = len(text.rstrip()), len(text)
    while low < high:
        middle = (low + high) // 2
        if renders_the_same(middle):
            high = middle
        else:
            low = middle + 1
    return text[:high]
