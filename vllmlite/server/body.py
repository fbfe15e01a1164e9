"""Middleware that limits a request's body before it is parsed: its bytes, and the number of elements of its JSON.

``json.loads`` and pydantic keep the event loop busy, so that every stream waits, for a time that grows with the number
of objects, arrays, names and values rather than with the bytes. They are counted piece by piece as the body arrives.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllmlite.server.errors import ApiError
from vllmlite.server.middleware import error_response

MAX_DISCARDED = 64 << 20
"""Maximum bytes of a refused body that are read and discarded before the answer."""
MAX_NODES = 1 << 16
"""Maximum number of objects, arrays and field names in a body. 2,000 messages in parts and 300 tools of 20 parameters
have 50,000."""
MAX_VALUES = 1 << 20
"""Maximum number of commas in a body outside strings, such as those of a list of token ids."""


class Structure:
    """Counts objects, arrays, names and values of a JSON text that comes in pieces.

    The counts are exact up to the first place where the text is not JSON, which is where a parser stops too."""

    def __init__(self) -> None:
        self.nodes = 0
        """Number of objects, arrays and field names so far."""
        self.commas = 0
        self.is_utf8 = True
        """False if there is a NUL byte, which JSON text contains only in UTF-16 and UTF-32."""
        self._in_string = 0
        self._backslash = b""
        """The last byte of the pieces so far, if it escapes the next one."""

    def add(self, piece: bytes) -> None:
        """Count ``piece``."""
        self.is_utf8 = self.is_utf8 and b"\0" not in piece
        piece = (self._backslash + piece).replace(rb"\\", b"")
        self._backslash = b"\\" if piece.endswith(b"\\") else b""
        segments = piece.removesuffix(b"\\").replace(rb"\"", b"").split(b'"')
        outside = b"".join(segments[self._in_string :: 2])
        self._in_string ^= (len(segments) - 1) & 1
        self.nodes += outside.count(b"{") + outside.count(b"[") + outside.count(b":")
        self.commas += outside.count(b",")

    def fault(self) -> str | None:
        """Return the reason why the text is refused; None if it is accepted."""
        if not self.is_utf8:
            return "the body is not JSON in UTF-8: it has NUL bytes"
        if self.nodes > MAX_NODES:
            return f"the body has more than {MAX_NODES} objects, arrays and names of fields"
        if self.commas > MAX_VALUES:
            return f"the body has more than {MAX_VALUES} values"
        return None


class LimitBody:
    """Reads a request's whole body, up to its limits, before it is parsed."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        """Limit bodies to ``limit`` bytes."""
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or answer 413 or 400."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        encoding = headers.get("content-encoding", "identity")
        refusal = None if length.isdigit() and int(length) <= self._limit else self._too_long()
        if encoding.lower() != "identity":
            refusal = _refusal(f"content-encoding {encoding} is not supported: send the body unencoded")
        body, structure = bytearray(), Structure()
        discarded = 0
        more = refusal is None or "expect" not in headers  # who asks before sending a body is told at once
        while more and discarded <= MAX_DISCARDED:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            if refusal is None and len(body) + len(piece) > self._limit:
                refusal = self._too_long()
            if refusal is None:
                structure.add(piece)
                if (fault := structure.fault()) is not None:
                    refusal = _refusal(fault)
            if refusal is None:
                body += piece
            else:
                # A connection closed on a client that still writes may lose it the answer.
                discarded += len(piece)
                body.clear()
        if refusal is not None:
            await error_response(refusal, scope)(scope, receive, send)
            return
        first: MutableMapping[str, Any] | None = {
            "type": "http.request",
            "body": bytes(body),
            "more_body": False,
        }

        async def replay() -> Message:
            nonlocal first
            if first is None:
                return await receive()
            message, first = first, None
            return message

        await self._app(scope, replay, send)

    def _too_long(self) -> ApiError:
        return _refusal(
            f"the body is longer than {self._limit} bytes (--max-body-size)",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )


def _refusal(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> ApiError:
    """Return the error for a body that is not read completely. Its connection, on which the rest may still arrive, is
    closed."""
    return ApiError(status, message, headers={"connection": "close"})
