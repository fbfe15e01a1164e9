"""Endpoints that put the engine to sleep and wake it up; served only with ``enable_sleep_mode``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from vllmlite.async_llm import AsyncLLM
from vllmlite.server.openapi import documented
from vllmlite.server.sse import JSON

router = APIRouter()


class Sleeping(TypedDict):
    """Answer of ``/is_sleeping``."""

    is_sleeping: bool


@router.post("/sleep", responses=documented(), response_class=Response)
async def sleep(request: Request, level: int = 1, mode: str = "abort") -> Response:
    """Free the engine's memory; answers once it is free. ``level`` 1 keeps the weights in host memory, 2 reads them
    again from the checkpoint. ``mode`` aborts unfinished requests, lets them finish first (wait), or computes them
    again after waking up (keep)."""
    engine: AsyncLLM = request.app.state.service.engine
    await engine.sleep(level, mode)
    return Response()


@router.post("/wake_up", responses=documented(), response_class=Response)
async def wake_up(request: Request, tags: Annotated[list[str] | None, Query()] = None) -> Response:
    """Allocate the memory again, and answer once requests are served. With ``tags``, which are weights and kv_cache,
    the engine wakes up once both have been given."""
    engine: AsyncLLM = request.app.state.service.engine
    await engine.wake_up(tags)
    return Response()


@router.get("/is_sleeping", responses=documented(Sleeping))
async def is_sleeping(request: Request) -> Response:
    """Return whether the engine sleeps."""
    engine: AsyncLLM = request.app.state.service.engine
    return JSON({"is_sleeping": await engine.is_sleeping()})
