"""Conversion of Anthropic's blocks: requests to chat messages, and answers to blocks and stream events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pydantic_core

from vllmlite.chat.messages import content_of
from vllmlite.errors import ParameterError
from vllmlite.server.anthropic.protocol import AnthropicMessage, Block
from vllmlite.server.parsers.parts import CallArguments, CallBegin, Content, Part, Reasoning


def as_messages(
    turns: Sequence[AnthropicMessage], system: str | list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return the conversation in the form of OpenAI's chat. Raises :class:`ParameterError`."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": content_of(system, "system")})
    for turn in turns:
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages += _of_blocks(turn.role, turn.content)
    return messages


def _of_blocks(role: str, blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a turn's messages: each tool result as its own message, then the rest as one message."""
    parts: list[Any] = []
    message: dict[str, Any] = {"role": role, "content": None}
    results = 0
    for block in blocks:
        match block.get("type"):
            case "text" | "thinking":
                parts.append(block)
            case "redacted_thinking":
                pass  # encrypted by its author
            case "tool_use":
                function = {"name": _string(block, "name"), "arguments": json.dumps(block.get("input", {}))}
                call = {"id": _string(block, "id"), "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case "tool_result":
                results += 1
                content = content_of(block.get("content"), "messages.content")
                yield {"role": "tool", "tool_call_id": _string(block, "tool_use_id"), "content": content}
            case kind:
                raise ParameterError(
                    "messages.content", kind, "must be blocks of type text, thinking, tool_use or tool_result"
                )
    message["content"] = content_of(parts, "messages.content")
    if parts or not results or len(message) > 2:
        yield message


def _string(block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ParameterError(f"messages.content.{name}", value, "must be text")
    return value


class Blocks:
    """Builds the content blocks of one answer from its parts, and the stream events of each part."""

    def __init__(self, call_id: Callable[[CallBegin], str]) -> None:
        self.blocks: list[Block] = []
        self._call_id = call_id
        self._arguments: list[str] = []
        """Pieces of the open tool use's arguments."""
        self._open = False

    def add(self, part: Part) -> Iterator[dict[str, Any]]:
        """Add a part; yield its stream events."""
        match part:
            case Content(text):
                if not self._is_open("text"):
                    yield from self._begin({"type": "text", "text": ""})
                self.blocks[-1]["text"] += text
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                if not self._is_open("thinking"):
                    yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                self.blocks[-1]["thinking"] += text
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegin(_, name) as begin:
                yield from self._begin(
                    {"type": "tool_use", "id": self._call_id(begin), "name": name, "input": {}}
                )
            case CallArguments(_, text):
                self._arguments.append(text)
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self) -> Iterator[dict[str, Any]]:
        """Close the open block; yield the events for it."""
        if not self._open:
            return
        if self._is_open("tool_use"):
            self.blocks[-1]["input"] = _loaded("".join(self._arguments))
            self._arguments = []
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}
        self._open = False

    def _is_open(self, kind: str) -> bool:
        return self._open and self.blocks[-1]["type"] == kind

    def _begin(self, block: Block) -> Iterator[dict[str, Any]]:
        yield from self.end()
        self._open = True
        self.blocks.append(block)
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def _loaded(arguments: str) -> Any:
    """Return a tool's input from its JSON arguments.

    Of truncated arguments the complete part is used, as Anthropic's own clients do with a stream. Arguments that are
    not JSON are passed on as text in the object that Anthropic's documentation defines for them."""
    try:
        return pydantic_core.from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {"INVALID_JSON": arguments}
