"""llama.cpp's server: ``/completion``, ``/infill``, ``/embedding``, ``/apply-template`` and ``/props``."""

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
    """What both ways to complete a text take."""

    text_changing: ClassVar[Mapping[str, Absent]] = TEXT_CHANGING

    model: str | None = None
    n_predict: int | None = Field(
        None,
        ge=-1,
        description="Most tokens; -1, the default: up to the context; 0: the prompt is cached, that is all.",
    )
    n_indent: int = Field(0, ge=0, description="Ends before a line, but the first, that is indented by less.")
    t_max_predict_ms: int = Field(
        0, ge=-1, le=2**53, description="Ends at the end of a line after this time; -1, 0: never."
    )
    samplers: Strings | None = Field(None, description="Those to use; default: all that have a parameter.")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, description="-1, the default, or 4294967295: another one each time.")
    ignore_eos: bool | None = None
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS_SCHEMA)] = None
    n_probs: int = Field(0, ge=0, description="Likeliest tokens to report with each.")
    stop: Stops | None = None
    stream: bool = False
    grammar: str | None = Field(None, description="GBNF, whose start is root.")
    json_schema: dict[str, Any] | None = None
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: Strings | None = Field(
        None, description="Of the answer, or of a stream's last piece, give these alone: a field, or a/field."
    )


class LlamaCompletionRequest(LlamaRequest):
    """``POST /completion``."""

    prompt: Prompts


class InfillRequest(LlamaRequest):
    """``POST /infill``: what comes between two texts."""

    input_prefix: str
    input_suffix: str
    prompt: str = Field("", description="Begins the text between.")
    input_extra: list[InfillFile] = Field(default_factory=list, description="Other files, for context.")


class InfillFile(Request):
    """A file beside the one that is filled in."""

    time: float | None = Field(None, description="When an editor saw it; has no effect.")
    filename: str = "file"
    text: str


InfillRequest.model_rebuild()


class LlamaEmbeddingRequest(Request):
    """``POST /embedding``."""

    text_changing: ClassVar[Mapping[str, Absent]] = VECTOR_CHANGING

    model: str | None = None
    content: Prompts


class LlamaEmbedding(TypedDict):
    """An entry of the answer of ``/embedding``: one vector, in a list, for there may be one a token elsewhere."""

    index: int
    embedding: list[list[float]]


class AppliedTemplate(TypedDict):
    """Answer of ``/apply-template``."""

    prompt: str


class LlamaTimings(TypedDict):
    """Tokens and milliseconds of a request."""

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
    """Answer of ``/completion`` and ``/infill``, and a piece of its stream. The later fields are the last piece's,
    which has no text; ``response_fields`` leave out others."""

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
    """What was wrong. The last two are those of a prompt that is too long."""

    code: int
    message: str
    type: str
    param: str | None
    n_prompt_tokens: NotRequired[int]
    n_ctx: NotRequired[int]


class LlamaError(TypedDict):
    """Any answer of llama.cpp's endpoints that is an error."""

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
