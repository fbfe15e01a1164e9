"""What requests and answers hold: OpenAI's API with vLLM's additions.

Requests are pydantic models, strict about types and names: a parameter that is unknown, or whose feature is absent, is
an error that says so. Answers are typed dictionaries, which cost nothing to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config_absent import Absent
from vllmlite.errors import ParameterError
from vllmlite.options import did_you_mean
from vllmlite.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

_UNUSED = (None,)
_TEXT_ONLY = "only text goes in and out"
_OLD_NAME = "vLLM's old name: see structured_outputs"

REFUSED: Mapping[str, Absent] = {
    "suffix": Absent((None, ""), "text is only continued, not filled in: see /infill for models that can"),
    "use_beam_search": Absent((None, False), "beam search is not supported: see n"),
    "length_penalty": Absent((None, 1.0), "belongs to beam search, which is not supported"),
    "early_stopping": Absent((None, False), "belongs to beam search, which is not supported"),
    "logits_processors": Absent((None, []), "custom logits processors are not supported: see logit_bias"),
    "prompt_embeds": Absent(_UNUSED, "prompts are text or token ids"),
    "documents": Absent((None, []), "put documents into the messages"),
    "mm_processor_kwargs": Absent((None, {}), _TEXT_ONLY),
    "audio": Absent(_UNUSED, _TEXT_ONLY),
    "modalities": Absent((None, ["text"]), _TEXT_ONLY),
    "prediction": Absent(_UNUSED, "predicted outputs are not supported"),
    "web_search_options": Absent(_UNUSED, "there is no web search"),
    "kv_transfer_params": Absent(_UNUSED, "the key/value cache is not shared between engines"),
    "vllm_xargs": Absent((None, {}), "there are no extensions to pass arguments to"),
    "functions": Absent((None, []), "deprecated by OpenAI: see tools"),
    "function_call": Absent((None, "none"), "deprecated by OpenAI: see tool_choice"),
    "tools": Absent((None, []), "tools are not supported in this version"),
    "tool_choice": Absent((None, "none", "auto"), "tools are not supported in this version"),
    "parallel_tool_calls": Absent((None, True, False), "tools are not supported in this version"),
    "guided_json": Absent(_UNUSED, _OLD_NAME),
    "guided_regex": Absent(_UNUSED, _OLD_NAME),
    "guided_choice": Absent(_UNUSED, _OLD_NAME),
    "guided_grammar": Absent(_UNUSED, _OLD_NAME),
    "reasoning_effort": Absent((None, "none"), "the model's effort cannot be chosen"),
    "verbosity": Absent((None, "medium"), "the model's verbosity cannot be chosen"),
}
"""Parameters of OpenAI's and vLLM's without their features: refused by name, except where they ask for nothing."""

BOOKKEEPING = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention".split()
)
"""Parameters that could change no answer: taken, and of no effect."""


class Request(BaseModel):
    """A request body: strict types, known names."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {field.alias or name for name, field in cls.model_fields.items()}
        known: dict[str, Any] = {}
        for name, value in data.items():
            if name in names:
                known[name] = value
            elif name in REFUSED:
                if not REFUSED[name].accepts(value):
                    raise ParameterError(name, value, REFUSED[name].reason)
            elif name not in BOOKKEEPING:
                raise ParameterError(name, value, "no such parameter" + did_you_mean(name, list(names)))
        return known


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}

Prompts = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
"""A text, token ids, or a list of either. Checked by the service: pydantic would try every form on every element."""


_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number"}}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Ints = TypeAliasType("Ints", Annotated[list[int], FailFast()])
Strings = TypeAliasType("Strings", Annotated[list[str], FailFast()])
Bias = TypeAliasType("Bias", Annotated[dict[str, Any], WithJsonSchema(_BIAS_SCHEMA)])
Stops = TypeAliasType(
    "Stops",
    Annotated[list[str], FailFast(), BeforeValidator(_as_list, json_schema_input_type=str | list[str])],
)
"""Lists whose check ends at the first error, however many a hostile one has."""


class StreamOptions(Request):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """End with a chunk that has the usage."""
    continuous_usage_stats: bool | None = None
    """Have the usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """OpenAI's padding against traffic analysis; taken, and never done."""


