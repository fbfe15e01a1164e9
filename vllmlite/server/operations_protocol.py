"""Request and response types of tokenisation, models, health, metrics and profiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from vllmlite.config.refused import Absent
from vllmlite.server.openai.chat_protocol import ChatPrompt
from vllmlite.server.protocol.base import Ints, Request


class TokenizeFields(Request):
    """Common fields of ``POST /tokenize``."""

    return_token_strs: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Side at which tokens are dropped."
    )


class TokenizeRequest(TokenizeFields):
    """Body of ``POST /tokenize`` for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class TokenizeChatRequest(ChatPrompt, TokenizeFields):
    """Body of ``POST /tokenize`` for a conversation."""


class LlamaTokenizeRequest(Request):
    """Body of ``POST /tokenize`` in llama.cpp's form."""

    text_changing: ClassVar[Mapping[str, Absent]] = {
        "parse_special": Absent((None, True), "special tokens in a text are always read as such")
    }

    content: str
    add_special: bool = False
    with_pieces: bool = False


TOKENIZABLE_TAGS = ("a text", "a conversation", "llama.cpp's")
"""Names of the forms, which pydantic inserts into the locations of errors."""


def _form(body: Any) -> str:
    names = body.keys() if isinstance(body, dict) else ()
    return TOKENIZABLE_TAGS[
        1 if "messages" in names else 2 if "content" in names and "prompt" not in names else 0
    ]


Tokenizable = Annotated[
    Annotated[TokenizeRequest, Tag(TOKENIZABLE_TAGS[0])]
    | Annotated[TokenizeChatRequest, Tag(TOKENIZABLE_TAGS[1])]
    | Annotated[LlamaTokenizeRequest, Tag(TOKENIZABLE_TAGS[2])],
    Discriminator(_form),
]


class DetokenizeRequest(Request):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Ints


class ModelCard(TypedDict):
    """A served name: of the model, or of an adapter."""

    id: str
    object: Literal["model"]
    created: Literal[0]
    """Always 0: a checkpoint does not state the time, and the time of loading would differ among the replicas of a
    server."""
    owned_by: str
    root: str
    parent: str | None
    """The model that an adapter belongs to."""
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


class LlamaTokenized(TypedDict):
    """Answer of ``/tokenize`` in llama.cpp's form: ids, or ids with their texts."""

    tokens: list[Any]


class Detokenized(TypedDict):
    """Answer of ``/detokenize``: the text under vLLM's and llama.cpp's names."""

    prompt: str
    content: str


class Health(TypedDict):
    """Answer of ``/health``."""

    status: Literal["ok", "degraded", "sleeping"]
    failed_steps: int
    last_error: str | None


class ProfileFile(TypedDict):
    """Answer of ``/stop_profile``: the path of a file on the server."""

    file: str


class Version(TypedDict):
    """Answer of ``/version``."""

    version: str


class Load(TypedDict):
    """Answer of ``/load``."""

    server_load: int
