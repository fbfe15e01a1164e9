"""Storage of responses in memory, limited in number and size; the oldest are dropped first."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.requests import HTTPConnection

from vllmlite.errors import ParameterError
from vllmlite.server.apis import KEY_DIGEST
from vllmlite.server.errors import ApiError
from vllmlite.server.responses.protocol import STATELESS, ResponseObject
from vllmlite.server.sse import to_json

MAX_BYTES = 64 << 20
"""Maximum size of all stored responses as JSON, in bytes."""


@dataclass(slots=True)
class StoredResponse:
    """A response with its input."""

    response: ResponseObject
    owner: bytes
    """The client that may read it; see :func:`owner_of`."""
    items: list[dict[str, Any]]
    """The input items, including those of the responses it continues."""
    own: int
    """Number of the request's own items, at the end of ``items``."""
    task: asyncio.Task[ResponseObject] | None = None
    """The task that generates the response, if it is in the background and unfinished."""
    size: int = 0

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Input and output items, with which a continuing request begins."""
        return [*self.items, *self.response["output"]]  # type: ignore[list-item]


class ResponseStore:
    """The stored responses by id."""

    def __init__(self, limit: int) -> None:
        """Store at most ``limit`` responses; 0 stores none."""
        self._limit = limit
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._bytes = 0

    def keeps(self, wanted: bool | None) -> bool:
        """Return whether a response is stored if its request has ``store`` = ``wanted``."""
        return self._limit > 0 and wanted is not False

    def find(self, owner: bytes, response_id: str, param: str = "response_id") -> StoredResponse:
        """Return a stored response of ``owner``. Raises :class:`ApiError` if there is none."""
        found = self._kept.get(response_id)
        if found is None or found.owner != owner:
            why = "it was never stored, or was dropped for newer ones" if self._limit else STATELESS
            raise ApiError(HTTPStatus.NOT_FOUND, f"no response {response_id!r}: {why}", param=param)
        return found

    def before(self, owner: bytes, response_id: str | None) -> list[dict[str, Any]]:
        """Return the conversation that a request of ``owner`` continues.

        Raises :class:`ApiError` or :class:`ParameterError`."""
        if response_id is None:
            return []
        if not self._limit:
            raise ParameterError(
                "previous_response_id", response_id, f"{STATELESS}, or use --max-stored-responses"
            )
        found = self.find(owner, response_id, "previous_response_id")
        if found.task is not None and found.response["status"] in ("queued", "in_progress"):
            raise ParameterError("previous_response_id", response_id, "has not finished")
        return found.conversation

    def keep(self, stored: StoredResponse) -> None:
        """Store a response or its new state; drop older ones to make room, except those being generated."""
        response_id = stored.response["id"]
        self._forget(response_id)
        stored.size = len(to_json(stored.response)) + len(to_json(stored.items))
        self._kept[response_id] = stored
        self._bytes += stored.size
        for other, entry in list(self._kept.items()):
            if len(self._kept) <= self._limit and self._bytes <= MAX_BYTES:
                return
            if entry.task is None and other != response_id:
                self._forget(other)

    def begin(self, stored: StoredResponse) -> None:
        """Store a background response before its generation. Raises :class:`ApiError` if too many are in progress."""
        running = sum(entry.task is not None for entry in self._kept.values())
        if running >= self._limit:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{running} responses are being generated in the background, the maximum",
                code="queue_full",
                headers={"retry-after": "10"},
            )
        self.keep(stored)

    def delete(self, owner: bytes, response_id: str) -> None:
        """Delete a response of ``owner`` and stop generating it. Raises :class:`ApiError`."""
        task = self.find(owner, response_id).task
        self._forget(response_id)
        if task is not None:
            task.cancel()

    def has(self, stored: StoredResponse) -> bool:
        """Return whether ``stored`` is still stored."""
        return self._kept.get(stored.response["id"]) is stored

    def _forget(self, response_id: str) -> None:
        if (entry := self._kept.pop(response_id, None)) is not None:
            self._bytes -= entry.size


def owner_of(request: HTTPConnection) -> bytes:
    """Return the identity whose responses a request may read: the digest of its API key, or b"" without keys."""
    owner: bytes = request.scope.get("state", {}).get(KEY_DIGEST, b"")
    return owner


def input_items(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a request's input as items with ids."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"type": "message", **item, "id": item.get("id") or f"msg_{uuid.uuid4().hex}"} for item in given]
