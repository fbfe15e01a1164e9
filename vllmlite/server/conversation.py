"""Messages of requests as plain data, and conversations of other APIs in the form of OpenAI's chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from vllmlite.errors import ParameterError
from vllmlite.server.openai.chat_protocol import ChatPrompt, Message, Tool


def as_mapping(message: Message) -> dict[str, Any]:
    """A message as plain data."""
    return {"role": message.role, "content": message.content, **(message.model_extra or {})}


def conversation(
    messages: list[dict[str, Any]], field: str, tools: Sequence[dict[str, Any]] = ()
) -> ChatPrompt:
    """A conversation of another API, already in the form of OpenAI's chat, for that API's ``field``."""
    try:
        return ChatPrompt(
            messages=[Message(**message) for message in messages],
            tools=[Tool(**tool) for tool in tools] or None,
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ParameterError(f"{field}.{place}", first.get("input"), first["msg"]) from None
