"""What ``/openapi.json`` says of answers: every status that an endpoint can give, with its shape."""

from __future__ import annotations

from typing import Any

from vllmlite.server.protocol.base import ErrorAnswer
from vllmlite.server.sse import LINES, Stream

ERRORS = {
    400: "A field is wrong: `param` names it.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    405: "No such method here.",
    413: "The body is longer than the server takes.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A step failed, or the server has a bug.",
    501: "The model cannot do what is asked.",
    503: "The server is shutting down, or its engine is dead.",
}


def documented(
    answer: Any = None, *, streams: bool = False, lines: bool = False, error: Any = ErrorAnswer
) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses``: ``answer``, None for an empty one (also as server-sent events, or as lines of JSON),
    and every error, in the shape ``error``."""
    good: dict[str, Any] = {"description": "The answer."}
    if answer is not None:
        good["model"] = answer
    if streams or lines:
        good["content"] = {LINES if lines else Stream.media_type: {"schema": {}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": text} for status, text in ERRORS.items()
    }
    return {200: good, **errors}


CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorAnswer, "description": "A profile is being recorded already, or none is."}
}
