"""Support of HTTP/1.0 clients (nginx by default), which do not know chunked bodies.

uvicorn's fast parser sends streams in chunks to every client. Its other parser, h11, ends the body for HTTP/1.0 clients
by closing the connection, so connections that begin with an HTTP/1.0 request are handed to it."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def use_h11_for_http10(config: uvicorn.Config) -> None:
    """Make ``config``'s servers answer HTTP/1.0 requests through h11."""
    config.load()
    config.http_protocol_class = _with_http10(config.http_protocol_class)


def _with_http10(kind: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Return a subclass of ``kind`` that hands connections beginning with HTTP/1.0 to h11."""

    class Choosing(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._made_with = config, server_state, app_state, _loop
            self._begun = False

        def data_received(self, data: bytes) -> None:
            """Choose the parser by the first request line."""
            if not self._begun:
                self._begun = True
                if data.partition(b"\r\n")[0].endswith(b" HTTP/1.0"):
                    self._hand_over(data)
                    return
            super().data_received(data)

        def _hand_over(self, data: bytes) -> None:
            _, server_state, _, _ = self._made_with
            server_state.connections.discard(self)
            other = H11Protocol(*self._made_with)
            self.transport.set_protocol(other)
            other.connection_made(self.transport)
            other.data_received(data)

    return Choosing
