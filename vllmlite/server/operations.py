"""Endpoints other than generation: models, tokenisation, health, metrics, profiles."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite import __version__
from vllmlite.pooling_params import PoolingParams
from vllmlite.server.errors import ApiError
from vllmlite.server.openapi import CONFLICT, documented
from vllmlite.server.operations_protocol import (
    Detokenized,
    DetokenizeRequest,
    Health,
    LlamaTokenized,
    LlamaTokenizeRequest,
    Load,
    ModelCard,
    ModelList,
    ProfileFile,
    Tokenizable,
    Tokenized,
    TokenizeRequest,
    Version,
)
from vllmlite.server.service import Service
from vllmlite.server.sse import JSON
from vllmlite.tokenizers.tokenizer import Tokenizer

router = APIRouter()
profiling = APIRouter()


@router.get("/v1/models", responses=documented(ModelList))
@router.get("/v1/models/", responses=documented(ModelList), include_in_schema=False)
@router.get("/models", responses=documented(ModelList), include_in_schema=False)
async def list_models(request: Request) -> Response:
    """List the served model names."""
    service: Service = request.app.state.service
    names = [*service.model_names, *service.adapters.all()]
    return JSON({"object": "list", "data": [_card(service, name) for name in names]})


@router.get("/v1/models/{model:path}", responses=documented(ModelCard))
async def retrieve_model(model: str, request: Request) -> Response:
    """Return a served model name."""
    service: Service = request.app.state.service
    service.check_model(model)
    return JSON(_card(service, model))


def _card(service: Service, name: str) -> ModelCard:
    """Return the description of the model, or of an adapter, whose parent is the model."""
    adapter = service.adapters.all().get(name)
    root = service.engine.llm_engine.config.model or service.model
    parent = None
    if adapter is not None:
        root, parent = adapter.lora_path, adapter.base_model_name or service.model
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "vllmlite",
        "root": root,
        "parent": parent,
        "max_model_len": service.max_model_len,
    }


@router.post("/tokenize", responses=documented(Tokenized | LlamaTokenized))
async def tokenize(body: Tokenizable, request: Request) -> Response:
    """Return the token ids of a text or a conversation, in vLLM's or llama.cpp's form."""
    service: Service = request.app.state.service
    service.check(body, request)
    if isinstance(body, LlamaTokenizeRequest):
        return JSON({"tokens": await _llamacpp_tokens(service, body)})
    limits = PoolingParams(
        truncate_prompt_tokens=body.truncate_prompt_tokens, truncation_side=body.truncation_side
    )
    truncation = service.engine.llm_engine.truncation(limits)
    if isinstance(body, TokenizeRequest):
        encoded = await service.encode(body.prompt, body.add_special_tokens, truncation)
    else:
        encoded = await service.encode_chat(body, truncation=truncation)
    tokens = encoded["prompt_token_ids"]
    strings = [service.tokenizer.token_string(token) for token in tokens] if body.return_token_strs else None
    return JSON(
        {
            "count": len(tokens),
            "max_model_len": service.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }
    )


async def _llamacpp_tokens(service: Service, body: LlamaTokenizeRequest) -> list[Any]:
    encoded = await service.encode(body.content, body.add_special)
    tokens: list[int] = encoded["prompt_token_ids"]
    if not body.with_pieces:
        return list(tokens)
    return [{"id": token, "piece": _piece(service.tokenizer, token)} for token in tokens]


def _piece(tokenizer: Tokenizer, token_id: int) -> str | list[int]:
    """Return the text of a token, or its bytes if they are an incomplete character."""
    piece = tokenizer.token_bytes(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


@router.post("/detokenize", responses=documented(Detokenized))
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Return the text of token ids."""
    service: Service = request.app.state.service
    service.check(body, request)
    text = await service.decode(body.tokens)
    return JSON({"prompt": text, "content": text})


@router.get("/health", responses=documented(Health))
@router.head("/health", include_in_schema=False)
@router.get("/v1/health", responses=documented(Health), include_in_schema=False)
async def health(request: Request) -> Response:
    """Answer 200 while the engine is alive, with its failed steps; 503 if it is dead or the server is shutting down."""
    service: Service = request.app.state.service
    stats = service.engine.llm_engine.engine_core.stats
    dead = service.engine.dead_error
    if dead is not None:
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(dead), code="engine_dead")
    if service.admission.draining:
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", code="shutting_down")
    awake = "degraded" if service.engine.last_step_failed else "ok"
    return JSON(
        {
            "status": "sleeping" if stats.sleep_level else awake,
            "failed_steps": stats.num_failed_steps,
            "last_error": stats.last_error,
        }
    )


@router.get("/ping", responses=documented(Health))
@router.head("/ping", include_in_schema=False)
@router.post("/ping", responses=documented(Health), include_in_schema=False)
async def ping(request: Request) -> Response:
    """Answer as ``/health`` does, under SageMaker's name."""
    return await health(request)


@router.get("/version", responses=documented(Version))
async def version() -> Response:
    """Return the program's version."""
    return JSON({"version": __version__})


@router.get("/load", responses=documented(Load))
async def load(request: Request) -> Response:
    """Return the number of requests being answered by endpoints that compute."""
    service: Service = request.app.state.service
    return JSON({"server_load": service.num_answering})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the Prometheus metrics."""
    service: Service = request.app.state.service
    body, media_type = service.metrics.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": media_type})


@router.post("/reset_prefix_cache", responses=documented(), response_class=Response)
async def reset_prefix_cache(request: Request) -> Response:
    """Empty the prefix cache."""
    service: Service = request.app.state.service
    await service.engine.reset_prefix_cache()
    return Response()


@profiling.post("/start_profile", responses=documented() | CONFLICT, response_class=Response)
async def start_profile(request: Request) -> Response:
    """Start recording the engine's steps."""
    await request.app.state.profiler.start()
    return Response()


@profiling.post("/stop_profile", responses=documented(ProfileFile) | CONFLICT)
async def stop_profile(request: Request) -> Response:
    """Write the recorded steps as a Chrome trace."""
    return JSON({"file": str(await request.app.state.profiler.stop())})
