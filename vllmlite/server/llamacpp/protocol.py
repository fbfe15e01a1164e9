"""Request and response types of llama.cpp's endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config.refused import Absent
from vllmlite.server.protocol.base import Prompts, Request, Stops, Strings
from vllmlite.server.protocol.fields import TEXT_CHANGING, VECTOR_CHANGING

_BIAS_SCHEMA = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": ["number", "boolean"]}},
        {"type": "array", "items": {"type": "array", "minItems": 2, "maxItems": 2}},
    ]
}


class LlamaRequest(Request):
    """The fields of ``/completion`` and ``/infill``."""

    text_changing: ClassVar[Mapping[str, Absent]] = TEXT_CHANGING

    model: str | None = None
    n_predict: int | None = Field(
        None,
        ge=-1,
        description="Maximum tokens; -1, the default: up to the context; 0: only cache the prompt.",
    )
    n_indent: int = Field(
        0, ge=0, description="End before a line, other than the first, that is indented by less."
    )
    t_max_predict_ms: int = Field(
        0, ge=-1, le=2**53, description="End at the end of a line after this time; -1 and 0: never."
    )
    samplers: Strings | None = Field(None, description="Samplers to use; default: all that have a parameter.")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, description="-1 (the default) or 4294967295: a random seed.")
    ignore_eos: bool | None = None
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS_SCHEMA)] = None
    n_probs: int = Field(0, ge=0, description="Number of most likely tokens to report with each token.")
    stop: Stops | None = None
    stream: bool = False
    grammar: str | None = Field(None, description="A GBNF grammar with start rule root.")
    json_schema: dict[str, Any] | None = None
    id_slot: int = Field(-1, ge=-1, le=2**31, description="Name of the text for /slots; -1, the default: 0.")
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: Strings | None = Field(
        None, description="Return only these fields, written as field or a/field."
    )


class LlamaCompletionRequest(LlamaRequest):
    """Body of ``POST /completion``."""

    prompt: Prompts


class InfillRequest(LlamaRequest):
    """Body of ``POST /infill``: generate the text between two texts."""

    input_prefix: str
    input_suffix: str
    prompt: str = Field("", description="Beginning of the text to generate.")
    input_extra: list[InfillFile] = Field(default_factory=list, description="Other files, for context.")


class InfillFile(Request):
    """Another file, given as context."""

    time: float | None = Field(None, description="Time at which an editor opened it; has no effect.")
    filename: str = "file"
    text: str


InfillRequest.model_rebuild()


class LlamaEmbeddingRequest(Request):
    """Body of ``POST /embedding``."""

    text_changing: ClassVar[Mapping[str, Absent]] = VECTOR_CHANGING

    model: str | None = None
    content: Prompts


class LlamaEmbedding(TypedDict):
    """An entry of ``/embedding``'s answer: one vector in a list, because llama.cpp may return one per token."""

    index: int
    embedding: list[list[float]]


class AppliedTemplate(TypedDict):
    """Answer of ``/apply-template``."""

    prompt: str


class LlamaTimings(TypedDict):
    """Token counts and times in milliseconds of a request."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class LlamaAnswer(TypedDict, total=False):
    """Answer of ``/completion`` and ``/infill``, and a chunk of its stream.

    The fields from ``model`` on are only in the last chunk, which has no text; ``response_fields`` selects fields."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int
    timings: LlamaTimings
    completion_probabilities: list[dict[str, Any]]
    model: str
    prompt: str
    tokens_cached: int
    truncated: bool
    has_new_line: bool
    stop_type: Literal["eos", "limit", "word", "none"]
    stopping_word: str
    generation_settings: dict[str, Any]


class LlamaErrorInfo(TypedDict):
    """Error details; the last two fields are only set if the prompt is too long."""

    code: int
    message: str
    type: str
    param: str | None
    n_prompt_tokens: NotRequired[int]
    n_ctx: NotRequired[int]


class LlamaError(TypedDict):
    """Error answer of llama.cpp's endpoints."""

    error: LlamaErrorInfo


class LlamaProps(TypedDict):
    """Answer of ``/props``."""

    default_generation_settings: dict[str, Any]
    total_slots: int
    model_alias: str
    model_path: str
    modalities: dict[str, bool]
    chat_template: str
    chat_template_tool_use: NotRequired[str]
    bos_token: str
    eos_token: str
    build_info: str


class LlamaAdapter(TypedDict):
    """A LoRA adapter of ``/lora-adapters``."""

    id: int
    path: str
    scale: float
