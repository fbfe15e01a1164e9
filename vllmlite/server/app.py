"""The ASGI application: endpoints, middleware and error handlers."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from vllmlite import __version__
from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.server import adapter_routes, operations, sleep_routes
from vllmlite.server.anthropic import routes as anthropic
from vllmlite.server.body import LimitBody
from vllmlite.server.errors import ApiError, as_api_error
from vllmlite.server.llamacpp import routes as llamacpp
from vllmlite.server.llamacpp import slots
from vllmlite.server.metrics import StatsLog
from vllmlite.server.middleware import OPEN_PATHS, Count, RequireKey, RootPath, error_response
from vllmlite.server.openai import chat, completions, embeddings
from vllmlite.server.operations_protocol import TOKENIZABLE_TAGS
from vllmlite.server.page import page_route
from vllmlite.server.profiler import Profiler
from vllmlite.server.protocol.base import FUNCTION_TAG, OTHER_TAG
from vllmlite.server.responses import routes as responses
from vllmlite.server.responses import stored as stored_responses
from vllmlite.server.service import Service
from vllmlite.server.sse import ClientGone

logger = logging.getLogger(__name__)

ENDPOINTS = (
    completions,
    chat,
    embeddings,
    responses,
    stored_responses,
    anthropic,
    llamacpp,
    slots,
    operations,
)

TAGS = (*TOKENIZABLE_TAGS, FUNCTION_TAG, OTHER_TAG)
"""Discriminator tags, which pydantic inserts into the locations of validation errors."""

CLIENT_CLOSED_REQUEST = 499
"""nginx's status code for the log of an answer whose client has disconnected."""


def build_app(service: Service, keys: tuple[str, ...] = (), lora_keys: tuple[str, ...] = ()) -> FastAPI:
    """Return the application that serves ``service``; if there are API ``keys``, requests need one of them.

    Adapters can be loaded by requests with one of ``lora_keys``, if there are any."""
    config = service.config
    app = FastAPI(
        title="vllmlite",
        version=__version__,
        lifespan=_lifespan,
        openapi_url=None if config.disable_fastapi_docs else "/openapi.json",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.service = service
    # The routes themselves: FastAPI.include_router would make every one again, in 0.2 s of the first request.
    for endpoints in ENDPOINTS:
        app.router.routes.extend(endpoints.router.routes)
    if service.engine.llm_engine.config.enable_sleep_mode:
        app.router.routes.extend(sleep_routes.router.routes)
    if config.profile_dir is not None:
        app.state.profiler = Profiler(service.engine, Path(config.profile_dir))
        app.router.routes.extend(operations.profiling.routes)
    if config.ui:
        app.router.routes.append(page_route())
    for name in config.middleware:
        _add_middleware(app, name)
    app.add_middleware(LimitBody, limit=config.max_body_size)
    if lora_keys:
        app.router.routes.extend(adapter_routes.router.routes)
        app.add_middleware(RequireKey, keys=lora_keys, only=adapter_routes.PATHS)
    if keys:
        open_paths = OPEN_PATHS | adapter_routes.PATHS
        app.add_middleware(RequireKey, keys=keys, excepted=open_paths)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
        )
    app.add_middleware(
        Count, service=service, paths=_computing_paths(), name_them=config.enable_request_id_headers
    )
    if config.root_path:
        app.add_middleware(RootPath, root_path=config.root_path)
    for kind, handler in {
        RequestValidationError: _answer_validation_error,
        HTTPException: _answer_http_error,
        ApiError: _answer_error,
        VllmliteError: _answer_error,
        RecursionError: _answer_error,
        ClientGone: _answer_disconnected,
        Exception: _answer_error,
    }.items():
        app.add_exception_handler(kind, handler)
    return app


def _computing_paths() -> frozenset[str]:
    """Return the paths of all endpoints but those of :mod:`.operations`."""
    routes = [
        route for endpoints in ENDPOINTS if endpoints is not operations for route in endpoints.router.routes
    ]
    return frozenset(route.path for route in routes if isinstance(route, APIRoute))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    if service.config.disable_log_stats:
        yield
        return
    log = StatsLog(service.engine.llm_engine.stats, service.config.log_stats_interval)
    task = asyncio.create_task(log.run())
    try:
        yield
    finally:
        task.cancel()


def _add_middleware(app: FastAPI, name: str) -> None:
    """Add vLLM's ``--middleware``: a class, or a coroutine function of (request, call_next)."""
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ParameterError("middleware", name, f"cannot be imported: {error}") from None
    if inspect.isclass(found):
        app.add_middleware(cast(Any, found))
    elif inspect.iscoroutinefunction(found):
        app.middleware("http")(found)
    else:
        raise ParameterError("middleware", name, "must be a class or a coroutine function")


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(as_api_error(error), request.scope)


async def _answer_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__  # why FastAPI could not parse the body
    if isinstance(cause, RecursionError):
        return error_response(as_api_error(cause), request.scope)
    message = str(error.detail) if cause is None else f"the body is not JSON in UTF-8: {cause}"
    if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{request.method} {request.url.path}: {message}"
    return error_response(ApiError(error.status_code, message, headers=error.headers), request.scope)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    """Answer 400 with pydantic's first error."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ParameterError):
        return error_response(as_api_error(cause), request.scope)
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return error_response(ApiError(HTTPStatus.BAD_REQUEST, message), request.scope)
    if isinstance(first.get("input"), bytes):
        given = request.headers.get("content-type", "missing")
        message = f"content-type must be application/json, not {given}"
        return error_response(ApiError(HTTPStatus.BAD_REQUEST, message), request.scope)
    place = ".".join(str(part) for part in first["loc"][1:] if part not in TAGS)
    message = f"{place or 'body'}: {first['msg']}"
    return error_response(ApiError(HTTPStatus.BAD_REQUEST, message, param=place or None), request.scope)
