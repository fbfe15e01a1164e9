"""Everything that is not generation: tokens, models, health, metrics, profiles."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag
from typing_extensions import TypedDict

from vllmlite.server.protocol.base import Ints, Request
from vllmlite.server.protocol.chat import ChatPrompt


class TokenizeRequest(Request):
    """``POST /tokenize`` of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatPrompt):
    """``POST /tokenize`` of a conversation."""

    return_token_strs: bool | None = None


TOKENIZABLE_TAGS = ("a text", "a conversation")
"""Names of the two forms, which pydantic puts into the places of errors."""

Tokenizable = Annotated[
    Annotated[TokenizeRequest, Tag(TOKENIZABLE_TAGS[0])]
    | Annotated[TokenizeChatRequest, Tag(TOKENIZABLE_TAGS[1])],
    Discriminator(lambda body: TOKENIZABLE_TAGS[isinstance(body, dict) and "messages" in body]),
]


class DetokenizeRequest(Request):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Ints


class ModelCard(TypedDict):
    """A served model name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(TypedDict):
    """Answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(TypedDict):
    """Answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """Answer of ``/detokenize``."""

    prompt: str


class Health(TypedDict):
    """Answer of ``/health``."""

    status: Literal["ok", "degraded"]
    failed_steps: int
    last_error: str | None


class ProfileFile(TypedDict):
    """Answer of ``/stop_profile``: a file on the server."""

    file: str


class Version(TypedDict):
    """Answer of ``/version``."""

    version: str


class Load(TypedDict):
    """Answer of ``/load``."""

    server_load: int
