"""Request and response types of ``/v1/responses``."""

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

STATELESS = "the server stores no responses: send the earlier conversation as input"

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDABLE = (LOGPROBS, ENCRYPTED)
"""Accepted values of ``include``. Encrypted reasoning, which clients without storage request, is never needed here,
because answers contain the reasoning itself."""


class FunctionTool(Request):
    """A function that the model may call. Chat templates get all its fields."""

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
    """The required format of the output."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Request):
    """Options of the text output."""

    format: TextFormat | None = None
    verbosity: str | None = None
    """Accepted without effect."""


class ReasoningOptions(Request):
    """OpenAI's options of reasoning."""

    effort: str | None = None
    """Passed to chat templates that use it; ``none`` disables thinking in those that can."""
    summary: str | None = None
    generate_summary: str | None = None
    """Accepted without effect: the reasoning itself is returned, and ``summary`` in the answer is null."""


class ResponsesStreamOptions(Request):
    """Options of a stream."""

    include_obfuscation: bool | None = None
    """OpenAI's padding against traffic analysis; accepted without effect."""


class ResponsesRequest(Request):
    """Body of ``POST /v1/responses``."""

    text_changing: ClassVar[Mapping[str, Absent]] = {
        **RESPONSES_TEXT_CHANGING,
        "conversation": Absent((None,), STATELESS),
    }

    model: str | None = Field(None, description="A served model name.")
    input: str | list[dict[str, Any]] = Field(
        description="A text, or items: messages, function calls and their outputs, reasoning."
    )
    previous_response_id: str | None = Field(
        None, description="Id of a stored response that this one continues."
    )
    store: bool | None = Field(
        None, description="False: do not store the response; otherwise it is stored if the server stores any."
    )
    background: bool | None = Field(None, description="Answer immediately and generate in the background.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, description="Default: the model's, or up to the context.")
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
    thinking_token_budget: int | None = Field(None, description="Maximum reasoning tokens; -1: no limit.")
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = Field(None, description="Passed to chat templates that have the choice.")
    thinking: bool | str | ThinkingOptions | None = Field(None, description="As in chat completions.")
    include_reasoning: bool = Field(True, description="Include the reasoning in the answer.")
    top_logprobs: int | None = Field(None, ge=-1, description="Needs include.")
    include: Strings | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: ResponseTools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, Any] | None = None
    priority: int = Field(0, description="Lower values run first; needs --scheduling-policy priority.")
    cache_salt: str | None = None
    request_id: str | None = Field(
        None, max_length=256, description="Becomes part of the response's id, unless it is stored."
    )

    def unknown_fields(self, place: str = "") -> Iterator[Unknown]:
        """Yield the fields without effect, and values of ``include`` that no answer can include."""
        yield from super().unknown_fields(place)
        for name in self.include or ():
            if name not in INCLUDABLE:
                yield Unknown(
                    f"include={shown_name(name)}", name, f"answers can include {' and '.join(INCLUDABLE)}"
                )

    def functions(self) -> list[FunctionTool]:
        """Return the function tools."""
        return [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]


class ResponseUsage(TypedDict):
    """Token counts of a request."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class OutputItem(TypedDict):
    """A message, reasoning or function call; ``type`` determines which fields it has."""

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
    """Answer to deleting a response."""

    id: str
    object: Literal["response"]
    deleted: bool


class InputItems(TypedDict):
    """A page of a stored response's input items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(TypedDict):
    """Answer of ``/v1/responses/input_tokens``."""

    object: Literal["response.input_tokens"]
    input_tokens: int
