"""A replica on Ray: an engine and the server's application, which is called with complete requests."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator

from vllmlite.async_llm import AsyncLLM
from vllmlite.config.engine_config import EngineConfig
from vllmlite.ray_serve.http import HttpRequest, Message
from vllmlite.server.app import build_app
from vllmlite.server.config import ServerConfig
from vllmlite.server.service import start_service


class Replica:
    """Answers HTTP requests with an engine of its own, which ends with the replica's process."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:  # type: ignore[misc]
        """Start the engine. Ray awaits this coroutine."""
        self._service = start_service(AsyncLLM(engine, engine_process=server.engine_process), server)
        weakref.finalize(self, self._service.engine.shutdown)
        self._app = build_app(self._service, server.api_keys())
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def respond(self, request: HttpRequest) -> AsyncGenerator[list[Message], None]:
        """Yield the ASGI messages of the response, in lists of those that are available at the same time. The engine
        drops the request if this generator is closed or cancelled."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        first: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(request.scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            ended = False
            while not ended:
                pieces = [await messages.get()]
                while not messages.empty():
                    pieces.append(messages.get_nowait())
                ended = pieces[-1] is None
                if found := [piece for piece in pieces if piece is not None]:
                    yield found
            await task
        finally:
            gone.set()
            await asyncio.wait([task])

    def record_routing_stats(self) -> dict[str, int]:
        """Return the statistics that :class:`~vllmlite.ray_serve.router.PrefixRouter` needs; Ray Serve calls this."""
        stats = self._service.engine.llm_engine.stats()
        return {"cache_tokens": stats.num_blocks * stats.block_size}

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine has ended; Ray Serve calls this, and replaces the replica."""
        if (error := self._service.engine.dead_error) is not None:
            raise error
