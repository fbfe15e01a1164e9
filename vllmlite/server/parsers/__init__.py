"""Parsing an answer's text into content, reasoning and tool calls; one file per family of formats."""

from __future__ import annotations

from collections.abc import Callable

from vllmlite.server.parsers.harmony import Harmony
from vllmlite.server.parsers.llama3_json import Llama3Json
from vllmlite.server.parsers.marked_json import Granite, Hermes, Jamba
from vllmlite.server.parsers.mistral import Mistral
from vllmlite.server.parsers.named_json import DeepSeekV3, DeepSeekV31, KimiK2
from vllmlite.server.parsers.parts import Parser, Tools
from vllmlite.server.parsers.pythonic import Llama4Pythonic, Olmo3, Pythonic
from vllmlite.server.parsers.tagged import Glm45, Qwen3Coder

TOOL_PARSERS: dict[str, Callable[[Tools], Parser]] = {
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "glm45": Glm45,
    "glm47": Glm45,
    "granite": Granite,
    "granite4": Hermes,
    "hermes": Hermes,
    "jamba": Jamba,
    "kimi_k2": KimiK2,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "llama4_pythonic": Llama4Pythonic,
    "mistral": Mistral,
    "olmo3": Olmo3,
    "openai": lambda tools: Harmony(),
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
    "qwen3_xml": Qwen3Coder,
}
"""Tool-call parsers by vLLM's names."""