class JsonSchema(Request):
    """OpenAI's wrapping of a JSON Schema."""

    name: str = "schema"
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Request):
    """What the output must be, as OpenAI says it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Request):
    """What the output must be, as vLLM says it: exactly one of these."""

    json_schema: str | dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingRequest(Request):
    """The fields of a request that become :class:`SamplingParams`; None leaves the model's default."""

    SAMPLING: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output",
        "skip_special_tokens", "spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "bad_words",
        "truncate_prompt_tokens", "prompt_logprobs",
    )  # fmt: skip

    model: str | None = Field(None, description="A served model name.")
    n: int | None = None
    best_of: int | None = Field(None, description="Refused, unless it is n.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stops | None = None
    stop_token_ids: Ints | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: Bias | None = None
    allowed_token_ids: Ints | None = None
    bad_words: Strings | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = Field(0, description="Smaller goes first; needs --scheduling-policy priority.")
    cache_salt: str | None = Field(
        None, description="Keeps the prompt's cached prefix apart from other salts'."
    )
    request_id: str | None = Field(None, max_length=256, description="Becomes part of the answer's id.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def sampling_params(self, default: SamplingParams, **changes: Any) -> SamplingParams:
        """The request's parameters over ``default``, with ``changes``. Raises :class:`ParameterError`."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ParameterError("best_of", self.best_of, "completions are not ranked: ask for n, and choose")
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", self.stream_options.model_dump(), "goes with stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ParameterError("prompt_logprobs", self.prompt_logprobs, "does not go with stream=true")
        given = {name: getattr(self, name) for name in self.SAMPLING if getattr(self, name) is not None}
        structure = self._structure()
        if structure is not None:
            given["structured_outputs"] = structure
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return default.clone(**{**given, "output_kind": kind, **changes})

    def _structure(self) -> StructuredOutputsParams | None:
        """What the output must be, whichever way it was said."""
        form = self.response_format
        if self.structured_outputs is not None:
            if form is not None and form.type != "text":
                raise ParameterError("response_format", form.type, "does not go with structured_outputs")
            wanted = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
            return StructuredOutputsParams(**wanted) if wanted else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if form.json_schema is None or form.json_schema.json_schema is None:
            raise ParameterError("response_format", form.type, "needs json_schema with a schema")
        return StructuredOutputsParams(json=form.json_schema.json_schema)


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: int | None = Field(
        None, description="Default: the model's, or 16. 0 with echo scores the prompt."
    )
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


Parts = TypeAliasType("Parts", Annotated[list[ContentPart], FailFast()])


class Message(BaseModel):
    """A message of a conversation. What a chat template may want beyond these is handed to it as it came."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Parts | None = None


class ChatPrompt(Request):
    """The fields that make a conversation a prompt."""

    model: str | None = None
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(ChatPrompt, SamplingRequest):
    """``POST /v1/chat/completions``."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(None, description="Default: the model's, or up to its context.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool = Field(False, description="Begin with the last message, where the answer continues it.")


class GenerateRequest(SamplingRequest):
    """``POST /generate``: vLLM's plain endpoint, a prompt and SamplingParams."""

    prompt: Prompts
    max_tokens: int | None = None
    logprobs: int | None = None


class TokenizeRequest(Request):
    """``POST /tokenize`` of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatPrompt):
    """``POST /tokenize`` of a conversation."""

    return_token_strs: bool = False


TOKENIZABLE_TAGS = ("a text", "a conversation")
"""Names of the two forms, which pydantic puts into the places of errors."""

Tokenizable = Annotated[
    Annotated[TokenizeRequest, Tag(TOKENIZABLE_TAGS[0])]
    | Annotated[TokenizeChatRequest, Tag(TOKENIZABLE_TAGS[1])],
    Discriminator(lambda body: TOKENIZABLE_TAGS[isinstance(body, dict) and "messages" in body]),
]


class DetokenizeRequest(Request):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Ints


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokensDetails


class TokensDetails(TypedDict):
    """Prompt tokens that the prefix cache knew."""

    cached_tokens: int


class PromptLogprob(TypedDict):
    """An entry of vLLM's ``prompt_logprobs``."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(TypedDict):
    """Columns, an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class Completion(TypedDict):
    """Answer of ``/v1/completions``, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that is, and the likeliest ones of its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """An entry a token."""

    content: list[TokenLogprob]


class ChatMessage(TypedDict):
    """An answer."""

    role: str
    content: str | None


class ChatDelta(TypedDict):
    """What is new of an answer."""

    role: NotRequired[str]
    content: NotRequired[str | None]


class ChatChoice(TypedDict):
    """One of the ``n`` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs | None]
    prompt_token_ids: NotRequired[list[int]]


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


class ModelCard(TypedDict):
    """A served model name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(TypedDict):
    """Answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(TypedDict):
    """Answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """Answer of ``/detokenize``."""

    prompt: str


class Generated(TypedDict):
    """Answer of ``/generate``, and a line of its stream: prompts with their continuations."""

    text: list[str]


class ErrorInfo(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Any answer that is an error."""

    error: ErrorInfo


class Health(TypedDict):
    """Answer of ``/health``."""

    status: Literal["ok", "degraded"]
    failed_steps: int
    last_error: str | None


class ProfileFile(TypedDict):
    """Answer of ``/stop_profile``: a file on the server."""

    file: str


class Version(TypedDict):
    """Answer of ``/version``."""

    version: str


class Load(TypedDict):
    """Answer of ``/load``."""

    server_load: int
