"""``/v1/responses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config_absent import Absent
from vllmlite.server.protocol.base import BOOKKEEPING, Bias, Ints, Request, Stops, Strings
from vllmlite.server.protocol.sampling import StructuredOutputs

STATELESS = "nothing is kept between requests: give what was said before as input"

RESPONSES_REFUSED: Mapping[str, Absent] = {
    "previous_response_id": Absent((None,), STATELESS),
    "conversation": Absent((None,), STATELESS),
    "background": Absent((None, False), STATELESS),
    "prompt": Absent((None,), "there are no stored prompts: give instructions"),
    "context_management": Absent((None, []), "there is nothing that compacts a conversation"),
    "truncation": Absent((None, "disabled"), "a conversation that is too long is refused, not cut"),
    "moderation": Absent((None,), "nothing is moderated"),
}
"""Parameters of OpenAI's without their features."""

RESPONSES_BOOKKEEPING = BOOKKEEPING | {"max_tool_calls"}
"""A limit for OpenAI's own tools, of which there are none."""

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDABLE = (LOGPROBS, ENCRYPTED)
"""Reasoning stands in answers as it is, so that there is nothing to encrypt: clients without a memory ask for it."""


class FunctionTool(Request):
    """A function that the model may have called; there is no other kind of tool."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


FunctionTools = TypeAliasType("FunctionTools", Annotated[list[FunctionTool], FailFast()])


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

    refused: ClassVar[Mapping[str, Absent]] = RESPONSES_REFUSED
    bookkeeping: ClassVar[frozenset[str]] = RESPONSES_BOOKKEEPING

    model: str | None = Field(None, description="A served model name.")
    input: str | list[dict[str, Any]] = Field(
        description="A text, or items: messages, function calls and their outputs, reasoning."
    )
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
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = Field(True, description="Answer with what the model thought before.")
    top_logprobs: int | None = Field(None, ge=0, description="With include.")
    include: Strings | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: FunctionTools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, Any] | None = None
    priority: int = Field(0, description="Smaller goes first; needs --scheduling-policy priority.")
    cache_salt: str | None = None
    request_id: str | None = Field(None, max_length=256)


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
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class InputTokens(TypedDict):
    """Answer of ``/v1/responses/input_tokens``."""

    object: Literal["response.input_tokens"]
    input_tokens: int
