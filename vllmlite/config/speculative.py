"""Options of speculative decoding: vLLM's ``speculative_config``, and the options that stand for its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmlite.config.options import did_you_mean
from vllmlite.errors import ParameterError

FIELD = "speculative_config"
METHODS = ("ngram",)
ABSENT_METHODS = (
    "draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "mtp", "deepseek_mtp", "suffix", "ngram_gpu",
    "custom_class", "dflash",
)  # fmt: skip
"""vLLM's methods that are not supported."""
MOST_TOKENS = 32
"""Most drafts of a step."""
DEFAULT_TOKENS = 8
"""Drafts of a step unless their number is given, if they are accepted often enough."""
DEFAULT_LOOKUP = 5
"""Length of an n-gram unless it is given; the same as in vLLM."""
KEYS = (
    "method",
    "model",
    "num_speculative_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
    "disable_by_batch_size",
)
SHORTHANDS: Mapping[str, tuple[str, type]] = {
    "spec_method": ("method", str),
    "spec_model": ("model", str),
    "spec_tokens": ("num_speculative_tokens", int),
    "speculative_model": ("model", str),
    "num_speculative_tokens": ("num_speculative_tokens", int),
    "ngram_prompt_lookup_max": ("prompt_lookup_max", int),
    "ngram_prompt_lookup_min": ("prompt_lookup_min", int),
    "speculative_disable_by_batch_size": ("disable_by_batch_size", int),
}
"""Options that set one key of ``speculative_config`` → the key and its type."""
OLDER = frozenset(name for name in SHORTHANDS if not name.startswith("spec_"))
"""The options among these that newer versions of vLLM have removed."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "draft_tensor_parallel_size": (None, 1), "max_model_len": (None,), "quantization": (None,), "revision": (None,),
    "code_revision": (None,), "tensor_parallel_size": (None, 1), "draft_load_config": (None,),
    "enforce_eager": (None, False, True), "parallel_drafting": (None, False), "speculative_token_tree": (None,),
    "disable_padded_drafter_batch": (None, False, True), "rejection_sample_method": (None, "standard", "strict"),
    "draft_sample_method": (None, "greedy"), "acceptance_method": (None, "rejection_sampler"),
    "num_speculative_tokens_per_batch_size": (None,), "suffix_decoding_max_tree_depth": (None, 24),
    "suffix_decoding_max_cached_requests": (None, 10000), "suffix_decoding_max_spec_factor": (None, 1.0),
    "suffix_decoding_min_token_prob": (None, 0.1), "use_heterogeneous_vocab": (None, False),
    "synthetic_acceptance_rate": (None,), "attention_backend": (None,), "moe_backend": (None, "auto"),
}  # fmt: skip
"""vLLM's other keys, and the values of each that ask for nothing here."""


@dataclass(frozen=True, slots=True)
class Speculative:
    """Speculative decoding with n-gram drafts."""

    num_tokens: int
    """Most drafts of a step."""
    prompt_lookup_min: int
    prompt_lookup_max: int
    max_rows: int | None
    """Most running sequences with which drafts are made; None: any number."""


def with_shorthands(given: Mapping[str, Any], shorthands: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given``, a ``speculative_config``, with the keys that options of :data:`SHORTHANDS` set. Raises
    ParameterError where they contradict it."""
    options = dict(given)
    for name, value in shorthands.items():
        key, _ = SHORTHANDS[name]
        if value is not None:
            if options.get(key) not in (None, value):
                raise ParameterError(name, value, f"contradicts {key}={options[key]!r} of {FIELD}")
            options[key] = value
    return options


def speculative(options: Mapping[str, Any]) -> Speculative | None:
    """Return what ``options``, a ``speculative_config``, ask for; None: nothing. Raises ParameterError."""
    if all(value is None for value in options.values()):
        return None
    for key, value in options.items():
        if key not in (*KEYS, *NEUTRAL):
            raise ParameterError(
                f"{FIELD}.{key}", value, "unknown key" + did_you_mean(key, (*KEYS, *NEUTRAL))
            )
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise ParameterError(f"{FIELD}.{key}", value, "has no effect on n-gram drafts: leave it out")
    _check_method(options)
    tokens = _integer(options, "num_speculative_tokens", MOST_TOKENS)
    shortest = _integer(options, "prompt_lookup_min", 1024)
    longest = _integer(options, "prompt_lookup_max", 1024)
    shortest, longest = shortest or longest or DEFAULT_LOOKUP, longest or shortest or DEFAULT_LOOKUP
    if shortest > longest:
        raise ParameterError(
            f"{FIELD}.prompt_lookup_min", shortest, f"must be at most prompt_lookup_max, which is {longest}"
        )
    rows = _integer(options, "disable_by_batch_size", 65536)
    return Speculative(tokens or DEFAULT_TOKENS, shortest, longest, None if rows is None else rows - 1)


def _check_method(options: Mapping[str, Any]) -> None:
    """Refuse every method but n-grams, which vLLM also takes as the name of a model."""
    method, model = options.get("method"), options.get("model")
    supported = f"must be {' or '.join(METHODS)}; drafts of other methods are not supported in this version"
    if method is not None and method not in METHODS:
        if method not in ABSENT_METHODS:
            supported += did_you_mean(str(method), METHODS)
        raise ParameterError(f"{FIELD}.method", method, supported)
    if model is not None and model not in ("ngram", "[ngram]"):
        raise ParameterError(
            f"{FIELD}.model",
            model,
            "draft models are not supported in this version: use method=ngram, without model",
        )
    if method is None and model is None:
        raise ParameterError(f"{FIELD}.method", method, supported)


def _integer(options: Mapping[str, Any], key: str, most: int) -> int | None:
    value = options.get(key)
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise ParameterError(f"{FIELD}.{key}", value, f"must be an integer from 1 to {most}")
    return value
