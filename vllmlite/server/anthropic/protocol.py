"""``/v1/messages``: Anthropic's API."""

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
    """A tool that the model may have called."""

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
    """How tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(Request):
    """Whether the model is to think first, where its chat template leaves the choice."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(
        None, ge=1024, description="Most tokens of thinking, where the server knows its marks."
    )
    display: str | None = None
    """What is thought is always told."""


class AnthropicFormat(Request):
    """What the output must be."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class AnthropicOutputConfig(Request):
    """How the output is to be."""

    effort: str | None = Field(None, description="For chat templates that ask for it.")
    format: AnthropicFormat | None = None


class AnthropicMessage(Request):
    """A turn: text, or blocks of text, tool use, tool results and thinking."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountRequest(Request):
    """``POST /v1/messages/count_tokens``."""

    text_changing: ClassVar[Mapping[str, Absent]] = MESSAGES_PROMPT_CHANGING

    model: str | None = Field(None, description="A served model name.")
    messages: Annotated[list[AnthropicMessage], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[dict[str, Any]] | None = None
    tools: AnthropicTools | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: AnthropicOutputConfig | None = None
    output_format: AnthropicFormat | None = Field(None, description="The older name of output_config.format.")
    context_management: dict[str, Any] | None = Field(
        None, description="Edits of long conversations; none is done, as the answer's own says."
    )
    enable_thinking: bool | None = Field(None, description="vLLM's name of a choice that thinking makes too.")
    chat_template_kwargs: dict[str, Any] | None = None

    def functions(self) -> list[AnthropicTool]:
        """The tools that are functions."""
        return [tool for tool in self.tools or () if isinstance(tool, AnthropicTool)]


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    text_changing: ClassVar[Mapping[str, Absent]] = MESSAGES_TEXT_CHANGING

    max_tokens: int
    stop_sequences: Strings | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cache_salt: str | None = None
    thread: dict[str, Any] | None = Field(None, description="Refused: nothing is kept between requests.")


class AnthropicUsage(TypedDict):
    """Tokens of a request; ``input_tokens`` are those that neither came from the prefix cache nor went into it."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Block(TypedDict):
    """A piece of an answer: which fields there are goes by ``type``."""

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
    """What was wrong."""

    type: str
    message: str
    details: NotRequired[dict[str, Any]]


class AnthropicError(TypedDict):
    """Any answer of Anthropic's endpoints that is an error."""

    type: Literal["error"]
    error: AnthropicErrorInfo
