"""The request fields that become :class:`SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from vllmlite.beam_params import BeamOptions
from vllmlite.config.refused import Absent
from vllmlite.errors import ParameterError
from vllmlite.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllmlite.server.protocol.base import Bias, Ints, Request, Stops, Strings
from vllmlite.server.protocol.fields import TEXT_CHANGING


def token_limit(given: int | None) -> int | None:
    """Return a maximum number of tokens; -1, as clients of llama.cpp and LM Studio send it, means no limit."""
    return None if given == -1 else given


class StreamOptions(Request):
    """Options of a stream."""

    include_usage: bool | None = None
    """End with a chunk that has the usage."""
    continuous_usage_stats: bool | None = None
    """Include the usage so far in every chunk; needs include_usage."""
    include_obfuscation: bool | None = None
    """OpenAI's padding against traffic analysis; accepted without effect."""


def stream_usage(options: StreamOptions | None, forced: bool) -> tuple[bool, bool]:
    """Return whether a stream ends with its usage, and whether every chunk has the usage; ``forced`` enables both."""
    at_end = forced or bool(options and options.include_usage)
    return at_end, forced or (at_end and bool(options and options.continuous_usage_stats))


class JsonSchema(Request):
    """OpenAI's wrapper of a JSON Schema."""

    name: str = "schema"
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Request):
    """The required structure of the output, in OpenAI's form."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = Field(None, description="Format of a structural_tag, as in xgrammar.")
    structures: list[dict[str, Any]] | None = Field(
        None, description="Structures of the older form of structural_tag."
    )
    triggers: Strings | None = Field(None, description="Triggers of the older form of structural_tag.")
    plain_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="llama.cpp's field for a schema, with json_object or json_schema."
    )

    def params(self) -> StructuredOutputsParams | None:
        """Return the required structure, or None if any text is allowed. Raises :class:`ParameterError`."""
        match self.type:
            case "text":
                return None
            case "json_object" if self.plain_schema:
                return StructuredOutputsParams(json=self.plain_schema)
            case "json_object":
                return StructuredOutputsParams(json_object=True)
            case "structural_tag":
                tag = self.model_dump(exclude_none=True, exclude={"json_schema"})
                return StructuredOutputsParams(structural_tag=tag)
            case "json_schema":
                schema = self.json_schema.json_schema if self.json_schema is not None else self.plain_schema
                if schema is None:
                    raise ParameterError("response_format", self.type, "needs json_schema with a schema")
                return StructuredOutputsParams(json=schema)


class StructuredOutputs(Request):
    """The required structure of the output, in vLLM's form: exactly one of the first six fields."""

    text_changing: ClassVar[Mapping[str, Absent]] = {
        "backend": Absent((None, "auto", "xgrammar"), "only xgrammar is available"),
    }
    closed: ClassVar[bool] = True

    json_schema: str | dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = False
    disable_additional_properties: bool | None = False
    disable_fallback: bool | None = Field(None, description="Has no effect: there is no fallback.")
    whitespace_pattern: str | None = Field(None, description="Not supported.")

    def params(self) -> StructuredOutputsParams | None:
        """Return the structure, or None if no field is set. Raises :class:`ParameterError`."""
        wanted = self.model_dump(
            by_alias=True, exclude_none=True, exclude_defaults=True, exclude={"disable_fallback"}
        )
        return StructuredOutputsParams(**wanted) if wanted else None


