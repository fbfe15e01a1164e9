"""The ingress on Ray: takes in HTTP requests whole, has a replica answer each, and passes its answer on."""

from __future__ import annotations

from typing import Any

from starlette.types import Receive, Scope, Send

from vllmlite.ray_serve.http import make_request


class Ingress:
    """An ASGI application that forwards requests to the deployment of replicas, whose router reads their prompts."""

    def __init__(self, replicas: Any, max_body_size: int) -> None:
        """``replicas`` is the deployment's handle, for streams."""
        self._replicas = replicas
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
        answer = self._replicas.respond.remote(make_request(scope, bytes(body)))
        try:
            async for messages in answer:
                for message in messages:
                    await send(message)
        finally:
            answer.cancel()
