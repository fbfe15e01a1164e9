"""The ingress on Ray: it receives complete HTTP requests, sends each to a replica, and passes the answer on to the
client.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Receive, Scope, Send

from vllmlite.ray_serve.http import make_request

ATTEMPTS = 2
"""Maximum number of times that a request is sent, if its replica dies before it begins to answer."""


class Ingress:
    """An ASGI application that forwards requests to the deployment of replicas, whose router reads their prompts."""

    def __init__(self, replicas: Any, death: type[Exception], max_body_size: int) -> None:
        """Forward requests to ``replicas``, the deployment's handle for streams, which raises ``death`` if a replica
        dies."""
        self._replicas = replicas
        self._death = death
        self._max_body_size = max_body_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = bytearray(), True
        while more and len(body) <= self._max_body_size:  # the replica refuses what is longer
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request = make_request(scope, bytes(body))
        for attempt in range(1, ATTEMPTS + 1):
            has_begun = False
            answer = self._replicas.respond.remote(request)
            try:
                async for messages in answer:
                    has_begun = True
                    for message in messages:
                        await send(message)
                return
            except self._death:
                if has_begun or attempt == ATTEMPTS:
                    raise
            finally:
                answer.cancel()
