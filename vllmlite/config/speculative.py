"""Options of speculative decoding: vLLM's ``speculative_config``, and the options that set single keys of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmlite.config.options import did_you_mean
from vllmlite.errors import ParameterError

FIELD = "speculative_config"
EAGLE = ("eagle", "eagle3")
MTP = "mtp"
WITH_STATES = (*EAGLE, MTP)
"""Methods that read hidden states of the prompt, and keep keys and values."""
LOOKUPS = ("ngram", "suffix")
"""Methods whose drafts come from texts, not from a checkpoint."""
METHODS = (*LOOKUPS, "draft_model", *EAGLE, MTP, "medusa")
ABSENT_METHODS = (
    "mlp_speculator", "ngram_gpu", "custom_class", "dflash", "dspark", "extract_hidden_states",
)  # fmt: skip
"""vLLM's methods that are not supported."""
PROBABILISTIC = "probabilistic"
"""The ``draft_sample_method`` by which drafts are drawn at random."""
BUILT_IN_DRAFTS = ("eagle3",)
"""Methods for which the built-in model has its own drafter, so that no model need be named."""
NGRAM_MODELS = ("ngram", "[ngram]")
"""Values of the key ``model`` that mean n-grams, as in vLLM."""
MOST_TOKENS = 32
"""Maximum number of drafts of a row in a step."""
DEFAULT_TOKENS = 8
"""Default maximum number of drafts of a row in a step, if they are accepted often enough."""
DEFAULT_LOOKUP = 5
"""Default length of an n-gram, the same as in vLLM."""
KEYS = (
    "method",
    "model",
    "num_speculative_tokens",
    "num_speculative_tokens_per_batch_size",
    "disable_by_batch_size",
)
"""Keys of every method."""
METHOD_KEYS: Mapping[str, tuple[str, ...]] = {
    "ngram": ("prompt_lookup_min", "prompt_lookup_max", "max_model_len"),
    "suffix": (
        "suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_requests", "suffix_decoding_max_spec_factor",
        "suffix_decoding_min_token_prob", "max_model_len",
    ),
    "draft_model": ("revision", "quantization", "kv_cache_dtype", "max_model_len", "draft_sample_method"),
    **dict.fromkeys(WITH_STATES, ("revision", "max_model_len", "draft_sample_method")),
    "medusa": ("revision",),
}  # fmt: skip
"""Further keys of each method."""
SHORTHANDS: Mapping[str, tuple[str, type]] = {
    "spec_method": ("method", str),
    "spec_model": ("model", str),
    "spec_tokens": ("num_speculative_tokens", int),
    "speculative_model": ("model", str),
    "num_speculative_tokens": ("num_speculative_tokens", int),
    "ngram_prompt_lookup_max": ("prompt_lookup_max", int),
    "ngram_prompt_lookup_min": ("prompt_lookup_min", int),
    "speculative_disable_by_batch_size": ("disable_by_batch_size", int),
    "speculative_max_model_len": ("max_model_len", int),
    "speculative_model_quantization": ("quantization", str),
}
"""Options that set one key of ``speculative_config`` → the key and its type."""
OLDER = frozenset(name for name in SHORTHANDS if not name.startswith("spec_"))
"""The options among these that newer versions of vLLM have removed."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "draft_tensor_parallel_size": (None, 1), "code_revision": (None,), "tensor_parallel_size": (None, 1),
    "draft_load_config": (None,), "enforce_eager": (None, False, True), "parallel_drafting": (None, False),
    "speculative_token_tree": (None,),
    "disable_padded_drafter_batch": (None, False, True), "rejection_sample_method": (None, "standard", "strict"),
    "draft_sample_method": (None, "greedy"), "acceptance_method": (None, "rejection_sampler"),
    "use_heterogeneous_vocab": (None, False),
    "synthetic_acceptance_rate": (None,), "synthetic_acceptance_rates": (None,), "synthetic_acceptance_length": (None,),
    "attention_backend": (None,), "moe_backend": (None, "auto"), "index_share_for_mtp_iteration": (None, False),
    "disable_eagle_block_drop": (None, False), "use_local_argmax_reduction": (None, False, True),
    "enable_adaptive_verification": (None, False), "dspark_draft_topk": (None,),
}  # fmt: skip
"""Other keys of vLLM, each with the values that have no effect."""


@dataclass(frozen=True, slots=True)
class DraftCheckpoint:
    """The checkpoint of a model that proposes drafts."""

    method: str
    """One of :data:`METHODS`, but not of :data:`LOOKUPS`."""
    model: str | None
    """Its name or path; None: the target model's own: layers of its checkpoint (``mtp``), or what comes with the
    built-in model (:data:`BUILT_IN_DRAFTS`)."""
    revision: str | None
    quantization: str | None
    """Method by which its float weights are quantised at load; None: they are not."""
    max_model_len: int | None
    """Sequences longer than this get no drafts; None: as long as the checkpoint allows."""
    kv_cache_dtype: str = "auto"
    """Dtype of a draft model's key/value cache; ``auto``: what the checkpoint is made for."""
    whole: bool = False
    """Whether each rank computes all of a draft model; otherwise it is divided among them."""


