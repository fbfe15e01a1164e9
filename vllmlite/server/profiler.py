"""``/start_profile`` and ``/stop_profile``: record the engine's steps as Chrome traces."""

from __future__ import annotations

import time
from http import HTTPStatus
from pathlib import Path

from vllmlite.async_llm import AsyncLLM
from vllmlite.engine.trace import write_trace
from vllmlite.server.errors import ApiError


class Profiler:
    """Writes traces to a directory."""

    def __init__(self, engine: AsyncLLM, directory: Path) -> None:
        """Write traces to ``directory``, which is created with the first trace."""
        self._engine = engine
        self._directory = directory
        self._recording = False

    async def start(self) -> None:
        """Start recording. Raises ApiError if a recording is in progress."""
        if self._recording:
            raise ApiError(HTTPStatus.CONFLICT, "a profile is being recorded")
        self._recording = True
        await self._engine.ask("start_trace")

    async def stop(self) -> Path:
        """Stop recording and write the trace; return its file. Raises ApiError if there is no recording."""
        if not self._recording:
            raise ApiError(HTTPStatus.CONFLICT, "no profile is being recorded")
        self._recording = False
        events = await self._engine.ask("stop_trace")
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"vllmlite-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.json"
        write_trace(events, path)
        return path
