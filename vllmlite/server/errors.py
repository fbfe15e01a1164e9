"""What goes wrong, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` and a status code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from vllmlite.errors import EngineDeadError, ParameterError, VllmliteError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""OpenAI's error type of a status; other 4xx are invalid_request_error, 5xx are server_error."""

ANTHROPIC = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """``param`` names the field that is wrong, ``code`` the kind of error where OpenAI has a name for it,
        ``details`` what Anthropic's clients go by."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.details = details

    @property
    def type(self) -> str:
        """OpenAI's name for the class of errors."""
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON object to answer with: OpenAI's, or Anthropic's at Anthropic's ``path``."""
        if path.startswith(ANTHROPIC):
            kind = ANTHROPIC_TYPES.get(
                self.status, "invalid_request_error" if self.status < 500 else "api_error"
            )
            more = {} if self.details is None else {"details": self.details}
            return {"type": "error", "error": {"type": kind, "message": self.message, **more}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Name fields in a :class:`ParameterError` as the request has them: ours to an API's."""
    try:
        yield
    except ParameterError as error:
        raise ParameterError(names.get(error.field, error.field), error.value, error.accepted) from None


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception; one that is a bug tells the client nothing of its inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ParameterError):
        return ApiError(HTTPStatus.BAD_REQUEST, str(error), param=error.field)
    if isinstance(error, RecursionError):
        return ApiError(HTTPStatus.BAD_REQUEST, "the body is nested too deeply")
    if isinstance(error, EngineDeadError):
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
    if isinstance(error, VllmliteError):
        return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log tells more")
