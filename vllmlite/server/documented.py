"""What ``/openapi.json`` says of answers: every status that an endpoint can give, with its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllmlite.server.protocol.base import ErrorAnswer

ERRORS = {
    400: "A field is wrong: `param` names it.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    405: "No such method here.",
    413: "The body is longer than the server takes.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A step failed, or the server has a bug.",
    503: "The server is shutting down, or its engine is dead.",
}


def documented(
    answer: Any = None, *, streams: bool = False, error: Any = ErrorAnswer, also: Sequence[int] = ()
) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses``: ``answer``, None for an empty one (also as server-sent events), and every error that all
    endpoints have or this one has ``also``."""
    good: dict[str, Any] = {"description": "The answer."}
    if answer is not None:
        good["model"] = answer
    if streams:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": text}
        for status, text in {**ERRORS, **{status: OTHERS[status] for status in also}}.items()
    }
    return {200: good, **errors}


OTHERS = {501: "The model cannot do that."}

CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorAnswer, "description": "A profile is being recorded already, or none is."}
}
