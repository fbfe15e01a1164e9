"""Request and response types of ``/v1/messages``, Anthropic's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, FailFast, Field, Tag
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config.refused import Absent
from vllmlite.server.protocol.base import (
    FUNCTION_TAG,
    MAX_MESSAGES,
    MAX_TOOLS,
    OTHER_TAG,
    OtherTool,
    Request,
    Strings,
    tool_tag,
)
from vllmlite.server.protocol.fields import MESSAGES_PROMPT_CHANGING, MESSAGES_TEXT_CHANGING


class AnthropicTool(Request):
    """A tool that the model may call."""

    text_changing: ClassVar[Mapping[str, Absent]] = {
        "allowed_callers": Absent((None, [], ["direct"]), "there is no code that could call tools"),
        "input_examples": Absent((None, []), "put examples into the description"),
    }

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


AnthropicTools = TypeAliasType(
    "AnthropicTools",
    Annotated[
        list[
            Annotated[
                Annotated[AnthropicTool, Tag(FUNCTION_TAG)] | Annotated[OtherTool, Tag(OTHER_TAG)],
                Discriminator(tool_tag("custom")),
            ]
        ],
        FailFast(),
        Field(max_length=MAX_TOOLS),
    ],
)


class AnthropicChoice(Request):
    """How the model may call tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(Request):
    """Whether the model should think first, if its chat template has the choice."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(
        None,
        ge=1024,
        description="Maximum thinking tokens, if the server knows the model's thinking markers.",
    )
    display: str | None = None
    """Has no effect: thinking is always included."""


class AnthropicFormat(Request):
    """The required format of the output."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class AnthropicOutputConfig(Request):
    """Options of the answer's format and effort."""

    effort: str | None = Field(None, description="Passed to chat templates that use it.")
    format: AnthropicFormat | None = None


class AnthropicMessage(Request):
    """A turn: text, or blocks of text, tool use, tool results and thinking."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountRequest(Request):
    """Body of ``POST /v1/messages/count_tokens``."""

    text_changing: ClassVar[Mapping[str, Absent]] = MESSAGES_PROMPT_CHANGING

    model: str | None = Field(None, description="A served model name.")
    messages: Annotated[list[AnthropicMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[dict[str, Any]] | None = None
    tools: AnthropicTools | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: AnthropicOutputConfig | None = None
    output_format: AnthropicFormat | None = Field(None, description="Older name of output_config.format.")
    context_management: dict[str, Any] | None = Field(
        None, description="Edits of long conversations; none are applied, as the answer states."
    )
    enable_thinking: bool | None = Field(None, description="vLLM's name for enabling thinking.")
    chat_template_kwargs: dict[str, Any] | None = None

    def functions(self) -> list[AnthropicTool]:
        """Return the tools that are functions."""
        return [tool for tool in self.tools or () if isinstance(tool, AnthropicTool)]


class MessagesRequest(CountRequest):
    """Body of ``POST /v1/messages``."""

    text_changing: ClassVar[Mapping[str, Absent]] = MESSAGES_TEXT_CHANGING

    max_tokens: int
    stop_sequences: Strings | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cache_salt: str | None = None
    thread: dict[str, Any] | None = Field(None, description="Refused: the server keeps no threads.")


class AnthropicUsage(TypedDict):
    """Token counts of a request; ``input_tokens`` excludes tokens read from or written to the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Block(TypedDict):
    """A block of an answer; ``type`` determines which fields it has."""

    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[Any]


class AnthropicAnswer(TypedDict):
    """Answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: str
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage
    context_management: NotRequired[dict[str, Any]]


class AnthropicErrorInfo(TypedDict):
    """Type and message of an error."""

    type: str
    message: str
    details: NotRequired[dict[str, Any]]


class AnthropicError(TypedDict):
    """Error answer of Anthropic's endpoints."""

    type: Literal["error"]
    error: AnthropicErrorInfo
