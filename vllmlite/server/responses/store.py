"""Storage of responses in memory, bounded in number and size for each API key, and in size for all of them."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.requests import HTTPConnection

from vllmlite.errors import ParameterError
from vllmlite.server.apis import KEY_DIGEST
from vllmlite.server.errors import ApiError
from vllmlite.server.responses.protocol import STATELESS, ResponseObject
from vllmlite.server.sse import to_json

MAX_BYTES_PER_KEY = 64 << 20
MAX_BYTES = 256 << 20
"""Maximum bytes of the stored responses, as JSON, of one API key and of all keys."""


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


@dataclass(slots=True)
class _Shelf:
    """The stored responses of one API key by id, the oldest first."""

    entries: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    size: int = 0
    """Total bytes of the entries."""

    def forget(self, response_id: str) -> None:
        if (entry := self.entries.pop(response_id, None)) is not None:
            self.size -= entry.size

    def forget_oldest(self, but: StoredResponse) -> bool:
        """Forget the oldest finished response that is not ``but``; return whether there was one."""
        for response_id, entry in self.entries.items():
            if entry.task is None and entry is not but:
                self.forget(response_id)
                return True
        return False


class ResponseStore:
    """Stored responses by API key and id.

    If a key exceeds its limits, its oldest responses are dropped. If all keys together exceed the limit, the oldest
    responses of the key with the most are dropped, so that a key within its equal share loses nothing because of
    others."""

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` responses for each API key; 0 keeps none."""
        self._limit = limit
        self._shelves: dict[bytes, _Shelf] = {}

    def keeps(self, wanted: bool | None) -> bool:
        """Return whether a response is stored if its request has ``store`` = ``wanted``."""
        return self._limit > 0 and wanted is not False

    def find(self, owner: bytes, response_id: str, param: str = "response_id") -> StoredResponse:
        """Return a response of ``owner``. Raises :class:`ApiError` if there is none, or it is no longer stored."""
        found = self._shelf(owner).entries.get(response_id)
        if found is None:
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
        """Store a response, or its new state. Older finished responses are dropped to make room."""
        response_id = stored.response["id"]
        shelf = self._shelf(stored.owner)
        shelf.forget(response_id)
        stored.size = len(to_json(stored.response)) + len(to_json(stored.items))
        shelf.entries[response_id] = stored
        shelf.size += stored.size
        while len(shelf.entries) > self._limit or shelf.size > MAX_BYTES_PER_KEY:
            if not shelf.forget_oldest(stored):
                break
        while sum(each.size for each in self._shelves.values()) > MAX_BYTES:
            largest = max(self._shelves.values(), key=lambda each: each.size)
            if not largest.forget_oldest(stored):
                break

    def begin(self, stored: StoredResponse) -> None:
        """Store a response that is to be generated in the background. Raises :class:`ApiError` if the key already has
        as many unfinished ones as it may store."""
        running = sum(entry.task is not None for entry in self._shelf(stored.owner).entries.values())
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
        self._shelf(owner).forget(response_id)
        if task is not None:
            task.cancel()

    def has(self, stored: StoredResponse) -> bool:
        """Return whether ``stored`` is still kept."""
        return self._shelf(stored.owner).entries.get(stored.response["id"]) is stored

    def _shelf(self, owner: bytes) -> _Shelf:
        return self._shelves.setdefault(owner, _Shelf())


def owner_of(request: HTTPConnection) -> bytes:
    """Return the identity whose responses a request may read: the digest of its API key, or b"" without keys."""
    owner: bytes = request.scope.get("state", {}).get(KEY_DIGEST, b"")
    return owner


def input_items(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a request's input as items with ids."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"type": "message", **item, "id": item.get("id") or f"msg_{uuid.uuid4().hex}"} for item in given]
