"""Generation settings that come with a checkpoint: ids that end a text, default sampling parameters, marks of
reasoning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmlite.config.engine_config import REASONING_KEYS, EngineConfig
from vllmlite.engine.thinking import ReasoningMarks
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models.hf_config import HfConfig
from vllmlite.sampling_params import SamplingParams
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.json_object import read_object


def generation_config(config: EngineConfig, path: Path) -> dict[str, Any]:
    """Read the checkpoint's ``generation_config.json``, or the one that ``config`` names; empty if there is none."""
    if config.generation_config not in ("auto", "vllm"):
        return read_object(Path(config.generation_config) / "generation_config.json")
    return read_object(path / "generation_config.json", optional=True)


def eos_ids(generation: dict[str, Any], path: Path, tokenizer: Tokenizer | None) -> Sequence[int]:
    """Return every id that ends a text: those of the generation config, or else of the model's config, and that of the
    tokenizer."""
    listed = generation.get("eos_token_id")
    if listed is None:
        listed = HfConfig.read(path).text_value("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"{path}: eos_token_id={listed!r} must be a token id or a list of them")
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def default_params(config: EngineConfig, generation: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters of requests that do not give any."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    override = config.override_generation_config
    for name in override.keys() - {*names, "do_sample", "max_new_tokens"}:
        raise ParameterError(
            "override_generation_config", name, f"may hold {', '.join(names)}, do_sample and max_new_tokens"
        )
    if override.get("do_sample") is False and override.get("temperature"):
        raise ParameterError(
            "override_generation_config.temperature", override["temperature"], "contradicts do_sample: false"
        )
    generation = {} if config.generation_config == "vllm" else generation
    if generation.get("do_sample") is False and override.get("do_sample") is None:
        generation = {**generation, "temperature": 0.0}
    generation = {**generation, **override}
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if override.get("do_sample") is False:
        given["temperature"] = 0.0
    if generation.get("max_new_tokens") is not None:
        given["max_tokens"] = generation["max_new_tokens"]
    try:
        return SamplingParams(**given)
    except ParameterError as error:
        if error.field in override:
            raise ParameterError(
                f"override_generation_config.{error.field}", error.value, error.accepted
            ) from None
        raise ModelError(f"generation_config.json: {error}") from None


def reasoning_marks(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> ReasoningMarks | None:
    """Return the token ids of the marks in ``reasoning_config``; None without any. Raises :class:`ParameterError` if
    the tokenizer cannot encode them."""
    if not config:
        return None
    if tokenizer is None:
        raise ParameterError(
            "reasoning_config", dict(config), "needs a tokenizer: leave skip_tokenizer_init out"
        )
    opening, closing = (tuple(tokenizer.encode(config[name], False)) for name in REASONING_KEYS)
    if not opening or not closing:
        raise ParameterError("reasoning_config", dict(config), "must name marks that the tokenizer can write")
    return ReasoningMarks(opening, closing)
