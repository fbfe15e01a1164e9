"""Sampling parameters of a request under vLLM's names, checked before the request starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from json import loads
from numbers import Integral, Real
from typing import Any

from vllmlite.beam_params import BeamOptions
from vllmlite.beam_params import BeamSearchParams as BeamSearchParams
from vllmlite.errors import ParameterError
from vllmlite.inputs import refuse, token_ids
from vllmlite.tokenizers.truncation import check_truncation

MAX_LOGPROBS = 20
"""Default of ``EngineConfig.max_logprobs``."""
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 1024
MAX_STOPS = 1024
MAX_CHARACTERS = 32 << 10
"""Maximum total length of all ``stop`` strings, which are searched after every token; and of all ``bad_words``."""
MAX_LOGPROB_TOKEN_IDS = 128


class RequestOutputKind(Enum):
    """Which part of the output each :class:`~vllmlite.outputs.RequestOutput` has."""

    CUMULATIVE = 0
    """All text and tokens so far, at every step."""
    DELTA = 1
    """Only what is new since the previous output."""
    FINAL_ONLY = 2
    """A single output, when the request has finished."""


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """The tokens that enclose a model's reasoning, which precedes the structured part of the output."""

    closing_id: int
    opening_id: int | None
    """Begins the reasoning if it is the first output token; None if the prompt already began it."""


KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Fields of :class:`StructuredOutputsParams` that define the structure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The structure of the output: exactly one of :data:`KINDS`. Raises :class:`ParameterError` for invalid values."""

    json: str | dict[str, Any] | bool | None = None
    """The output is a JSON value that satisfies this JSON Schema (a mapping, or its text)."""
    regex: str | None = None
    """The output matches this regular expression."""
    choice: list[str] | None = None
    """The output is one of these strings."""
    grammar: str | None = None
    """The output is in the language of this EBNF (GBNF) grammar with start rule ``root``; or Lark, if xgrammar reads
    it."""
    json_object: bool | None = None
    """The output is any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """The output is text with structured parts, as xgrammar's structural tags (a mapping, or its text) define."""
    disable_any_whitespace: bool = False
    """No effect: JSON is always written with one space after each comma and colon, and no other white space."""
    disable_additional_properties: bool = False
    """No effect: objects with named properties have no others unless the schema allows them."""
    whitespace_pattern: str | None = None
    """Not supported; must be None."""
    after: ThinkingMarks | None = None
    """Unconstrained reasoning that precedes the structure."""

    def __post_init__(self) -> None:
        """Check that exactly one structure is given, and all types."""
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ParameterError("structured_outputs", given, "must have exactly one of {', '.join(KINDS)}")
        if self.after is not None and not isinstance(self.after, ThinkingMarks):
            raise ParameterError("structured_outputs.after", self.after, "must be ThinkingMarks or None")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(
                    f"structured_outputs.{name}", getattr(self, name), "must be True or False"
                )
        if self.whitespace_pattern is not None:
            raise ParameterError(
                "structured_outputs.whitespace_pattern",
                self.whitespace_pattern,
                "must be None: JSON is written with one space after each comma and colon, and no others",
            )
        self.kind_and_source()

    def kind_and_source(self) -> tuple[str, Any]:
        """Return the kind (``json``, ``structural_tag``, ``regex``, ``choice`` or ``grammar``) and its source, parsed
        if JSON."""
        if self.json_object:
            return "json", {"type": "object"}
        if self.json_object is not None:
            raise ParameterError("structured_outputs.json_object", self.json_object, "must be True")
        if self.json is not None:
            schema = _parsed("json", self.json)
            if not isinstance(schema, (dict, bool)):
                raise ParameterError("structured_outputs.json", schema, "must be a JSON Schema")
            return "json", schema
        if self.structural_tag is not None:
            tag = _parsed("structural_tag", self.structural_tag)
            if not isinstance(tag, dict):
                raise ParameterError("structured_outputs.structural_tag", tag, "must be a JSON object")
            return "structural_tag", tag
        if self.choice is not None:
            if not isinstance(self.choice, list) or not all(isinstance(c, str) and c for c in self.choice):
                raise ParameterError(
                    "structured_outputs.choice", self.choice, "must be a list of non-empty texts"
                )
            return "choice", self.choice
        kind, source = ("regex", self.regex) if self.regex is not None else ("grammar", self.grammar)
        if not isinstance(source, str) or not source:
            raise ParameterError(f"structured_outputs.{kind}", source, "must be a non-empty text")
        return kind, source


