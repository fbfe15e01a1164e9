"""Servers for tests: ``vllmlite serve`` as a program of its own, and an application on an event loop of the test's."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from vllmlite import EngineConfig
from vllmlite.async_llm import AsyncLLM
from vllmlite.server.app import build_app
from vllmlite.server.config import ServerConfig
from vllmlite.server.metrics import Metrics
from vllmlite.server.run import KEEP_ALIVE_SECONDS
from vllmlite.server.service import Service

try:
    with socket.create_server(("127.0.0.1", 0)) as _listening:
        socket.create_connection(_listening.getsockname(), 5).close()
except OSError as error:  # in a build's sandbox without any network
    pytest.skip(f"no loopback interface: {error}", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
ENGINE = EngineConfig(dtype="float32", max_model_len=256, device="cpu", num_gpu_blocks_override=256)


class Program:
    """A running ``vllmlite serve``."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllmlite", "serve", "--port", "0", "--dtype", "float32", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(60) or self.process.poll() is not None:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"serving .* at (https?://\S+|unix:\S+), after ", line)
            if found:
                self.url = found.group(1)
                self._ready.set()
        self._ready.set()


@contextmanager
def program(*arguments: str, **environment: str) -> Iterator[Program]:
    """A server that is killed at the end if it still runs."""
    running = Program(*arguments, **environment)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def serving(engine_config: EngineConfig = ENGINE, **options: Any) -> Iterator[Service]:
    """A service on an engine of its own."""
    engine = AsyncLLM(engine_config)
    try:
        inner = engine.llm_engine
        metrics = Metrics("demo", inner.max_model_len, inner.stats)
        inner.observer = metrics.observe_step
        yield Service(engine, ServerConfig(**options), ["demo"], metrics)
    finally:
        engine.shutdown()


@asynccontextmanager
async def client_of(
    service: Service, keys: tuple[str, ...] = (), send_buffer: int | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of ``service``, through uvicorn and a socket, on this event loop."""
    config = uvicorn.Config(
        build_app(service, keys),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        task = asyncio.ensure_future(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.005)
            if task.done():
                task.result()
        port = listener.getsockname()[1]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits
        ) as client:
            yield client
        server.should_exit = True
        await task
