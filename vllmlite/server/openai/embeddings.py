"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
import struct
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite.pooling_params import PoolingParams
from vllmlite.server.errors import renamed
from vllmlite.server.openai.embeddings_protocol import Embedding, EmbeddingRequest, Embeddings
from vllmlite.server.openapi import documented
from vllmlite.server.service import Service, request_id
from vllmlite.server.sse import JSON

router = APIRouter()


@router.post("/v1/embeddings", responses=documented(Embeddings))
@router.post("/embeddings", responses=documented(Embeddings), include_in_schema=False)
async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
    """Return an embedding of each input."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    params = PoolingParams(
        dimensions=body.dimensions,
        normalize=body.normalize,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        truncation_side=body.truncation_side,
    )
    with renamed(prompt="input", prompt_token_ids="input"):
        truncation = service.engine.llm_engine.truncation(params)
        prompts = await service.encode_all(body.input, body.add_special_tokens, truncation)
        generation = await service.generate(
            "embd-", prompts, params, request_id=request_id(body.request_id, request), priority=body.priority,
            cache_salt=body.cache_salt, arrival_time=arrival, model=model,
        )  # fmt: skip
    outputs = await generation.finished(request.receive)
    data = [_entry(index, out.embedding or [], body.encoding_format) for index, out in enumerate(outputs)]
    count = generation.usage()["prompt_tokens"]
    answer: Embeddings = {
        "id": generation.id,
        "object": "list",
        "created": generation.created,
        "model": generation.model,
        "data": data,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return JSON(answer)


def _entry(index: int, vector: list[float], encoding: str | None) -> Embedding:
    found: list[float] | str = vector
    if encoding == "base64":
        found = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": found}
