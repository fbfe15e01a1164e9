"""A fake server for tests of its clients, whose answers the test chooses."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vllmlite.server.page import page_route


class FakeServer:
    """Serves the chat page, and chat completions of :attr:`pieces`, one token each; None waits for :meth:`go_on`."""

    def __init__(self) -> None:
        self.pieces: list[str | None] = []
        self.reasoning: str | None = None
        self.last_wait = 0.0
        """Seconds between the last piece and the end."""
        self.refusal: Response | None = None
        self.key: str | None = None
        self.metrics: dict[str, float] = {}
        """Counters of ``/metrics``."""
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()
        """Set if the client disconnects before the end of the answer."""
        self._go_on = threading.Semaphore(0)
        self._broken = False
        models = Route("/v1/models", self._models)
        chat = Route("/v1/chat/completions", self._chat, methods=["POST"])
        metrics = Route("/metrics", self._metrics)
        app = Starlette(routes=[page_route(), models, chat, metrics])
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def answers(self, *pieces: str | None) -> None:
        """Set the pieces of the next answers."""
        self.pieces = [*pieces]
        self.left.clear()
        self._broken = False

    def go_on(self) -> None:
        """Send the pieces up to the next None."""
        self._go_on.release()

    def break_off(self) -> None:
        """Break the connection at the next None, as a server that ends does."""
        self._broken = True
        self.go_on()

    def close(self) -> None:
        self._go_on.release(100)
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def _refused(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "this server needs an API key"}}, 401)
        return None

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"data": [{"id": "fake"}]})

    async def _metrics(self, request: Request) -> Response:
        lines = (f'{name}_total{{engine="0"}} {value}\n' for name, value in self.metrics.items())
        return self._refused(request) or Response("".join(lines), media_type="text/plain")

    async def _chat(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = await request.json()
        if self.refusal is not None:
            self.bodies.append(body)
            return self.refusal
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        done = False
        try:
            # A client that has seen its request here may leave at once: the response must have begun to notice that.
            self.bodies.append(body)
            for count, piece in enumerate(self.pieces):
                while piece is None and not self._go_on.acquire(blocking=False):
                    await asyncio.sleep(0.005)
                if piece is None and self._broken:
                    raise ConnectionAbortedError
                yield self._event(piece or "", count + 1, thought=None if count else self.reasoning)
                await asyncio.sleep(0.002)
            await asyncio.sleep(self.last_wait)
            yield self._event("", len(self.pieces), "stop") + b"data: [DONE]\n\n"
            done = True
        finally:
            if not done:
                self.left.set()

    @staticmethod
    def _event(text: str, count: int, finish: str | None = None, thought: str | None = None) -> bytes:
        choice = {
            "index": 0,
            "delta": {"content": text, "reasoning_content": thought},
            "finish_reason": finish,
        }
        chunk = {"choices": [choice], "usage": {"completion_tokens": count}}
        return f"data: {json.dumps(chunk)}\n\n".encode()
