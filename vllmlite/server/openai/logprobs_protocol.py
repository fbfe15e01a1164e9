"""Shapes of log-probabilities."""

from __future__ import annotations

from typing_extensions import TypedDict


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
