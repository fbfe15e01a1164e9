"""``/v1/responses``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, FailFast, Field, Tag
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config.refused import Absent
from vllmlite.server.openai.chat_protocol import ThinkingOptions
from vllmlite.server.protocol.base import (
    FUNCTION_TAG,
    MAX_TOOLS,
    OTHER_TAG,
    Bias,
    Ints,
    OtherTool,
    Request,
    Stops,
    Strings,
    Unknown,
    shown_name,
    tool_tag,
)
from vllmlite.server.protocol.fields import RESPONSES_TEXT_CHANGING
from vllmlite.server.protocol.sampling import StructuredOutputs

STATELESS = "nothing is kept between requests: give what was said before as input"

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDABLE = (LOGPROBS, ENCRYPTED)
"""Reasoning stands in answers as it is, so that there is nothing to encrypt: clients without a memory ask for it."""


class FunctionTool(Request):
    """A function that the model may have called. Chat templates are shown all its fields."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


ResponseTools = TypeAliasType(
    "ResponseTools",
    Annotated[
        list[
            Annotated[
                Annotated[FunctionTool, Tag(FUNCTION_TAG)] | Annotated[OtherTool, Tag(OTHER_TAG)],
                Discriminator(tool_tag("function")),
            ]
        ],
        FailFast(),
        Field(max_length=MAX_TOOLS),
    ],
)


class TextFormat(Request):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Request):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None
    """Taken, and of no effect: the answer's own has none."""


class ReasoningOptions(Request):
    """OpenAI's wishes about reasoning."""

    effort: str | None = None
    """For chat templates that ask for it; none: those that can have the model not think."""
    summary: str | None = None
    generate_summary: str | None = None
    """Taken, and never done: reasoning comes whole, and the answer's own ``summary`` is null."""


class ResponsesStreamOptions(Request):
    """What a stream carries besides."""

    include_obfuscation: bool | None = None
    """OpenAI's padding against traffic analysis; taken, and never done."""


class ResponsesRequest(Request):
    """``POST /v1/responses``."""

    text_changing: ClassVar[Mapping[str, Absent]] = {
        **RESPONSES_TEXT_CHANGING,
        "conversation": Absent((None,), STATELESS),
    }

    model: str | None = Field(None, description="A served model name.")
    input: str | list[dict[str, Any]] = Field(
        description="A text, or items: messages, function calls and their outputs, reasoning."
    )
    previous_response_id: str | None = Field(None, description="A stored response that this one continues.")
    store: bool | None = Field(
        None, description="False: not to be stored; else it is, if the server stores any."
    )
    background: bool | None = Field(None, description="Answer at once, and make the response meanwhile.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, description="Default: the model's, or up to its context.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stops | None = None
    stop_token_ids: Ints | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Bias | None = None
    thinking_token_budget: int | None = Field(None, description="Most tokens of reasoning; -1: no limit.")
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = Field(None, description="For chat templates that leave the choice.")
    thinking: bool | str | ThinkingOptions | None = Field(None, description="The same, as for chat.")
    include_reasoning: bool = Field(True, description="Answer with what the model thought before.")
    top_logprobs: int | None = Field(None, ge=-1, description="With include.")
    include: Strings | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: ResponseTools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, Any] | None = None
    priority: int = Field(0, description="Smaller goes first; needs --scheduling-policy priority.")
    cache_salt: str | None = None
    request_id: str | None = Field(
        None, max_length=256, description="Becomes part of the id of a response that is not stored."
    )

    def unknown_fields(self, place: str = "") -> Iterator[Unknown]:
        """The fields without an effect, and what ``include`` asks for that no answer has."""
        yield from super().unknown_fields(place)
        for name in self.include or ():
            if name not in INCLUDABLE:
                yield Unknown(
                    f"include={shown_name(name)}", name, f"answers can include {' and '.join(INCLUDABLE)}"
                )

    def functions(self) -> list[FunctionTool]:
        """The tools that are functions."""
        return [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]


class ResponseUsage(TypedDict):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class OutputItem(TypedDict):
    """A message, a reasoning or a function call: which fields there are goes by ``type``."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: NotRequired[str]
    content: NotRequired[list[dict[str, Any]]]
    summary: NotRequired[list[dict[str, Any]]]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]


class ResponseObject(TypedDict):
    """Answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    background: bool
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class DeletedResponse(TypedDict):
    """Answer to the deletion of a response."""

    id: str
    object: Literal["response"]
    deleted: bool


class InputItems(TypedDict):
    """A page of a stored response's input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(TypedDict):
    """Answer of ``/v1/responses/input_tokens``."""

    object: Literal["response.input_tokens"]
    input_tokens: int
