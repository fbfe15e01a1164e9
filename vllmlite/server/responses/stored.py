"""``/v1/responses/ID``: reading, deleting and cancelling stored responses."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from vllmlite.errors import ParameterError
from vllmlite.server.openapi import documented
from vllmlite.server.responses.protocol import DeletedResponse, InputItems, ResponseObject
from vllmlite.server.responses.store import ResponseStore, owner_of
from vllmlite.server.sse import JSON

router = APIRouter()


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.service.responses
    return store


@router.get("/v1/responses/{response_id}", responses=documented(ResponseObject))
async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
    """Return a response in its current state."""
    if stream:
        raise ParameterError("stream", stream, "stored responses cannot be streamed")
    return JSON(_store(request).find(owner_of(request), response_id).response)


@router.delete("/v1/responses/{response_id}", responses=documented(DeletedResponse))
async def delete_response(response_id: str, request: Request) -> Response:
    """Delete a response; stop generating it if necessary."""
    _store(request).delete(owner_of(request), response_id)
    return JSON({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", responses=documented(ResponseObject))
async def cancel_response(response_id: str, request: Request) -> Response:
    """Stop generating a background response; a finished one stays as it is."""
    stored = _store(request).find(owner_of(request), response_id)
    if not stored.response["background"]:
        raise ParameterError("response_id", response_id, "is not a background response")
    if stored.task is not None:
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
    return JSON(stored.response)


@router.get("/v1/responses/{response_id}/input_items", responses=documented(InputItems))
async def list_input_items(
    response_id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the items of a response's own input, one page at a time."""
    stored = _store(request).find(owner_of(request), response_id)
    items: list[Any] = stored.items[len(stored.items) - stored.own :]
    if order == "desc":
        items = items[::-1]
    ids = [item["id"] for item in items]
    if after is not None:
        if after not in ids:
            raise ParameterError("after", after, "is not an item of this response's input")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return JSON(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
    )