def _parsed(name: str, given: Any) -> Any:
    """Return ``given``, parsed as JSON if it is a string."""
    if not isinstance(given, str):
        return given
    try:
        return loads(given)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"structured_outputs.{name}", given, f"is not JSON: {error}") from None


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How to sample tokens, when to stop, and what to report. Raises :class:`ParameterError` for invalid values."""

    n: int = 1
    """Number of completions to generate for the prompt (1 to 128)."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose total probability reaches this (0 < top_p <= 1)."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely token's probability (0 to 1)."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens of prompt and output, below 1 encourages them (> 0)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token that has been generated (-2 to 2)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it has been generated (-2 to 2)."""
    seed: int | None = None
    """Makes sampling reproducible in any batch; None or -1: a different seed each time, derived from the engine's."""
    max_tokens: int | None = 16
    """Maximum number of tokens to generate; None: up to the context length."""
    min_tokens: int = 0
    """Suppress end of text and stop tokens before this many tokens."""
    stop: str | list[str] | None = None
    """Strings that end the generation when they appear in the output text."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the generation."""
    ignore_eos: bool = False
    """Continue past the model's end-of-text tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the stop token's text, in the output."""
    logprobs: int | None = None
    """Report log-probabilities of this many most likely tokens and of the sampled one; -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    """Report log-probabilities as ``logprobs`` does, for each token of the prompt."""
    logprob_token_ids: list[int] | None = None
    """Also report the log-probabilities of these ids with each sampled token (at most 128)."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids (-100 to 100 each, at most 300)."""
    allowed_token_ids: list[int] | None = None
    """Sample only from these ids."""
    bad_words: list[str] | None = None
    """Words that are never generated."""
    skip_special_tokens: bool = True
    """Omit special tokens from the text."""
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility with vLLM; has no effect."""
    detokenize: bool = True
    """Convert ids to text; otherwise ``text`` stays empty and stop strings are refused."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens of the prompt; -1: as many as fit the context beside ``max_tokens``."""
    truncation_side: str | None = None
    """End at which ``truncate_prompt_tokens`` drops tokens: ``left`` (default) keeps the prompt's end, ``right`` its
    start."""
    thinking_token_budget: int | None = None
    """End the reasoning after this many tokens; None or -1: no limit. Needs the markers of ``reasoning_config``."""
    structured_outputs: StructuredOutputsParams | None = None
    """Structure of the output: a JSON Schema, a regular expression, a choice or a grammar."""
    beams: BeamOptions | None = None
    """Search for the most likely outputs with beams, instead of sampling, and return the best ``n``. A temperature
    above 0 divides the logits; ``top_p``, ``top_k``, ``min_p`` and ``seed`` have no effect."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """Which part of the output each :class:`~vllmlite.outputs.RequestOutput` has."""

    def __post_init__(self) -> None:
        """Check all fields; normalise ``stop`` to a list, ``top_k`` -1 to 0 and ``seed`` -1 to None."""
        self._check_types()
        _within("n", self.n, 1, 128)
        _at_least("temperature", self.temperature, 0.0)
        if not 0.0 < self.top_p <= 1.0:
            raise ParameterError("top_p", self.top_p, "must be greater than 0 and at most 1")
        if not -1 <= self.top_k < 2**31:
            raise ParameterError("top_k", self.top_k, "must be 0 or -1 (all), or from 1 to 2147483647")
        self.top_k = max(self.top_k, 0)
        _within("min_p", self.min_p, 0.0, 1.0)
        if not (self.repetition_penalty > 0.0 and math.isfinite(self.repetition_penalty)):
            raise ParameterError("repetition_penalty", self.repetition_penalty, "must be greater than 0")
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**64 - 1)
            self.seed = None if self.seed == -1 else self.seed
        if self.max_tokens is not None:
            _at_least("max_tokens", self.max_tokens, 1)
        _at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens", self.min_tokens, f"must be at most max_tokens, {self.max_tokens}"
            )
        self._check_lists()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _at_least(name, value, -1)
        check_truncation(self.truncate_prompt_tokens, self.truncation_side)
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        if self.thinking_token_budget is not None:
            _at_least("thinking_token_budget", self.thinking_token_budget, 0)
        if self.structured_outputs is not None:
            self._check_structure(self.structured_outputs)
        if self.beams is not None:
            self._check_beams(self.beams)

    def _check_beams(self, beams: BeamOptions) -> None:
        if not isinstance(beams, BeamOptions):
            raise ParameterError("beams", beams, "must be BeamOptions")
        if self.n > beams.width:
            raise ParameterError("n", self.n, f"must be at most the number of beams, {beams.width}")
        for name in ("stop", "logprobs", "logprob_token_ids", "thinking_token_budget"):
            if getattr(self, name) not in (None, []):
                raise ParameterError(name, getattr(self, name), "cannot be combined with beam search")
        if self.output_kind is RequestOutputKind.DELTA:
            raise ParameterError(
                "output_kind",
                self.output_kind,
                "must not be DELTA with beam search",
            )

    def _check_structure(self, structure: StructuredOutputsParams) -> None:
        if not isinstance(structure, StructuredOutputsParams):
            raise ParameterError("structured_outputs", structure, "must be StructuredOutputsParams")
        for name in ("min_tokens", "ignore_eos", "bad_words", "allowed_token_ids"):
            if getattr(self, name):
                raise ParameterError(name, getattr(self, name), "cannot be combined with structured_outputs")

    def _check_types(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
                raise ParameterError(name, value, "must be a number")
            if math.isinf(value):
                raise ParameterError(name, value, "must be finite")
            if not isinstance(value, (int, float)):
                setattr(self, name, float(value))
        for name in ("n", "top_k", "min_tokens"):
            self._check_integer(name, "must be an integer")
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_integer(name, "must be an integer or None")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, getattr(self, name), "must be True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ParameterError("output_kind", self.output_kind, "must be a RequestOutputKind")

    def _check_integer(self, name: str, accepted: str) -> None:
        value = getattr(self, name)
        if type(value) is not int:
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ParameterError(name, value, accepted)
            setattr(self, name, int(value))

    def _check_lists(self) -> None:
        if not isinstance(self.stop, (str, Sequence, type(None))):
            raise ParameterError("stop", self.stop, "must be a string or a list of strings")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        _check_strings("stop", self.stop, MAX_STOPS)
        if self.stop and not self.detokenize:
            raise ParameterError(
                "stop", self.stop, "stop strings are searched in the text: they need detokenize"
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                ids = token_ids(value)
            except ParameterError:
                ids = [-1]
            if ids and min(ids) < 0:
                raise ParameterError(name, value, "must be token ids: integers from 0")
            setattr(self, name, ids)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError("allowed_token_ids", self.allowed_token_ids, "must allow at least one id")
        if self.logprob_token_ids is not None and len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise ParameterError(
                "logprob_token_ids",
                len(self.logprob_token_ids),
                f"must have at most {MAX_LOGPROB_TOKEN_IDS} ids",
            )
        if not isinstance(self.bad_words, (list, tuple, type(None))):
            raise ParameterError("bad_words", self.bad_words, "must be a list of strings")
        _check_strings("bad_words", self.bad_words or (), MAX_BAD_WORDS)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ParameterError("logit_bias", self.logit_bias, "must map token ids to numbers")
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise ParameterError(
                    "logit_bias", len(self.logit_bias), f"must have at most {MAX_LOGIT_BIAS} ids"
                )
            try:
                self.logit_bias = {int(i): float(b) for i, b in self.logit_bias.items()}
            except (TypeError, ValueError, AttributeError, OverflowError):
                raise ParameterError("logit_bias", self.logit_bias, "must map token ids to numbers") from None
            for i, bias in self.logit_bias.items():
                if i < 0 or not -100.0 <= bias <= 100.0:
                    raise ParameterError(
                        "logit_bias", {i: bias}, "must map ids from 0 to numbers from -100 to 100"
                    )

    def check_vocabulary(self, vocab_size: int, max_logprobs: int) -> None:
        """Raise :class:`ParameterError` for ids of ``vocab_size`` or more, or more than ``max_logprobs``
        log-probabilities."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            for i in getattr(self, name) or ():
                if i >= vocab_size:
                    raise ParameterError(name, i, f"must be below the vocabulary size, {vocab_size}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            wanted = vocab_size if value == -1 else value
            if wanted is not None and max_logprobs != -1 and wanted > max_logprobs:
                raise ParameterError(name, value, f"must be at most max_logprobs, {max_logprobs}")

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report with each sampled one; None: report none."""
        return 0 if self.logprobs is None and self.logprob_token_ids else self.logprobs

    @classmethod
    def from_optional(cls, **given: Any) -> SamplingParams:
        """Construct from keyword arguments of which None means the default. Raises :class:`ParameterError`."""
        names = {field.name for field in fields(cls)}
        refuse({name: value for name, value in given.items() if name not in names})
        return cls(**{name: value for name, value in given.items() if name in names and value is not None})

    def clone(self, **changes: Any) -> SamplingParams:
        """Return a checked copy with ``changes`` applied."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        """Show the fields that differ from their defaults."""
        shown = (
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        )
        return f"SamplingParams({', '.join(shown)})"


def _within(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ParameterError(field, value, f"must be from {low} to {high}")


def _at_least(field: str, value: float, low: float) -> None:
    if not value >= low:
        raise ParameterError(field, value, f"must be at least {low}")


def _check_strings(name: str, strings: Sequence[str], most: int) -> None:
    """Raise :class:`ParameterError` for an empty string, more than ``most`` strings, or more than MAX_CHARACTERS in
    total."""
    if len(strings) > most:
        raise ParameterError(name, f"{len(strings)} strings", f"must be at most {most}")
    if not all(isinstance(each, str) and each for each in strings):
        raise ParameterError(name, strings, "must be non-empty strings")
    if (characters := sum(map(len, strings))) > MAX_CHARACTERS:
        raise ParameterError(name, f"{characters} characters", f"must be at most {MAX_CHARACTERS}")
