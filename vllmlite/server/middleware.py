"""Middleware before the endpoints: root path, request counting, API keys. Plain ASGI, without per-token cost."""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Collection, Sequence
from hashlib import sha256
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllmlite.server.apis import KEY_DIGEST, api_of, path_of
from vllmlite.server.errors import ApiError
from vllmlite.server.service import MAX_REQUEST_ID, Service
from vllmlite.server.sse import JSON

OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/ping", "/version", "/metrics"})
"""Paths that need no key."""


def error_response(error: ApiError, scope: Scope) -> JSON:
    """Return the answer for an error, in the form of the API of the request's path."""
    return JSON(error.body(api_of(path_of(scope))), status_code=error.status, headers=error.headers)


class RootPath:
    """Serves requests under the path at which a proxy serves this server, whether or not the proxy strips it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] in ("http", "websocket"):
            path, root = scope["path"], self._root_path
            whole = path if path == root or path.startswith(root + "/") else root + path
            scope = {**scope, "path": whole, "root_path": root}
        await self._app(scope, receive, send)


class Count:
    """Counts the requests that are being answered, and optionally adds X-Request-Id."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str], name_them: bool) -> None:
        """Count POST requests to ``paths``. ``name_them``: answer with the client's X-Request-Id, or a new one."""
        self._app = app
        self._service = service
        self._paths = paths
        self._name_them = name_them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = scope["method"] == "POST" and path_of(scope) in self._paths
        self._service.num_answering += counted
        try:
            await self._app(scope, receive, _with_id(scope, send) if self._name_them else send)
        finally:
            self._service.num_answering -= counted


def _with_id(scope: Scope, send: Send) -> Send:
    name = Headers(scope=scope).get("x-request-id", uuid.uuid4().hex)[:MAX_REQUEST_ID]

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", name.encode("latin-1"))]
        await send(message)

    return send_with_id


class RequireKey:
    """Requires an API key, as ``Authorization: Bearer`` or ``X-Api-Key``; compares in constant time."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        *,
        only: Collection[str] | None = None,
        excepted: Collection[str] = OPEN_PATHS,
    ) -> None:
        """Require one of ``keys`` for the paths in ``only`` (None: all paths), except those in ``excepted``."""
        self._app = app
        self._only, self._excepted = only, excepted
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or answer 401."""
        if scope["type"] != "http" or not self._applies(path_of(scope)):
            await self._app(scope, receive, send)
            return
        digest = self._known_digest(scope)
        if digest is not None:
            state = {**scope.get("state", {}), KEY_DIGEST: digest}
            await self._app({**scope, "state": state}, receive, send)
            return
        error = ApiError(
            HTTPStatus.UNAUTHORIZED,
            "this server needs an API key: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error, scope)(scope, receive, send)

    def _applies(self, path: str) -> bool:
        return path not in self._excepted and (self._only is None or path in self._only)

    def _known_digest(self, scope: Scope) -> bytes | None:
        """Return the digest of the request's key, or None if the key is missing or wrong."""
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        digest = sha256(key.strip().encode("latin-1")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return digest if found else None
