"""The answers of each endpoint for ``/openapi.json``: every status with its schema."""

from __future__ import annotations

from typing import Any

from vllmlite.server.protocol.base import ErrorAnswer
from vllmlite.server.sse import LINES, Stream

ERRORS = {
    400: "A field is invalid; `param` names it.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    405: "The path does not support this method.",
    413: "The body exceeds the server's limit.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "A step failed, or the server has a bug.",
    501: "The model does not support the request.",
    503: "The server is shutting down, or its engine sleeps or has failed.",
}


def documented(
    answer: Any = None, *, streams: bool = False, lines: bool = False, error: Any = ErrorAnswer
) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's ``responses``: the schema of the answer and of every error.

    ``answer`` None means an empty body; ``streams``: also as server-sent events; ``lines``: also as JSON lines."""
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
    409: {"model": ErrorAnswer, "description": "A profile is already being recorded, or none is."}
}