@dataclass(frozen=True, slots=True)
class SuffixOptions:
    """Options of suffix drafts, with vLLM's defaults except for ``earlier_outputs``."""

    depth: int = 24
    """Maximum number of ids of a matched context and its drafts together."""
    factor: float = 1.0
    """Number of drafts for each id of the matched context."""
    least_probability: float = 0.1
    """Minimum joint probability of a draft and those before it, estimated from counts."""
    earlier_outputs: int = 0
    """Number of outputs of earlier requests in which drafts are looked up."""


@dataclass(frozen=True, slots=True)
class Speculative:
    """Speculative decoding: how drafts are proposed, and how many."""

    num_tokens: int
    """Maximum number of drafts of a row in a step."""
    prompt_lookup_min: int
    prompt_lookup_max: int
    max_rows: int | None
    """Maximum number of running sequences with which drafts are made; None: any number."""
    draft: DraftCheckpoint | None = None
    """The checkpoint that proposes drafts; None: they are looked up in texts."""
    suffix: SuffixOptions | None = None
    """Options of suffix drafts; None: drafts come from n-grams or from a model."""
    by_rows: tuple[tuple[int, int, int], ...] = ()
    """Tuples of a minimum and a maximum number of running sequences, and the maximum number of drafts with these;
    outside of these ranges it is :attr:`num_tokens`."""
    probabilistic: bool = False
    """Whether drafts are drawn at random, and verified by rejection sampling."""
    max_len: int | None = None
    """Maximum length of sequences for which drafts are looked up, in tokens; None: any length."""

    @property
    def reads_states(self) -> bool:
        """Whether drafts are computed from the model's hidden states and its embedding table."""
        return self.draft is not None and self.draft.method in WITH_STATES


