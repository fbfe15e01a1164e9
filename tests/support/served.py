"""Servers for tests: ``vllmlite serve`` as a program, and an application on the test's event loop."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import TypeAdapter

from vllmlite import EngineConfig
from vllmlite.async_llm import AsyncLLM, NewRequest
from vllmlite.outputs import CompletionOutput, RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.server.app import build_app
from vllmlite.server.config import ServerConfig
from vllmlite.server.http10 import use_h11_for_http10
from vllmlite.server.run import KEEP_ALIVE_SECONDS
from vllmlite.server.service import Service, start_service

try:
    with socket.create_server(("127.0.0.1", 0)) as _listening:
        socket.create_connection(_listening.getsockname(), 5).close()
except OSError as error:  # in a build's sandbox without any network
    pytest.skip(f"no loopback interface: {error}", allow_module_level=True)

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120
"""Seconds after which a test stops waiting: many times what anything takes on a busy machine."""
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Passed to httpx, which otherwise reads all certificates of the system, 50 ms for a client."""
ENGINE = EngineConfig(dtype="float32", max_model_len=256, device="cpu", num_gpu_blocks_override=256)


TAKES_APART: dict[str, Any] = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
}
"""Options of a server that takes reasoning and tool calls out of answers."""


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Program:
    """A running ``vllmlite serve``."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllmlite", "serve", "--port", "0", "--dtype", "float32", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(PATIENCE) or self.process.poll() is not None:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))

    def has_answered(self) -> bool:
        """Return whether the program has answered a request to completion."""
        metrics = httpx.get(f"{self.url}/metrics", verify=NO_CERTIFICATES).text
        return re.search(r"^vllm:request_success_total\{.*\} [1-9]", metrics, re.MULTILINE) is not None

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def close(self) -> None:
        """Kill the program if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            found = re.search(r"serving .* at (https?://\S+|unix:\S+), after ", line)
            if found:
                self.url = found.group(1)
                self._ready.set()
        self._ready.set()


@contextmanager
def program(*arguments: str, **environment: str) -> Iterator[Program]:
    """A server program that is killed when the context ends."""
    running = Program(*arguments, **environment)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def serving(engine_config: EngineConfig = ENGINE, **options: Any) -> Iterator[Service]:
    """A service on its own engine."""
    engine = AsyncLLM(engine_config)
    try:
        yield start_service(engine, ServerConfig(**{"served_model_name": ("demo",), **options}))
    finally:
        engine.shutdown()


_APPS: WeakKeyDictionary[Service, tuple[tuple[ServerConfig, tuple[str, ...], tuple[str, ...]], FastAPI]] = (
    WeakKeyDictionary()
)


def app_of(service: Service, keys: tuple[str, ...] = (), lora_keys: tuple[str, ...] = ()) -> FastAPI:
    """The application of ``service``, rebuilt only for another configuration, since FastAPI takes 0.2 s for it."""
    wanted = service.config, keys, lora_keys
    built, app = _APPS.get(service, (None, None))
    if app is None or built != wanted:
        app = build_app(service, keys, lora_keys)
        _APPS[service] = wanted, app
    return app


@asynccontextmanager
async def client_of(
    service: Service,
    keys: tuple[str, ...] = (),
    send_buffer: int | None = None,
    lora_keys: tuple[str, ...] = (),
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``service``, through uvicorn and a socket, on this event loop.

    The server is started and stopped as :meth:`uvicorn.Server.serve` does it, but without its sleeps of 0.1 s.
    """
    config = uvicorn.Config(
        app_of(service, keys, lora_keys),
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        lifespan="on",
    )
    use_h11_for_http10(config)
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        await server.startup([listener])
        assert server.started
        await server.on_tick(0)
        limits = httpx.Limits(max_connections=None)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(
            base_url=url, timeout=PATIENCE, limits=limits, verify=NO_CERTIFICATES
        ) as client:
            yield client
        for asyncio_server in server.servers:
            asyncio_server.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    async with asyncio.timeout(PATIENCE):
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.002)
    await server.lifespan.shutdown()


def ask(service: Service, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """Return the result of ``work``, called with a client of ``service``."""

    async def run() -> T:
        async with client_of(service) as client:
            return await work(client)

    return asyncio.run(run())


async def posted(client: httpx.AsyncClient, path: str, status: int = 200, /, **body: Any) -> Any:
    """The JSON body of the response to a request."""
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def streamed(client: httpx.AsyncClient, path: str, /, **body: Any) -> list[tuple[str, Any]]:
    """The server-sent events of the response to a request: (name, data); the name is empty if there is none."""
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        text = (await answer.aread()).decode()
        assert answer.status_code == 200, text
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, _, data = block.rpartition("data: ")
        name = name.removeprefix("event: ").rstrip("\n")
        found.append((name, data if data == "[DONE]" else json.loads(data)))
    return found


def post(service: Service, path: str, status: int = 200, /, **body: Any) -> Any:
    """:func:`posted`, with a new client."""
    return ask(service, lambda client: posted(client, path, status, **body))


def stream(service: Service, path: str, /, **body: Any) -> list[tuple[str, Any]]:
    """:func:`streamed`, with a new client."""
    return ask(service, lambda client: streamed(client, path, **body))


def check(kind: Any, value: Any) -> None:
    """Raise unless ``value`` has the documented structure."""
    TypeAdapter(kind).validate_python(value, strict=True)


class Script:
    """Engine outputs chosen by a test: every request is answered with ``pieces`` of text, one a step.

    It replaces ``service.engine.submit``, and stores the last request.
    """

    def __init__(self, *pieces: str, finish_reason: str = "stop", stop_reason: str | None = None) -> None:
        self.request: NewRequest | None = None
        self._pieces = pieces
        self._finish_reason = finish_reason
        self._stop_reason = stop_reason

    async def __call__(self, requests: Sequence[NewRequest]) -> Any:
        (self.request,) = requests
        prompt: Any = self.request.prompt
        texts = list(self._pieces)
        params = self.request.params
        assert isinstance(params, SamplingParams)
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            texts = ["".join(texts)]
        self._outputs = [
            RequestOutput(
                self.request.request_id,
                None,
                prompt["prompt_token_ids"],
                [CompletionOutput(0, text, [7], None, None, *self._end(number == len(texts)))],
                finished=number == len(texts),
            )
            for number, text in enumerate(texts, 1)
        ]
        return self

    def _end(self, last: bool) -> tuple[str | None, str | None]:
        return (self._finish_reason, self._stop_reason) if last else (None, None)

    async def take(self) -> list[RequestOutput]:
        return [self._outputs.pop(0)] if self._outputs else []

    def close(self) -> None:
        self._outputs = []
