"""llama.cpp's ``/slots/ID``: save the prompt of a slot to a file, restore it, or erase it.

A slot is the text of the last ``/completion`` or ``/infill`` with that ``id_slot``, which is 0 by default. Those of its
blocks that are in the cache are saved. Restored blocks are used by any prompt that begins with the same tokens.
"""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response
from typing_extensions import TypedDict

from vllmlite.server.errors import ApiError
from vllmlite.server.llamacpp.protocol import LlamaError
from vllmlite.server.openapi import documented
from vllmlite.server.protocol.base import Request
from vllmlite.server.service import Service
from vllmlite.server.sse import JSON

router = APIRouter()

MOST_SLOTS = 1024
"""Maximum number of texts that are remembered, the latest ones."""


class SlotFile(Request):
    """Body of ``POST /slots/ID``."""

    filename: str = ""


class SlotAnswer(TypedDict, total=False):
    """Answer of ``POST /slots/ID``: the number of tokens that were saved, restored or erased."""

    id_slot: int
    filename: str
    n_saved: int
    n_restored: int
    n_erased: int
    timings: dict[str, float]


@router.post("/slots/{id_slot}", responses=documented(SlotAnswer, error=LlamaError))
async def change_slot(
    id_slot: int,
    action: Literal["save", "restore", "erase"],
    request: HttpRequest,
    body: SlotFile | None = None,
) -> Response:
    """Save, restore or erase the cached prompt of a slot."""
    service: Service = request.app.state.service
    engine = service.engine
    if engine.llm_engine.config.slot_save_path is None:
        raise ApiError(
            HTTPStatus.NOT_IMPLEMENTED, "This server does not support slots action: --slot-save-path"
        )
    name, begin = "" if body is None else body.filename, time.perf_counter()
    tokens = service.slots.get(id_slot, ())
    if action != "restore" and not tokens:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"slot {id_slot} has no prompt", param="id_slot")
    count: int = await engine.ask("change_prefix", tokens, action, name)
    answer: SlotAnswer = {"id_slot": id_slot}
    if action == "erase":
        service.slots.pop(id_slot, None)
        answer["n_erased"] = count
    else:
        answer["filename"] = name
        answer["n_saved" if action == "save" else "n_restored"] = count
        answer["timings"] = {f"{action}_ms": 1000 * (time.perf_counter() - begin)}
    return JSON(answer)


def remember(service: Service, id_slot: int, token_ids: list[int]) -> None:
    """Record ``token_ids`` as the text of a slot."""
    if service.engine.llm_engine.config.slot_save_path is not None:
        service.slots.pop(max(id_slot, 0), None)
        service.slots[max(id_slot, 0)] = tuple(token_ids)
        if len(service.slots) > MOST_SLOTS:
            del service.slots[next(iter(service.slots))]
