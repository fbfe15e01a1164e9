"""Normalisation of prompts and arguments in vLLM's forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, NotRequired, TypedDict

from vllmlite.errors import ParameterError


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str | None]


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str | None]
    cache_salt: NotRequired[str | None]


PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
REASONS = {
    "multi_modal_data": "only text is supported: leave it out or None",
    "multi_modal_uuids": "only text is supported: leave it out or None",
    "mm_processor_kwargs": "only text is supported: leave it out or None",
    "prompt_embeds": "only text and token ids are supported: leave it out or None",
    "truncate_prompt_tokens": "is a field of SamplingParams and PoolingParams",
}
"""Argument of vLLM that is not supported → the reason."""


def refuse(arguments: Mapping[str, Any]) -> None:
    """Raise :class:`ParameterError` if an unsupported argument of vLLM is set; None, False and {} are unset."""
    for name, value in arguments.items():
        if value is not None and value is not False and not (isinstance(value, Mapping) and not value):
            raise ParameterError(name, value, REASONS.get(name, "is not supported: leave it out or None"))


def token_ids(value: Any) -> list[int]:
    """Return token ids from a sequence, a numpy array or a torch tensor. Raises :class:`ParameterError`."""
    ids = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes, Mapping)):
        ids = list(ids)
        if set(map(type, ids)) <= {int}:
            return ids
        if all(_is_id(i) for i in ids):
            return [int(i) for i in ids]
    raise ParameterError("prompt_token_ids", value, "must be a list of integers")


def as_batch(prompts: Any) -> list[Any]:
    """Return a list of prompts from one prompt or any iterable of prompts. Raises :class:`ParameterError`."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    entries = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(entries, Iterable) or isinstance(entries, bytes):
        raise ParameterError(
            "prompts", prompts, "must be a text, token ids, a mapping of either, or a list of these"
        )
    batch = list(entries)
    return [batch] if batch and all(_is_id(entry) for entry in batch) else batch


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
