"""The outputs of an engine's steps."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.engine.beams import Hypothesis
from vllmlite.engine.request import Request
from vllmlite.engine.runner_protocol import TokenLogprobs
from vllmlite.outputs import RequestMetrics


@dataclass(slots=True)
class EngineOutput:
    """The output of one step for one request. An output with a ``finish_reason`` is the request's last."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    num_cached_tokens: int
    metrics: RequestMetrics
    logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of ``new_token_ids``."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of all prompt tokens but the first; set in a single output, once all of them are known."""
    ends_in_text: bool = False
    """Whether the last token is part of the text although ``finish_reason`` is ``stop``: it completed a grammar."""
    pooled: list[float] | None = None
    """The vector of a pooling request, which gets no tokens."""
    beams: list[Hypothesis] | None = None
    """The outputs that beam search found, the best first. Such a request gets no ``new_token_ids``."""
    error: str | None = None
    """The message of the error, if ``finish_reason`` is ``error``."""


def error_output(request: Request, reason: str) -> EngineOutput:
    """Return the last output of a request that ends with an error, of which ``reason`` is the message."""
    cached = request.num_cached_tokens or 0
    return EngineOutput(request.request_id, [], "error", None, cached, request.metrics, error=reason)
