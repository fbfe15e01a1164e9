"""Conversion of OpenAI's response items: input to chat messages, and answers to items and stream events."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllmlite.chat.messages import content_of, text_of
from vllmlite.errors import ParameterError
from vllmlite.server.parsers.parts import CallArguments, CallBegin, Content, Part, Reasoning
from vllmlite.server.protocol.base import MAX_MESSAGES
from vllmlite.server.responses.protocol import OutputItem


def as_messages(given: str | list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """Return a request's input as a conversation in the form of OpenAI's chat. Raises :class:`ParameterError`."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if len(given) > MAX_MESSAGES:
        raise ParameterError(
            "input", len(given), f"must be at most {MAX_MESSAGES} items, including stored ones"
        )
    for item in given:
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(
                {"role": _string(item, "role"), "content": content_of(item.get("content"), "input.content")}
            )
        elif kind == "function_call":
            call = {"name": _string(item, "name"), "arguments": _string(item, "arguments")}
            entry = {"id": _string(item, "call_id"), "type": "function", "function": call}
            _assistant(messages).setdefault("tool_calls", []).append(entry)
        elif kind == "function_call_output":
            output = content_of(item.get("output"), "input.output")
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id"), "content": output})
        elif kind == "reasoning":
            thought = content_of(item.get("content") or item.get("summary") or "", "input.content")
            text = text_of(thought, "thinking") or text_of(thought) or ""
            messages.append({"role": "assistant", "content": None, "reasoning_content": text})
        else:
            raise ParameterError(
                "input",
                kind,
                "must be items of type message, function_call, function_call_output or reasoning",
            )
        _join_reasoning(messages)
    if not given:
        raise ParameterError("input", given, "must not be empty")
    return messages


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant message to which a call belongs: the last message, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _join_reasoning(messages: list[dict[str, Any]]) -> None:
    """Merge an assistant message with the reasoning item before it."""
    if len(messages) < 2:
        return
    before, last = messages[-2:]
    is_reasoning = before.keys() == {"role", "content", "reasoning_content"} and not before["content"]
    if is_reasoning and last["role"] == "assistant" and "reasoning_content" not in last:
        messages[-2:] = [{**last, "reasoning_content": before["reasoning_content"]}]


def _string(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ParameterError(f"input.{name}", value, "must be text")
    return value


class Items:
    """Builds the output items of one answer from its parts, and the stream events of each part."""

    def __init__(self, call_id: Callable[[CallBegin], str], role: str) -> None:
        """Build the items of an answer whose messages have ``role``; ``call_id`` returns the id of a call."""
        self.items: list[OutputItem] = []
        self._call_id = call_id
        self._role = role
        self._open: OutputItem | None = None

    def add(self, part: Part, logprobs: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
        """Add a part, with the log-probabilities of its tokens; yield its stream events."""
        match part:
            case Content(text):
                if self._open is None or self._open["type"] != "message":
                    yield from self._begin({"type": "message", "role": self._role, "content": []}, "msg")
                    yield from self._begin_part(
                        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                    )
                content = self._content()
                content["text"] += text
                content["logprobs"] += logprobs
                yield self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)
            case Reasoning(text):
                if self._open is None or self._open["type"] != "reasoning":
                    yield from self._begin({"type": "reasoning", "summary": [], "content": []}, "rs")
                    yield from self._begin_part({"type": "reasoning_text", "text": ""})
                self._content()["text"] += text
                yield self._part_event("response.reasoning_text.delta", delta=text)
            case CallBegin(_, name) as begin:
                call = {
                    "type": "function_call",
                    "call_id": self._call_id(begin),
                    "name": name,
                    "arguments": "",
                }
                yield from self._begin(call, "fc")
            case CallArguments(_, text):
                assert self._open is not None
                self._open["arguments"] += text
                yield self._event("response.function_call_arguments.delta", delta=text)

    def end(self, status: str = "completed", logprobs: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
        """Close the open item; yield the events for it. ``logprobs`` are those of last tokens without text."""
        item = self._open
        if item is None:
            return
        item["status"] = status  # type: ignore[typeddict-item]
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        else:
            content = self._content()
            done = {"text": content["text"]}
            if item["type"] == "message":
                content["logprobs"] += logprobs
                done["logprobs"] = content["logprobs"]
            yield self._part_event(f"response.{content['type']}.done", **done)
            yield self._part_event("response.content_part.done", part=content)
        yield self._item_event("response.output_item.done")
        self._open = None

    def _begin(self, item: dict[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
        yield from self.end()
        opened: OutputItem = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item}  # type: ignore[typeddict-item]
        self._open = opened
        self.items.append(opened)
        yield self._item_event("response.output_item.added")

    def _begin_part(self, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert self._open is not None
        yield self._part_event("response.content_part.added", part=dict(content))
        self._open["content"].append(content)

    def _content(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open["content"][-1]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.items) - 1, **fields}

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, content_index=0, **fields)

    def _item_event(self, kind: str) -> dict[str, Any]:
        assert self._open is not None
        item = (
            {**self._open, "content": list(self._open["content"])}
            if "content" in self._open
            else {**self._open}
        )
        return {"type": kind, "output_index": len(self.items) - 1, "item": item}
