"""Normalisation of chat messages: one form for every API, for ``LLM.chat`` and for the command line.

The rules for each message:

- A message is a mapping (or an object with ``model_dump``, as the openai package returns) with a ``role``. All its
  values are JSON values; numpy scalars become numbers. A field that is None counts as absent.
- ``content`` is text, None (absent), or a list of parts. A part is text, or a mapping whose ``type`` is one of
  :data:`PART_FIELDS`; it becomes ``{"type": "text", "text": ...}`` or ``{"type": "thinking", "thinking": ...}``.
  A part whose text is null is dropped. Images, audio and unknown parts are refused.
- An empty ``tool_calls`` list counts as absent. Each call has a ``function`` with a ``name``. Its ``arguments``, JSON
  text or an object, become an :class:`~vllmlite.chat.values.Arguments` object; absent or empty arguments become
  ``{}``. Text that is not a JSON object is refused.
- Reasoning is copied to each of :data:`REASONING_FIELDS`, whichever of them the message has. If it has none, its
  thinking parts are joined and used instead.
- Other fields (``name``, ``tool_call_id``, …) are kept as they are.

:mod:`vllmlite.chat.template` then adapts content and roles to the template.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from vllmlite.chat.values import Arguments
from vllmlite.errors import ParameterError

Part: TypeAlias = dict[str, str]
"""``{"type": "text", "text": ...}`` or ``{"type": "thinking", "thinking": ...}``."""
Content: TypeAlias = str | list[Part] | None

CONTENT_FORMATS = ("auto", "string", "openai")
"""How content is passed to templates: as text, as a list of parts, or (auto) in a form the template accepts."""

ARGUMENTS = frozenset(
    "messages conversation chat_template add_generation_prompt continue_final_message tools self".split()
)
"""Names that template variables cannot have, because a request sets them in fields of their own."""

PART_FIELDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    "refusal": "refusal",
    **dict.fromkeys(("reasoning_text", "summary_text"), "text"),
    "thinking": "thinking",
}
"""The accepted part types, each with the field that holds its text."""
THINKING = ("thinking", "reasoning_text", "summary_text")
"""Part types that count as reasoning."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Field names that templates and clients use for a message's reasoning, the most usual first."""
MAX_ARGUMENTS = 1 << 20
"""Maximum characters of a tool call's arguments: parsing longer JSON would block all threads of a server."""
PART_SEPARATOR = "\n"
"""Separates the parts of content that are joined into one text."""


def normalised(messages: Any, field: str = "messages") -> list[dict[str, Any]]:
    """Return the messages in the form described above. Raises :class:`ParameterError`, naming ``field``."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ParameterError(field, messages, "must be a list of messages, each with a role and content")
    if not messages:
        raise ParameterError(field, messages, "must hold at least one message")
    return [_message(given, f"{field}.{index}") for index, given in enumerate(messages)]


def plain(value: Any, field: str) -> Any:
    """Return ``value`` rebuilt from JSON types only, so that a template cannot reach methods of other objects.

    Raises :class:`ParameterError`, naming ``field``, for a value that JSON cannot represent."""
    try:
        return _plain(value, field)
    except RecursionError:
        raise ParameterError(field, type(value).__name__, "is nested too deeply") from None


def check_variables(field: str, variables: Any) -> None:
    """Raise :class:`ParameterError` unless ``variables`` is a mapping that sets none of :data:`ARGUMENTS`."""
    if not isinstance(variables, Mapping):
        raise ParameterError(field, variables, "must be a mapping from variable names to values")
    for name in sorted(ARGUMENTS & variables.keys()):
        raise ParameterError(field, name, "cannot be a template variable: it has a request field of its own")


def content_of(given: Any, field: str) -> Content:
    """Return a message's content in the form described above. Raises :class:`ParameterError`, naming ``field``."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Sequence):
        raise ParameterError(field, given, "must be text, null, or a list of parts")
    parts = (_part(part, field) for part in given)
    return [part for part in parts if part is not None]