class SamplingRequest(Request):
    """The request fields that become :class:`SamplingParams`; None means the model's default."""

    text_changing: ClassVar[Mapping[str, Absent]] = TEXT_CHANGING

    SAMPLING: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output",
        "skip_special_tokens", "spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "bad_words",
        "thinking_token_budget", "truncate_prompt_tokens", "truncation_side", "prompt_logprobs", "logprob_token_ids",
    )  # fmt: skip

    model: str | None = Field(None, description="A served model name.")
    n: int | None = None
    best_of: int | None = Field(
        None, description="Number of beams, of which n are returned; otherwise equal to n."
    )
    use_beam_search: bool | None = Field(
        None, description="Find the most likely completions with best_of (default: n) beams."
    )
    length_penalty: float | None = Field(
        None, description="Beams are compared by their log-probability / length ** length_penalty."
    )
    early_stopping: Literal[True, False, "never"] | None = Field(
        None, description="When a beam search ends, as in transformers."
    )
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
    thinking_token_budget: int | None = Field(None, description="Maximum reasoning tokens; -1: no limit.")
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Side at which tokens are dropped."
    )
    prompt_logprobs: int | None = None
    logprob_token_ids: Ints | None = Field(None, description="With logprobs: also report these ids.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = Field(0, description="Lower values run first; needs --scheduling-policy priority.")
    cache_salt: str | None = Field(
        None, description="Separates the prompt's cached prefix from those with other salts."
    )
    request_id: str | None = Field(None, max_length=256, description="Becomes part of the answer's id.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    grammar: str | None = Field(None, description="llama.cpp's: a GBNF grammar with start rule root.")
    json_schema: dict[str, Any] | None = Field(None, description="llama.cpp's: a JSON Schema for the output.")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def sampling_params(self, default: SamplingParams, **changes: Any) -> SamplingParams:
        """Return ``default`` with the request's parameters and ``changes``. Raises :class:`ParameterError`."""
        if self.use_beam_search:
            changes |= self._beams()
        else:
            self._check_no_beams()
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", self.stream_options.model_dump(), "needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ParameterError(
                "prompt_logprobs", self.prompt_logprobs, "cannot be combined with stream=true"
            )
        if self.logprob_token_ids and changes.get("logprobs") is None:
            raise ParameterError("logprob_token_ids", self.logprob_token_ids, "needs logprobs")
        given = {name: getattr(self, name) for name in self.SAMPLING if getattr(self, name) is not None}
        structure = self._structure()
        if structure is not None:
            given["structured_outputs"] = structure
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return default.clone(**{**given, "output_kind": kind, **changes})

    def _beams(self) -> dict[str, Any]:
        """Return the parameters of a beam search. Raises :class:`ParameterError`."""
        if self.stream:
            raise ParameterError("stream", True, "beam search has no text before its end: use stream=false")
        for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            given = getattr(self, name)
            if given is not None and given not in (neutral, -1):
                raise ParameterError(
                    name, given, "belongs to sampling: cannot be combined with use_beam_search"
                )
        options = BeamOptions(
            width=(self.n or 1) if self.best_of is None else self.best_of,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            early_stopping=self.early_stopping or False,
        )
        # The model's default temperature is meant for sampling.
        return {"beams": options, "temperature": self.temperature or 0.0}

    def _check_no_beams(self) -> None:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ParameterError(
                "best_of",
                self.best_of,
                "completions are not ranked: use n and choose yourself, or use_beam_search",
            )
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            given = getattr(self, name)
            if given is not None and given != neutral:
                raise ParameterError(name, given, "needs use_beam_search=true")

    def asks_for_structure(self) -> bool:
        """Return whether the output must have a structure."""
        return self._structure() is not None

    def _structure(self) -> StructuredOutputsParams | None:
        """Return the required structure of the output, from any of its fields. Raises :class:`ParameterError`."""
        given = {
            "structured_outputs": None
            if self.structured_outputs is None
            else self.structured_outputs.params(),
            "response_format": None if self.response_format is None else self.response_format.params(),
            "grammar": StructuredOutputsParams(grammar=self.grammar) if self.grammar else None,
            "json_schema": None
            if self.json_schema is None
            else StructuredOutputsParams(json=self.json_schema),
        }
        found = {name: structure for name, structure in given.items() if structure is not None}
        if len(found) > 1:
            first, second = list(found)[:2]
            raise ParameterError(second, getattr(self, second), f"cannot be combined with {first}")
        return next(iter(found.values()), None)
