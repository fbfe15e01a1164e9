"""Conversations, and ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, WithJsonSchema
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config.refused import Absent
from vllmlite.errors import ParameterError
from vllmlite.server.openai.logprobs_protocol import ChatLogprobs, PromptLogprobs
from vllmlite.server.protocol.base import (
    FUNCTION_TAG,
    MAX_MESSAGES,
    MAX_TOOLS,
    OTHER_TAG,
    OtherTool,
    Request,
    Strings,
    Usage,
    tool_tag,
)
from vllmlite.server.protocol.fields import PROMPT_CHANGING, TEXT_CHANGING
from vllmlite.server.protocol.sampling import SamplingRequest

Parts = TypeAliasType("Parts", Annotated[list[str | dict[str, Any]], FailFast()])
"""Parts of a message's content: text, or objects whose type says which field has it."""


class Message(BaseModel):
    """A message of a conversation, with any more fields; :mod:`vllmlite.chat.messages` says what becomes of them."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Parts | None = None


class FunctionDefinition(Request):
    """A function that the model may have called. Chat templates are shown all its fields, such as ``return``."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema of an object.")
    strict: bool | None = None


class Tool(Request):
    """A tool that is a function."""

    type: Literal["function"]
    function: FunctionDefinition


Tools = TypeAliasType(
    "Tools",
    Annotated[
        list[
            Annotated[
                Annotated[Tool, Tag(FUNCTION_TAG)] | Annotated[OtherTool, Tag(OTHER_TAG)],
                Discriminator(tool_tag("function")),
            ]
        ],
        FailFast(),
        Field(max_length=MAX_TOOLS),
    ],
)

_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}

ToolChoice = Annotated[Any, WithJsonSchema(_CHOICE_SCHEMA)]
"""``none``, ``auto``, ``required`` or a named function. Checked where it meets the tools."""


class ThinkingOptions(Request):
    """Whether the model is to think first, as DeepSeek and Anthropic say it."""

    type: Literal["enabled", "adaptive", "auto", "disabled"]
    budget_tokens: int | None = Field(None, description="Most tokens of reasoning, as thinking_token_budget.")


class ReasoningOptions(Request):
    """How the model is to think first, as OpenRouter says it."""

    enabled: bool | None = None
    effort: str | None = None
    max_tokens: int | None = Field(None, description="Most tokens of reasoning, as thinking_token_budget.")
    exclude: bool = Field(False, description="Leave what it thought out of the answer.")


def thinking_variables(enabled: bool) -> dict[str, Any]:
    """The variables by which chat templates have a model think first or not; each template knows one of them."""
    return {"enable_thinking": enabled, "thinking": enabled}


Conversation = TypeAliasType(
    "Conversation", Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
)