def with_shorthands(given: Mapping[str, Any], shorthands: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given``, a ``speculative_config``, with the keys that options of :data:`SHORTHANDS` set. Raises
    ParameterError if they contradict it."""
    options = dict(given)
    for name, value in shorthands.items():
        key, _ = SHORTHANDS[name]
        if value is not None:
            if options.get(key) not in (None, value):
                raise ParameterError(name, value, f"contradicts {key}={options[key]!r} of {FIELD}")
            options[key] = value
    return options


def speculative(options: Mapping[str, Any], ranks: int = 1, built_in: bool = False) -> Speculative | None:
    """Return the speculative decoding that ``options``, a ``speculative_config``, describe, for a model on ``ranks``
    ranks, which is the built-in one if ``built_in``; None if it is off. Raises ParameterError."""
    if all(value is None for value in options.values()):
        return None
    method = _method(options, built_in)
    used = (*KEYS, *METHOD_KEYS[method])
    for key, value in options.items():
        known = (*KEYS, *NEUTRAL, *(key for keys in METHOD_KEYS.values() for key in keys))
        if key not in known:
            raise ParameterError(f"{FIELD}.{key}", value, "unknown key" + did_you_mean(key, known))
        neutral = NEUTRAL.get(key, (None,))
        if key == "draft_tensor_parallel_size":
            neutral = (*neutral, ranks)
        supported = any(key in keys for keys in METHOD_KEYS.values())
        if key not in used and value not in neutral and not supported:
            names = " or ".join(dict.fromkeys(str(each) for each in neutral if each is not None))
            raise ParameterError(
                f"{FIELD}.{key}", value, f"must be {names}" if names else "is not supported: leave it out"
            )
        if key not in used and value not in neutral:
            raise ParameterError(f"{FIELD}.{key}", value, f"has no effect on {method} drafts: leave it out")
    tokens = _integer(options, "num_speculative_tokens", MOST_TOKENS)
    shortest = _integer(options, "prompt_lookup_min", 1024)
    longest = _integer(options, "prompt_lookup_max", 1024)
    shortest, longest = shortest or longest or DEFAULT_LOOKUP, longest or shortest or DEFAULT_LOOKUP
    if shortest > longest:
        raise ParameterError(
            f"{FIELD}.prompt_lookup_min", shortest, f"must be at most prompt_lookup_max, which is {longest}"
        )
    rows = _integer(options, "disable_by_batch_size", 65536)
    return Speculative(
        tokens or DEFAULT_TOKENS,
        shortest,
        longest,
        None if rows is None else rows - 1,
        None if method in LOOKUPS else _draft_checkpoint(method, options),
        _suffix_options(options) if method == "suffix" else None,
        _by_rows(options, tokens or DEFAULT_TOKENS),
        _probabilistic(options),
        _integer(options, "max_model_len", 2**31 - 1) if method in LOOKUPS else None,
    )


def _method(options: Mapping[str, Any], built_in: bool) -> str:
    """Return the method. If only a model is given, the method follows from the model's name, as in vLLM."""
    method, model = options.get("method"), options.get("model")
    if isinstance(method, str) and method.endswith("_mtp"):
        method = MTP  # vLLM has a name for each family, such as qwen3_next_mtp
    supported = f"must be {' or '.join(METHODS)}; drafts of other methods are not supported in this version"
    if method is None and model is not None:
        named = (name for name in ("eagle3", "eagle", "medusa") if name in str(model).lower())
        method = "ngram" if model in NGRAM_MODELS else next(named, "draft_model")
    if method not in METHODS:
        if method is not None and method not in ABSENT_METHODS:
            supported += did_you_mean(str(method), METHODS)
        raise ParameterError(f"{FIELD}.method", method, supported)
    if method in LOOKUPS:
        if model is not None and (method != "ngram" or model not in NGRAM_MODELS):
            raise ParameterError(f"{FIELD}.model", model, f"has no effect on {method} drafts: leave it out")
    elif model is None and built_in and method in BUILT_IN_DRAFTS:
        if options.get("revision") is not None:
            raise ParameterError(
                f"{FIELD}.revision", options["revision"], "has no effect on the built-in drafter"
            )
    elif not (isinstance(model, str) and model) and (method != MTP or model is not None):
        raise ParameterError(
            f"{FIELD}.model",
            model,
            f"method {method} needs a checkpoint for the model's vocabulary: a name or path",
        )
    return str(method)


def _draft_checkpoint(method: str, options: Mapping[str, Any]) -> DraftCheckpoint:
    """Return the checkpoint that ``options`` name. Raises ParameterError."""
    for key in ("revision", "quantization", "kv_cache_dtype"):
        if not isinstance(options.get(key), str | None):
            raise ParameterError(f"{FIELD}.{key}", options[key], "must be a string")
    longest = _integer(options, "max_model_len", 2**31 - 1)
    return DraftCheckpoint(
        method,
        options.get("model"),
        options.get("revision"),
        options.get("quantization"),
        longest,
        options.get("kv_cache_dtype") or "auto",
        options.get("draft_tensor_parallel_size") == 1,
    )


def _probabilistic(options: Mapping[str, Any]) -> bool:
    """Return whether drafts are drawn at random. Raises ParameterError."""
    key = "draft_sample_method"
    value = options.get(key)
    if value not in (None, "greedy", PROBABILISTIC):
        raise ParameterError(f"{FIELD}.{key}", value, f"must be greedy or {PROBABILISTIC}")
    return bool(value == PROBABILISTIC)


def _suffix_options(options: Mapping[str, Any]) -> SuffixOptions:
    """Return the options of suffix drafts. Raises ParameterError."""
    given: dict[str, Any] = {
        "depth": _integer(options, "suffix_decoding_max_tree_depth", 1024, least=2),
        "factor": _number(options, "suffix_decoding_max_spec_factor", 1e6),
        "least_probability": _number(options, "suffix_decoding_min_token_prob", 1.0),
        "earlier_outputs": _integer(options, "suffix_decoding_max_cached_requests", 2**31 - 1, least=0),
    }
    return SuffixOptions(**{name: value for name, value in given.items() if value is not None})


def _by_rows(options: Mapping[str, Any], most: int) -> tuple[tuple[int, int, int], ...]:
    """Return the maximum numbers of drafts by numbers of running sequences (:attr:`Speculative.by_rows`). Raises
    ParameterError."""
    key = "num_speculative_tokens_per_batch_size"
    entries = options.get(key)
    if entries is None:
        return ()
    numbers = isinstance(entries, list | tuple) and all(
        isinstance(entry, list | tuple) and len(entry) == 3 and all(type(value) is int for value in entry)
        for entry in entries
    )
    if not numbers or any(not 1 <= first <= last or not 0 <= count <= most for first, last, count in entries):
        raise ParameterError(
            f"{FIELD}.{key}",
            entries,
            f"must be a list of [least sequences, most sequences, drafts from 0 to {most}], such as [[1, 8, {most}]]",
        )
    ends = [last for _, last, _ in entries]
    for (first, _, _), before in zip(entries[1:], ends, strict=False):
        if first <= before:
            raise ParameterError(f"{FIELD}.{key}", entries, "ranges must ascend and not overlap")
    return tuple((first, last, count) for first, last, count in entries)


def _number(options: Mapping[str, Any], key: str, most: float) -> float | None:
    value = options.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ParameterError(f"{FIELD}.{key}", value, f"must be a number from 0 to {most:g}")
    return float(value)


def _integer(options: Mapping[str, Any], key: str, most: int, least: int = 1) -> int | None:
    value = options.get(key)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise ParameterError(f"{FIELD}.{key}", value, f"must be an integer from {least} to {most}")
    return value
