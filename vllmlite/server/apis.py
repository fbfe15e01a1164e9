"""The APIs that are served, and which of them a path belongs to: each has its own form of errors."""

from __future__ import annotations

from enum import Enum

from starlette.types import Scope


class Api(Enum):
    """Whose clients a path is for."""

    OPENAI = "OpenAI"
    ANTHROPIC = "Anthropic"
    LLAMACPP = "llama.cpp"


LLAMACPP_PATHS = frozenset(
    "/completion /completions /infill /embedding /apply-template /props "
    "/chat/completions /responses /embeddings".split()
)
"""llama-server's own paths, and its names without /v1 of OpenAI's endpoints, which vLLM does not have."""


KEY_DIGEST = "key_digest"
"""Entry of the state of a request's scope: the digest of the API key that let it in, if one had to."""


def path_of(scope: Scope) -> str:
    """The path of a request without the one under which a proxy shows the server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def api_of(path: str) -> Api:
    """The API of a path; OpenAI's, unless it is known to be another's."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return Api.ANTHROPIC
    return Api.LLAMACPP if path in LLAMACPP_PATHS else Api.OPENAI
