"""Messages as requests have them to messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vllmlite.errors import ParameterError
from vllmlite.server.protocol.chat import ChatPrompt, ContentPart, Message, Tool


def content_text(message: Message) -> str | None:
    """A message's content as text. Raises :class:`ParameterError` if a part of it is something else."""
    if not isinstance(message.content, list):
        return message.content
    return "\n".join(_part_text(part) for part in message.content)


def _part_text(part: ContentPart) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if text is None or part.type not in ("text", "input_text", "output_text", "refusal"):
        raise ParameterError(
            "messages", part.model_dump(), "content must be text: only text models are served"
        )
    return text


def as_mapping(message: Message) -> dict[str, Any]:
    """A message for a chat template: content as text, arguments of tool calls as mappings, the rest as it came."""
    found = {"role": message.role, "content": content_text(message), **(message.model_extra or {})}
    reasoning = found.get("reasoning") or found.get("reasoning_content")
    if reasoning is not None:  # templates know the one name or the other
        found["reasoning"] = found["reasoning_content"] = reasoning
    if found.get("tool_calls"):
        found["tool_calls"] = _parsed(found["tool_calls"])
    if message.role == "assistant":  # one that called tools, or only thought
        found["content"] = found["content"] or ""
    return found


def _parsed(calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as mappings."""
    if not isinstance(calls, list):
        raise ParameterError("messages.tool_calls", calls, "must be a list")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ParameterError("messages.tool_calls", call, "must hold a function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise ParameterError(
                    "messages.tool_calls.function.arguments", arguments, f"is not JSON: {error}"
                ) from None
        if not isinstance(arguments, Mapping | None):
            raise ParameterError("messages.tool_calls.function.arguments", arguments, "must be a JSON object")
        found.append({**call, "function": {**function, "arguments": arguments or {}}})
    return found


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
