"""Request and response types of ``/v1/embeddings``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import TypedDict

from vllmlite.config.refused import Absent
from vllmlite.server.protocol.base import Prompts, Request
from vllmlite.server.protocol.fields import VECTOR_CHANGING


class EmbeddingRequest(Request):
    """Body of ``POST /v1/embeddings``."""

    text_changing: ClassVar[Mapping[str, Absent]] = VECTOR_CHANGING

    model: str | None = Field(None, description="A served model name.")
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="Keep this many leading elements, then normalise.")
    normalize: bool | None = Field(None, description="Default: --pooling-normalize.")
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Side at which tokens are dropped."
    )
    add_special_tokens: bool = True
    priority: int = Field(0, description="Lower values run first; needs --scheduling-policy priority.")
    cache_salt: str | None = None
    request_id: str | None = Field(None, max_length=256)


class Embedding(TypedDict):
    """The vector of one input: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Token counts of a request."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """Answer of ``/v1/embeddings``."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
