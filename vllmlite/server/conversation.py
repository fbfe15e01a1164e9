"""Messages of requests as plain data, and conversations of other APIs in the form of OpenAI's chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from vllmlite.errors import ParameterError
from vllmlite.server.openai.chat_protocol import ChatPrompt, Message, Tool

VALUE_CHARACTERS = 16
"""Cost of rendering one value in a chat template, as a number of characters of text."""


def as_mapping(message: Message) -> dict[str, Any]:
    """Return a message as plain data."""
    return {"role": message.role, "content": message.content, **(message.model_extra or {})}


def is_small(data: Any, most: int) -> bool:
    """Return whether JSON data has at most ``most`` characters of text, where each value in an object or array counts
    as :data:`VALUE_CHARACTERS`. Counting stops as soon as there are more."""
    waiting, count = [data], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, (dict, list)):
            count += VALUE_CHARACTERS * len(value)
        if count > most:
            return False
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return True


def conversation(
    messages: list[dict[str, Any]], field: str, tools: Sequence[dict[str, Any]] = ()
) -> ChatPrompt:
    """Return a conversation of another API, already in the form of OpenAI's chat, for that API's ``field``."""
    try:
        return ChatPrompt(
            messages=[Message(**message) for message in messages],
            tools=[Tool(**tool) for tool in tools] or None,
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ParameterError(f"{field}.{place}", first.get("input"), first["msg"]) from None