def text_of(content: Content, kind: str = "text") -> str | None:
    """Return the parts of type ``kind`` (``text`` or ``thinking``) joined, or None if there are none.

    Content that is not a list is returned as it is."""
    if not isinstance(content, list):
        return content
    texts = [part[kind] for part in content if part["type"] == kind]
    return PART_SEPARATOR.join(texts) if texts else None


def _message(given: Any, field: str) -> dict[str, Any]:
    message = plain(given, field)
    if not isinstance(message, dict):
        raise ParameterError(field, given, "must be a mapping with a role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ParameterError(f"{field}.role", role, "must be a name, such as user or assistant")
    found = {name: value for name, value in message.items() if value is not None}
    found["content"] = content_of(message.get("content"), f"{field}.content")
    calls = _tool_calls(found.pop("tool_calls", []), f"{field}.tool_calls")
    if calls:
        found["tool_calls"] = calls
    reasoning = _reasoning(found, field)
    if reasoning is not None:
        found.update(dict.fromkeys(REASONING_FIELDS, reasoning))
    return found


def _reasoning(message: Mapping[str, Any], field: str) -> str | None:
    for name in REASONING_FIELDS:
        if name in message:
            if not isinstance(message[name], str):
                raise ParameterError(f"{field}.{name}", message[name], "must be text")
            return str(message[name])
    content: Content = message["content"]
    return text_of(content, "thinking") if isinstance(content, list) else None


def _part(part: Any, field: str) -> Part | None:
    """Return a normalised content part, or None if its text is null."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in PART_FIELDS:
        raise ParameterError(
            field,
            part,
            f"must be text, or parts of type {', '.join(PART_FIELDS)}: only text models are served",
        )
    text = part.get(PART_FIELDS[kind])
    if isinstance(text, list):  # Mistral's thinking is a list of parts itself
        text = text_of(content_of(text, field))
    if text is not None and not isinstance(text, str):
        raise ParameterError(f"{field}.{PART_FIELDS[kind]}", text, "must be text")
    name = "thinking" if kind in THINKING else "text"
    return None if text is None else {"type": name, name: text}


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ParameterError(field, calls, "must be a list of tool calls")
    return [_tool_call(call, f"{field}.{index}") for index, call in enumerate(calls)]


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ParameterError(field, call, "must hold a function with a name")
    if call.get("type") not in (None, "function"):
        raise ParameterError(f"{field}.type", call["type"], "must be function")
    known = {name: value for name, value in call.items() if value is not None}
    arguments = _arguments(function.get("arguments"), f"{field}.function.arguments")
    return {"type": "function", **known, "function": {**function, "arguments": arguments}}


def _arguments(given: Any, field: str) -> Arguments:
    text, value = None, given
    if isinstance(given, str):
        text = given
        if len(text) > MAX_ARGUMENTS:
            raise ParameterError(field, len(text), f"must be at most {MAX_ARGUMENTS} characters")
        try:
            value = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise ParameterError(field, given, f"is not JSON: {error}") from None
    if value is None:
        return Arguments({}, "{}")
    if not isinstance(value, dict):
        raise ParameterError(field, given, "must be a JSON object")
    return Arguments(value, text)


def _plain(value: Any, field: str) -> Any:
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {_key(name, field): _plain(item, field) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item, field) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, field)
    for method in ("model_dump", "item"):  # pydantic's models; numpy's scalars
        convert = getattr(value, method, None)
        if callable(convert) and not isinstance(value, type):
            try:
                return _plain(convert(), field)
            except ValueError:  # an array has more than one item
                break
    raise ParameterError(field, type(value).__name__, "must be a JSON value")


def _key(name: Any, field: str) -> str:
    if not isinstance(name, str):
        raise ParameterError(field, name, "must have text as its keys")
    return str.__str__(name)
