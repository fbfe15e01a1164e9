"""``/start_profile`` and ``/stop_profile``: Chrome traces of the engine's steps."""

from __future__ import annotations

import time
from http import HTTPStatus
from pathlib import Path

from vllmlite.async_llm import AsyncLLM
from vllmlite.engine.trace import Trace, attach, detach
from vllmlite.server.errors import ApiError


class Profiler:
    """Writes traces into one directory."""

    def __init__(self, engine: AsyncLLM, directory: Path) -> None:
        """``directory`` is made when the first trace is written."""
        self._engine = engine
        self._directory = directory

    async def start(self) -> None:
        """Begin. Raises ApiError if that has been done."""
        if self._engine.trace is not None:
            raise ApiError(HTTPStatus.CONFLICT, "a profile is being recorded")
        trace = self._engine.trace = Trace()
        await self._engine.call(lambda: attach(self._engine.llm_engine.engine, trace))

    async def stop(self) -> Path:
        """End, and write the trace; its file. Raises ApiError if nothing is being recorded."""
        trace, self._engine.trace = self._engine.trace, None
        if trace is None:
            raise ApiError(HTTPStatus.CONFLICT, "no profile is being recorded")
        await self._engine.call(lambda: detach(self._engine.llm_engine.engine))
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"vllmlite-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.json"
        trace.write(path)
        return path
