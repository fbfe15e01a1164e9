"""Request and response types of conversations and ``/v1/chat/completions``."""

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
"""Parts of a message's content: text, or objects whose ``type`` says which field has the text."""


class Message(BaseModel):
    """A message of a conversation; it may have further fields, see :mod:`vllmlite.chat.messages`."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Parts | None = None


class FunctionDefinition(Request):
    """A function that the model may call. Chat templates get all its fields, including ones such as ``return``."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema for an object.")
    strict: bool | None = None


class Tool(Request):
    """A function tool."""

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
"""``none``, ``auto``, ``required`` or a named function; checked together with the tools."""


class ThinkingOptions(Request):
    """Whether the model should think first, in DeepSeek's and Anthropic's form."""

    type: Literal["enabled", "adaptive", "auto", "disabled"]
    budget_tokens: int | None = Field(None, description="Same as thinking_token_budget.")


class ReasoningOptions(Request):
    """How the model should think first, in OpenRouter's form."""

    enabled: bool | None = None
    effort: str | None = None
    max_tokens: int | None = Field(None, description="Same as thinking_token_budget.")
    exclude: bool = Field(False, description="Omit the reasoning from the answer.")


def thinking_variables(enabled: bool) -> dict[str, Any]:
    """Return the template variables that enable or disable thinking; a template knows one or the other."""
    return {"enable_thinking": enabled, "thinking": enabled}


Conversation = TypeAliasType(
    "Conversation", Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
)


class ChatPrompt(Request):
    """The fields that turn a conversation into a prompt."""

    text_changing: ClassVar[Mapping[str, Absent]] = PROMPT_CHANGING

    model: str | None = None
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="Passed to chat templates that use it."
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="Passed to chat templates that use it; none also disables thinking in those that can.",
    )
    enable_thinking: bool | None = Field(
        default=None, description="Passed to chat templates that have the choice."
    )
    thinking: bool | str | ThinkingOptions | None = Field(
        default=None,
        description="Enables thinking, as in DeepSeek and Anthropic; or as in Ollama: true, false or an effort.",
    )
    reasoning: ReasoningOptions | None = Field(
        default=None, description="Thinking options in OpenRouter's form."
    )
    tools: Tools | None = None

    def functions(self) -> list[dict[str, Any]]:
        """Return the function tools in the form passed to chat templates."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or () if isinstance(tool, Tool)]

    def template_variables(self) -> dict[str, Any]:
        """Return the template variables besides messages and tools; ``chat_template_kwargs`` take precedence."""
        found: dict[str, Any] = {}
        if self.documents is not None:
            found["documents"] = self.documents
        return found | self.thinking_options() | (self.chat_template_kwargs or {})

    def thinking_options(self) -> dict[str, Any]:
        """Return the template variables about reasoning. Raises :class:`ParameterError` for contradicting fields."""
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


def _agreed(values: Mapping[str, Any]) -> Any:
    """Return the common value of the fields that are set; None if none is. Raises :class:`ParameterError`."""
    given = {name: value for name, value in values.items() if value is not None}
    found = next(iter(given.values()), None)
    for name, value in given.items():
        if value != found:
            raise ParameterError(name, value, f"contradicts {next(iter(given))}={found!r}")
    return found


class ChatCompletionRequest(ChatPrompt, SamplingRequest):
    """Body of ``POST /v1/chat/completions``; llama.cpp's parameters are accepted too."""

    text_changing: ClassVar[Mapping[str, Absent]] = TEXT_CHANGING

    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(None, description="Default: the model's, or up to the context.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(None, description="False: allow at most one call.")
    include_reasoning: bool = Field(True, description="Include the reasoning in the answer.")
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "parsed", "none", "raw", "hidden"] = (
        Field(
            "auto",
            description="llama.cpp's and Groq's: none, raw: reasoning stays in content with its markers; hidden: "
            "it is omitted; others: as --reasoning-parser says.",
        )
    )
    samplers: Strings | None = Field(None, description="llama.cpp's list of samplers to use; default: all.")
    echo: bool = Field(False, description="Repeat the last message if the answer continues it.")

    def reasoning_budget(self) -> int | None:
        """Return the limit of reasoning tokens from any of its fields. Raises :class:`ParameterError` if they
        differ."""
        budgets = {"thinking_token_budget": self.thinking_token_budget}
        if isinstance(self.thinking, ThinkingOptions):
            budgets["thinking.budget_tokens"] = self.thinking.budget_tokens
        if self.reasoning is not None:
            budgets["reasoning.max_tokens"] = self.reasoning.max_tokens
        found: int | None = _agreed(budgets)
        return found

    def shows_reasoning(self) -> bool:
        """Return whether answers include the reasoning."""
        excluded = self.reasoning is not None and self.reasoning.exclude
        return self.include_reasoning and not excluded and self.reasoning_format != "hidden"


class BatchChatRequest(ChatCompletionRequest):
    """Body of ``POST /v1/chat/completions/batch``: conversations with the same parameters, one answer each."""

    messages: Annotated[list[Conversation], FailFast(), Field(min_length=1)]  # type: ignore[assignment]

    def each(self) -> list[ChatCompletionRequest]:
        """Return one request per conversation."""
        fields = dict(self)
        return [ChatCompletionRequest.model_construct(**{**fields, "messages": one}) for one in self.messages]


class Counted(TypedDict):
    """Answer of ``/v1/chat/completions/input_tokens`` and ``/v1/messages/count_tokens``."""

    input_tokens: int


class FunctionCall(TypedDict):
    """A function call with arguments as JSON text; in deltas, first the name, then pieces of the text."""

    name: NotRequired[str]
    arguments: str


class ToolCall(TypedDict):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(TypedDict):
    """A piece of the ``index``-th call; its first piece has the other fields."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCall


class ChatMessage(TypedDict):
    """An answer. Its reasoning is in vLLM's field, and in the older one that llama.cpp also uses."""

    role: str
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatDelta(TypedDict):
    """The new part of an answer."""

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
    """Answer of ``/v1/chat/completions``. Fields that are null exist for clients of vLLM."""

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
    """The new part of one of the ``n`` answers."""

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
