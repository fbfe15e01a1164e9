"""An OpenAI-compatible server as the :class:`~vllmlite.cli.chat.Answerer` of a conversation."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable
from typing import Any

from vllmlite.errors import ParameterError, VllmliteError, not_installed
from vllmlite.server.parsers.parts import Content, Part, Reasoning

try:
    import httpx
except ModuleNotFoundError as error:
    raise VllmliteError(not_installed(str(error.name))) from None


class Server:
    """A model on a server."""

    def __init__(self, url: str, model: str | None, api_key: str | None, options: dict[str, Any]) -> None:
        """Use the server at ``url``. ``model`` None selects its first model; ``options`` are added to each request.
        Raises VllmliteError."""
        self._url = url.rstrip("/").removesuffix("/v1")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._options = options
        try:
            self._client = httpx.Client(
                base_url=self._url, headers=headers, timeout=httpx.Timeout(600, connect=10)
            )
        except httpx.InvalidURL as error:
            raise VllmliteError(f"{self._url}: {error}") from None
        try:
            self._model = model or self._first_model()
        except VllmliteError:
            self._client.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _first_model(self) -> str:
        try:
            answer = self._client.get("/v1/models")
            if answer.status_code != 200:
                raise VllmliteError(f"{self._url}: {error_text(answer)}")
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, OSError) as error:
            raise VllmliteError(f"{self._url}: {error}") from None
        except (ValueError, LookupError, TypeError):
            raise VllmliteError(f"{self._url}: the server lists no model: give --model") from None

    def answer(self, messages: list[dict[str, str]]) -> Generator[Part, None, None]:
        """Yield the parts of the answer as they arrive. Raises ParameterError if the server refuses the request."""
        body = {"model": self._model, "messages": messages, "stream": True, **self._options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ParameterError("url", self._url, error_text(answer))
                for line in _lines(answer.iter_bytes()):
                    if line.startswith(b"data:") and line[5:].lstrip().startswith(b"{"):
                        yield from self._parts(json.loads(line[5:]))
        except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError("url", self._url, f"{type(error).__name__}: {error}") from None

    def _parts(self, chunk: dict[str, Any]) -> Generator[Part, None, None]:
        if "error" in chunk:
            raise ParameterError("url", self._url, error_message(chunk["error"]))
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                yield Reasoning(thought)
            if text := delta.get("content"):
                yield Content(text)


def _lines(pieces: Iterable[bytes]) -> Generator[bytes, None, None]:
    """Split server-sent events into lines at line feeds only; httpx also splits at U+2028, which JSON may contain."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def error_text(answer: httpx.Response) -> str:
    """Return the status and message of an error response."""
    try:
        text = error_message(answer.json()["error"])
    except (ValueError, LookupError, TypeError):
        text = answer.text[:200]
    return f"{answer.status_code}: {text}"


def error_message(error: object) -> str:
    """Return the message in the ``error`` field of a response, which is an object (OpenAI) or a string."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
