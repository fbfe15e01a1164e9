"""The tools of a request: how the model may call them, and the parser that finds calls in the answer."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllmlite.errors import ParameterError
from vllmlite.guided.json_keywords import LITERAL, NAMED
from vllmlite.sampling_params import StructuredOutputsParams
from vllmlite.server.config import ServerConfig
from vllmlite.server.parsers import TOOL_PARSERS
from vllmlite.server.parsers.forced import NamedCall, RequiredCalls
from vllmlite.server.parsers.mistral import call_id as mistral_call_id
from vllmlite.server.parsers.parts import CallBegin, Parser

CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, in the form of OpenAI's chat, which chat templates use."""

    tools: Sequence[dict[str, Any]] = ()
    choice: str = "none"
    """One of :data:`CHOICES`, or ``named``."""
    name: str = ""
    """The named function."""
    parallel: bool = True
    parser_name: str | None = None
    """Name in :data:`TOOL_PARSERS` of the parser for optional calls."""
    shown: bool = True
    """Whether the chat template gets the tools."""

    @classmethod
    def of(
        cls, tools: Sequence[dict[str, Any]], choice: Any, parallel: bool | None, config: ServerConfig
    ) -> ToolUse:
        """Return the use of ``tools`` by a request. ``choice`` is OpenAI's ``tool_choice``; None means ``auto`` if
        there are tools. Raises :class:`ParameterError`."""
        if choice is None:
            choice = "auto" if tools else "none"
        name = ""
        if isinstance(choice, dict):
            name = _named(choice)
            if name not in (tool["function"]["name"] for tool in tools):
                raise ParameterError("tool_choice", name, "must be one of tools")
            choice = "named"
        elif choice not in CHOICES:
            raise ParameterError("tool_choice", choice, "must be none, auto, required or a named function")
        if choice == "required" and not tools:
            raise ParameterError("tool_choice", choice, "needs tools")
        if choice == "auto" and not tools:
            choice = "none"
        if choice == "auto" and not config.enable_auto_tool_choice:
            raise ParameterError(
                "tool_choice",
                choice,
                "the server does not parse tool calls: start it with --enable-auto-tool-choice and --tool-call-parser",
            )
        shown = choice != "none" or not config.exclude_tools_when_tool_choice_none
        return cls(tools, choice, name, parallel is not False, config.tool_call_parser, shown)

    def structure(self) -> StructuredOutputsParams | None:
        """Return the structure of forced calls, a call's arguments or a list of calls; None if calls are not forced."""
        if self.choice == "named":
            (schema,) = (_schema(tool) for tool in self.tools if tool["function"]["name"] == self.name)
            return StructuredOutputsParams(json=schema)
        if self.choice != "required":
            return None
        each = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "parameters": _below(_schema(tool), f"#/items/anyOf/{index}/properties/parameters"),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for index, tool in enumerate(self.tools)
        ]
        calls: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": each}}
        if not self.parallel:
            calls["maxItems"] = 1
        return StructuredOutputsParams(json=calls)

    def changes(self, structured: bool) -> dict[str, Any]:
        """Return the sampling parameters for forced calls.

        Raises :class:`ParameterError` if the request is ``structured`` in another way."""
        structure = self.structure()
        if structure is None:
            return {}
        if structured:
            raise ParameterError(
                "tool_choice", self.choice, "forces tool calls and cannot be combined with another structure"
            )
        return {"structured_outputs": structure}

    def parser(self) -> Parser | None:
        """Return a new parser for one answer's calls, or None if calls are not parsed."""
        if self.choice == "named":
            return NamedCall(self.name)
        if self.choice == "required":
            return RequiredCalls()
        if self.choice == "none" or self.parser_name is None:
            return None
        return TOOL_PARSERS[self.parser_name](
            {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}
        )

    def call_id(self, call: CallBegin) -> str:
        """Return a call's id: the model's own, or a new one in the form that its chat template requires."""
        if call.id:
            return call.id
        if self.parser_name == "mistral":
            return mistral_call_id()
        if self.parser_name == "kimi_k2":
            return f"functions.{call.name}:{call.index}"
        return f"call_{uuid.uuid4().hex}"


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] | None = tool["function"].get("parameters")
    return parameters or {"type": "object", "properties": {}}


def _below(schema: Any, place: str) -> Any:
    """Return ``schema`` with its references, relative to itself, adjusted to its ``place`` in a larger schema."""
    if isinstance(schema, list):
        return [_below(entry, place) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str) and value[:1] == "#":
            found[keyword] = place + value[1:]
        elif keyword in NAMED and isinstance(value, dict):
            found[keyword] = {name: _below(entry, place) for name, entry in value.items()}
        else:
            found[keyword] = value if keyword in LITERAL else _below(value, place)
    return found


def _named(choice: dict[str, Any]) -> str:
    """Return the name in ``{"type": "function", "function": {"name": …}}``. Raises :class:`ParameterError`."""
    function = choice.get("function")
    if (
        choice.keys() != {"type", "function"}
        or choice["type"] != "function"
        or not isinstance(function, dict)
    ):
        raise ParameterError("tool_choice", choice, 'must be {"type": "function", "function": {"name": …}}')
    name = function.get("name")
    if not isinstance(name, str) or len(function) != 1:
        raise ParameterError("tool_choice.function", function, "must have a name and nothing else")
    return name
