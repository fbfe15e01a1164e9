"""What all requests and answers share: strictness, names without features, lists, errors, usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, WithJsonSchema, model_validator
from typing_extensions import NotRequired, TypeAliasType, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.config_absent import Absent
from vllmlite.errors import ParameterError
from vllmlite.options import did_you_mean

_UNUSED = (None,)
_TEXT_ONLY = "only text goes in and out"
_TOOLS = "tools go with conversations: see /v1/chat/completions"
_OLD_NAME = "vLLM's old name: see structured_outputs"

REFUSED: Mapping[str, Absent] = {
    "suffix": Absent((None, ""), "text is only continued, not filled in: see /infill for models that can"),
    "use_beam_search": Absent((None, False), "beam search is not supported: see n"),
    "length_penalty": Absent((None, 1.0), "belongs to beam search, which is not supported"),
    "early_stopping": Absent((None, False), "belongs to beam search, which is not supported"),
    "logits_processors": Absent((None, []), "custom logits processors are not supported: see logit_bias"),
    "prompt_embeds": Absent(_UNUSED, "prompts are text or token ids"),
    "mm_processor_kwargs": Absent((None, {}), _TEXT_ONLY),
    "media_io_kwargs": Absent((None, {}), _TEXT_ONLY),
    "audio": Absent(_UNUSED, _TEXT_ONLY),
    "modalities": Absent((None, ["text"]), _TEXT_ONLY),
    "prediction": Absent(_UNUSED, "predicted outputs are not supported"),
    "web_search_options": Absent(_UNUSED, "there is no web search"),
    "kv_transfer_params": Absent(_UNUSED, "the key/value cache is not shared between engines"),
    "ec_transfer_params": Absent(_UNUSED, _TEXT_ONLY),
    "thinking_token_budget": Absent(_UNUSED, "reasoning has no limit of its own: see max_tokens"),
    "logprob_token_ids": Absent(
        (None, []), "log-probabilities are those of the likeliest tokens: see logprobs"
    ),
    "repetition_detection": Absent(
        _UNUSED, "an answer that repeats itself is not ended: see repetition_penalty"
    ),
    "watermarking": Absent((None, False), "nothing is watermarked"),
    "stream_interval": Absent((None, 1), "a stream brings each token as it comes"),
    "routed_experts_prompt_start": Absent((None, 0), "a model's choice of experts is not told"),
    "vllm_xargs": Absent((None, {}), "there are no extensions to pass arguments to"),
    "functions": Absent((None, []), "deprecated by OpenAI: see tools"),
    "function_call": Absent((None, "none"), "deprecated by OpenAI: see tool_choice"),
    "tools": Absent((None, []), _TOOLS),
    "tool_choice": Absent((None, "none", "auto"), _TOOLS),
    "parallel_tool_calls": Absent((None, True, False), _TOOLS),
    "guided_json": Absent(_UNUSED, _OLD_NAME),
    "guided_regex": Absent(_UNUSED, _OLD_NAME),
    "guided_choice": Absent(_UNUSED, _OLD_NAME),
    "guided_grammar": Absent(_UNUSED, _OLD_NAME),
    "guided_decoding_backend": Absent(_UNUSED, _OLD_NAME),
    "guided_whitespace_pattern": Absent(_UNUSED, _OLD_NAME),
    "moderation": Absent(_UNUSED, "nothing is moderated"),
    "verbosity": Absent((None, "medium"), "the model's verbosity cannot be chosen"),
}
"""Parameters of OpenAI's and vLLM's without their features: refused by name, except where they ask for nothing."""

BOOKKEEPING = frozenset(
    "user metadata store service_tier safety_identifier session_id prompt_cache_key prompt_cache_retention "
    "prompt_cache_options cache_control diagnostics user_profile_id workspace_id".split()
)
"""Parameters that could change no answer: taken, and of no effect."""


class Request(BaseModel):
    """A request body: strict types, known names."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    refused: ClassVar[Mapping[str, Absent]] = REFUSED
    """What the API has and the server has not."""
    bookkeeping: ClassVar[frozenset[str]] = BOOKKEEPING
    """What could change no answer."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {field.alias or name for name, field in cls.model_fields.items()}
        known: dict[str, Any] = {}
        for name, value in data.items():
            if name in names:
                if value is not None:  # null asks for nothing
                    # JSON has one kind of numbers: 5.0 is whole too.
                    whole = type(value) is float and value.is_integer()
                    known[name] = int(value) if whole else value
            elif name in cls.refused:
                if not cls.refused[name].accepts(value):
                    raise ParameterError(name, value, cls.refused[name].reason)
            elif name not in cls.bookkeeping:
                shown = str(name)[:80].encode("utf-8", "backslashreplace").decode()
                raise ParameterError(shown, value, "no such parameter" + did_you_mean(shown, list(names)))
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


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokensDetails
    completion_tokens_details: NotRequired[CompletionDetails]


class TokensDetails(TypedDict):
    """Prompt tokens that the prefix cache knew."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """Tokens of what a model thought before it answered."""

    reasoning_tokens: int


class ErrorInfo(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Any answer that is an error."""

    error: ErrorInfo