class ChatPrompt(Request):
    """The fields that make a conversation a prompt."""

    text_changing: ClassVar[Mapping[str, Absent]] = PROMPT_CHANGING

    model: str | None = None
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="For chat templates that show them."
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="For chat templates that ask for it; none: those that can have the model not think.",
    )
    enable_thinking: bool | None = Field(
        default=None, description="For chat templates that leave the choice."
    )
    thinking: bool | str | ThinkingOptions | None = Field(
        default=None,
        description="The same as DeepSeek and Anthropic say it, or Ollama: true, false or an effort.",
    )
    reasoning: ReasoningOptions | None = Field(default=None, description="The same as OpenRouter says it.")
    tools: Tools | None = None

    def functions(self) -> list[dict[str, Any]]:
        """The tools that are functions, as chat templates are shown them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or () if isinstance(tool, Tool)]

    def template_variables(self) -> dict[str, Any]:
        """What the chat template is told besides messages and tools: vLLM's names; the request's own win."""
        found: dict[str, Any] = {}
        if self.documents is not None:
            found["documents"] = self.documents
        return found | self.thinking_wishes() | (self.chat_template_kwargs or {})

    def thinking_wishes(self) -> dict[str, Any]:
        """What the chat template is told of reasoning. Raises :class:`ParameterError` where wishes differ."""
        efforts = {"reasoning_effort": self.reasoning_effort}
        choices = {"enable_thinking": self.enable_thinking}
        if isinstance(self.thinking, ThinkingOptions):
            choices["thinking"] = self.thinking.type != "disabled"
        elif isinstance(self.thinking, str):
            efforts["thinking"] = self.thinking
        else:
            choices["thinking"] = self.thinking
        if self.reasoning is not None:
            efforts["reasoning.effort"] = self.reasoning.effort
            choices["reasoning.enabled"] = self.reasoning.enabled
        effort, enabled = _agreed(efforts), _agreed(choices)
        found: dict[str, Any] = {}
        if effort is not None:
            found["reasoning_effort"] = effort
        if effort is not None or enabled is not None:
            found |= thinking_variables(effort != "none" if enabled is None else enabled)
        return found


def _agreed(wishes: Mapping[str, Any]) -> Any:
    """The value that one field or several ask for; None if none does."""
    given = {name: value for name, value in wishes.items() if value is not None}
    found = next(iter(given.values()), None)
    for name, value in given.items():
        if value != found:
            raise ParameterError(name, value, f"contradicts {next(iter(given))}={found!r}")
    return found


class ChatCompletionRequest(ChatPrompt, SamplingRequest):
    """``POST /v1/chat/completions``; llama.cpp's parameters are known, for its clients come here too."""

    text_changing: ClassVar[Mapping[str, Absent]] = TEXT_CHANGING

    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(None, description="Default: the model's, or up to its context.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    include_reasoning: bool = Field(True, description="Answer with what the model thought before.")
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "parsed", "none", "raw", "hidden"] = (
        Field(
            "auto",
            description="llama.cpp's and Groq's: none, raw: reasoning stays in content, with its marks; hidden: "
            "it is left out; others: as --reasoning-parser says.",
        )
    )
    samplers: Strings | None = Field(None, description="llama.cpp's list of those to use; default: all.")
    echo: bool = Field(False, description="Begin with the last message, where the answer continues it.")

    def reasoning_budget(self) -> int | None:
        """The most tokens of reasoning, however it was said. Raises :class:`ParameterError` where wishes differ."""
        budgets = {"thinking_token_budget": self.thinking_token_budget}
        if isinstance(self.thinking, ThinkingOptions):
            budgets["thinking.budget_tokens"] = self.thinking.budget_tokens
        if self.reasoning is not None:
            budgets["reasoning.max_tokens"] = self.reasoning.max_tokens
        found: int | None = _agreed(budgets)
        return found

    def shows_reasoning(self) -> bool:
        """Whether answers have a field with what the model thought."""
        excluded = self.reasoning is not None and self.reasoning.exclude
        return self.include_reasoning and not excluded and self.reasoning_format != "hidden"


class BatchChatRequest(ChatCompletionRequest):
    """``POST /v1/chat/completions/batch``: conversations with the same parameters, each answered once."""

    messages: Annotated[list[Conversation], FailFast(), Field(min_length=1)]  # type: ignore[assignment]

    def each(self) -> list[ChatCompletionRequest]:
        """Return a request for each conversation."""
        fields = dict(self)
        return [ChatCompletionRequest.model_construct(**{**fields, "messages": one}) for one in self.messages]


class Counted(TypedDict):
    """Answer of ``/v1/chat/completions/input_tokens`` and ``/v1/messages/count_tokens``."""

    input_tokens: int


class FunctionCall(TypedDict):
    """What is called, with a JSON text; in a delta, the name at first and then the text in pieces."""

    name: NotRequired[str]
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(TypedDict):
    """What is new of the ``index``-th call; its first piece has the other fields."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCall


class ChatMessage(TypedDict):
    """An answer. Its reasoning stands under vLLM's name, and under the older one, which is llama.cpp's too."""

    role: str
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatDelta(TypedDict):
    """What is new of an answer."""

    role: NotRequired[str]
    content: NotRequired[str | None]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChoice(TypedDict):
    """One of the ``n`` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None


class ChatCompletion(TypedDict):
    """Answer of ``/v1/chat/completions``. What is null is there for clients that read vLLM's answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: None
    system_fingerprint: None
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None
    kv_transfer_params: None


class ChatChunkChoice(TypedDict):
    """What is new of one of the ``n`` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """A chunk of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]
