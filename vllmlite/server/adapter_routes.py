"""Endpoints that load and unload LoRA adapters; served only with ``lora_root``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from vllmlite.server.openapi import documented
from vllmlite.server.protocol.base import Request as Body
from vllmlite.server.service import Service

router = APIRouter()
PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Paths of these endpoints, which require a key of their own."""


class LoadAdapter(Body):
    """Body of ``POST /v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    """Directory or GGUF file inside ``lora_root``, absolute or relative to it."""
    load_inplace: bool = False
    """Replace an adapter with the same name."""
    is_3d_lora_weight: bool = False
    """Has no effect: the layout of the weights of experts is taken from the files."""


class UnloadAdapter(Body):
    """Body of ``POST /v1/unload_lora_adapter``."""

    lora_name: str
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", responses=documented(), response_class=Response)
async def load_adapter(body: LoadAdapter, request: Request) -> Response:
    """Load an adapter and serve it as a model of its name."""
    service: Service = request.app.state.service
    service.check(body, request)
    await service.adapters.load(body.lora_name, body.lora_path, body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=documented(), response_class=Response)
async def unload_adapter(body: UnloadAdapter, request: Request) -> Response:
    """Stop serving an adapter. Requests that use it go on; its memory is freed once they have ended."""
    service: Service = request.app.state.service
    service.check(body, request)
    await service.adapters.unload(body.lora_name, body.lora_int_id)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
