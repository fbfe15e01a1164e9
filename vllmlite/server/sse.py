"""Answers as JSON or as streams, and detection of clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllmlite.server.apis import Api
from vllmlite.server.errors import as_api_error

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection."""


def to_json(value: Any) -> bytes:
    """Return ``value`` as compact UTF-8 JSON; lone surrogates become question marks."""
    try:
        return pydantic_core.to_json(value, inf_nan_mode="null")
    except pydantic_core.PydanticSerializationError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """Return a server-sent event with ``value`` as JSON data."""
    return b"data: " + to_json(value) + b"\n\n"


def named_event(value: Any) -> bytes:
    """Return a server-sent event named after the ``type`` in ``value``."""
    return b"event: %b\n%b" % (value["type"].encode(), event(value))


class Chunks:
    """Encodes events that differ in their single choice only; the rest is encoded once."""

    def __init__(self, frame: Mapping[str, Any]) -> None:
        """Encode events like ``frame``, whose ``choices`` are empty."""
        # Inside a JSON string, the quotation marks would be escaped, so the pattern only matches the field.
        self._head, empty, self._tail = event(frame).partition(b'"choices":[]')
        self._head, self._tail = self._head + empty[:-1], empty[-1:] + self._tail

    def event(self, choice: Any) -> bytes:
        """Return the event with ``choice``."""
        return self._head + to_json(choice) + self._tail


EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
"""Media type of a stream of JSON lines."""
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients ignore."""


def error_event(error: Exception) -> bytes:
    """Return the last events of a stream that failed."""
    return event(as_api_error(error).body()) + DONE


def llamacpp_error_event(error: Exception) -> bytes:
    """Return the last event of a failed stream of llama.cpp's API, which has no end marker."""
    return event(as_api_error(error).body(Api.LLAMACPP))


def error_line(error: Exception) -> bytes:
    """Return the last line of a failed stream of JSON lines."""
    return to_json(as_api_error(error).body()) + b"\n"


class JSON(Response):
    """An answer as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return to_json(content)


class Stream(Response):
    """An answer sent piece by piece; ``pieces`` is closed when the client disconnects."""

    media_type = EVENTS

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        media_type: str | None = None,
        error_event: Callable[[Exception], bytes] = error_event,
    ) -> None:
        """Send ``pieces`` one by one. ``close`` is always called at the end. An exception in ``pieces`` is sent as an
        ``error_event``."""
        super().__init__(
            media_type=media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._pieces = pieces
        self._close = close
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces, and keep-alive comments between them if configured."""
        interval: float = scope["app"].state.service.config.sse_keep_alive_interval
        pieces = self._pieces
        if interval and self.media_type == EVENTS:
            pieces = _kept_alive(pieces, interval)
        try:
            await unless_gone(receive, self._send(send, pieces))
        except ClientGone:
            return
        finally:
            self._close()

    async def _send(self, send: Send, pieces: AsyncGenerator[bytes, None]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            if as_api_error(error).status == 500:
                logger.exception("a stream ends with an error")
            await send({"type": "http.response.body", "body": self._error_event(error), "more_body": True})
        finally:
            await pieces.aclose()
            await self._pieces.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _kept_alive(pieces: AsyncGenerator[bytes, None], interval: float) -> AsyncGenerator[bytes, None]:
    """Yield ``pieces``, and a comment whenever ``interval`` seconds pass without one."""
    while True:
        task = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait((task,), timeout=interval))[0]:
                yield KEEP_ALIVE
            piece = task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if piece is None:
            return
        yield piece


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; if the client disconnects first, cancel it and raise :class:`ClientGone`."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
