"""Assistant prefill: the prompt that ends where the text of the last message ends, for the model to continue it.

The end is found by rendering the conversation again with a mark behind the last message's text, so that it does not
matter what that text is or where else it occurs. Where the template trims the text, what it trims is taken away
first; otherwise the mark would keep it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from vllmlite.errors import ParameterError

_FIELD = "continue_final_message"


def mark() -> str:
    """A text that no message holds and that filters for case, whitespace and JSON leave as it is: sixteen random
    characters of Unicode's private use area."""
    return "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(16))


def open_ended(render: Callable[[str], str], text: str) -> str:
    """``render(text)``, the conversation whose last message is ``text``, cut right behind that text.

    Raises :class:`ParameterError` if the template does not show the text, shows it more than once, or changes it."""
    whole = render(text)
    text = _shown(render, text, whole)
    behind = mark()
    before, *after = render(text + behind).split(behind)
    if len(after) != 1:
        times = "does not show" if not after else "repeats"
        raise ParameterError(_FIELD, True, f"the chat template {times} the last message: it has no one end")
    # An empty message may be left out by the template; it is begun all the same.
    if text and not whole.startswith(before):
        raise ParameterError(_FIELD, True, "the chat template changes the last message by what it ends with")
    return before


def _shown(render: Callable[[str], str], text: str, whole: str) -> str:
    """``text`` without the whitespace at its end that the template trims: the shortest that renders the same."""

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
