"""From the text of an answer to its content, reasoning and tool calls: a format a file."""

from __future__ import annotations

from vllmlite.server.parsers.hermes import Hermes
from vllmlite.server.parsers.llama3_json import Llama3Json
from vllmlite.server.parsers.mistral import Mistral
from vllmlite.server.parsers.parts import ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
}
"""vLLM's names of formats."""
