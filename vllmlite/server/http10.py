"""HTTP/1.0 clients, such as nginx by default, which do not know chunked bodies.

uvicorn's fast parser sends streams in chunks to any client. Its other one, h11, ends the body of an HTTP/1.0 client
with the connection, so it gets the connections that begin with a request of that version."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def use_h11_for_http10(config: uvicorn.Config) -> None:
    """Have ``config``'s servers answer HTTP/1.0 through h11."""
    config.load()
    config.http_protocol_class = _choosing(config.http_protocol_class)


def _choosing(kind: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """A protocol that is ``kind``, unless the first request of a connection is one of HTTP/1.0."""

    class Choosing(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._made_with = config, server_state, app_state, _loop
            self._begun = False

        def data_received(self, data: bytes) -> None:
            """Choose by the first line."""
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
