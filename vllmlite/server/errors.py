"""Error answers: a status code, and a JSON object in the form of the API that was called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from vllmlite.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineSleepingError,
    ParameterError,
    VllmliteError,
)
from vllmlite.server.apis import Api

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    **OPENAI_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
LLAMACPP_TYPES = {
    **OPENAI_TYPES,
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
"""Error types by status, for each API; other 4xx statuses are invalid_request_error."""


class ApiError(Exception):
    """An error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
        overflow: ContextLengthError | None = None,
    ) -> None:
        """Create an error answer with HTTP ``status``. ``param`` names the invalid field; ``code`` is OpenAI's code, if
        any; ``details`` are Anthropic's. ``overflow`` is the cause if the prompt is too long; each API has its own
        message for that."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.details = details
        self.overflow = overflow

    @property
    def type(self) -> str:
        """OpenAI's error type."""
        return self._type(OPENAI_TYPES, "server_error")

    def body(self, api: Api = Api.OPENAI) -> dict[str, Any]:
        """Return the JSON body in the form of ``api``."""
        match api:
            case Api.OPENAI:
                return self._openai()
            case Api.ANTHROPIC:
                return self._anthropic()
            case Api.LLAMACPP:
                return self._llamacpp()

    def _openai(self) -> dict[str, Any]:
        """Return OpenAI's form.

        Clients recognise a prompt that is too long by vLLM's sentence about the maximum context length, or by the code,
        which langchain-openai looks for in the text."""
        message = self.message
        if self.overflow is not None:
            message = (
                f"This model's maximum context length is {self.overflow.max_model_len} tokens. However, your request "
                f"has {_count(self.overflow)} input tokens, and at most {self.overflow.max_prompt_tokens} fit. "
                f"Please shorten {self.param} ({self.code})."
            )
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def _anthropic(self) -> dict[str, Any]:
        message = self.message
        if self.overflow is not None:
            count, most = _count(self.overflow), self.overflow.max_prompt_tokens
            message = f"prompt is too long: {count} tokens > {most} maximum"
        error = {"type": self._type(ANTHROPIC_TYPES, "api_error"), "message": message}
        if self.details is not None:
            error["details"] = self.details  # type: ignore[assignment]
        return {"type": "error", "error": error}

    def _llamacpp(self) -> dict[str, Any]:
        """Return llama-server's form with the additional field ``param``."""
        error: dict[str, Any] = {
            "code": int(self.status),
            "message": self.message,
            "type": self._type(LLAMACPP_TYPES, "server_error"),
            "param": self.param,
        }
        if self.overflow is not None:
            count, limit = _count(self.overflow), self.overflow.max_model_len
            error |= {
                "message": f"request ({count} tokens) exceeds the available context size ({limit} tokens): "
                f"shorten {self.param}, or serve with a larger --max-model-len",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": self.overflow.num_tokens,
                "n_ctx": limit,
            }
        return {"error": error}

    def _type(self, types: Mapping[int, str], server: str) -> str:
        return types.get(self.status, "invalid_request_error" if self.status < 500 else server)


def _count(overflow: ContextLengthError) -> str:
    """Return the prompt's token count as text; it is a lower bound if the text was too long to tokenise."""
    return f"{'' if overflow.exact else 'at least '}{overflow.num_tokens}"


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Rename fields in a :class:`ParameterError` from the engine's names to the API's."""
    try:
        yield
    except ParameterError as error:
        raise error.renamed(names.get(error.field, error.field)) from None


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to an exception; internal errors reveal no details to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(
            HTTPStatus.BAD_REQUEST,
            str(error),
            param=error.field,
            code="context_length_exceeded",
            overflow=error,
        )
    if isinstance(error, ParameterError):
        return ApiError(HTTPStatus.BAD_REQUEST, str(error), param=error.field)
    if isinstance(error, RecursionError):
        return ApiError(HTTPStatus.BAD_REQUEST, "the body is nested too deeply")
    if isinstance(error, EngineSleepingError):
        return ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE, str(error), code="engine_sleeping", headers={"retry-after": "5"}
        )
    if isinstance(error, EngineDeadError):
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
    if isinstance(error, VllmliteError):
        return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the server's log")
