"""The APIs that are served, and the API that a path belongs to. Each API has its own form of errors."""

from __future__ import annotations

from enum import Enum

from starlette.types import Scope


class Api(Enum):
    """An API, named by its origin."""

    OPENAI = "OpenAI"
    ANTHROPIC = "Anthropic"
    LLAMACPP = "llama.cpp"


LLAMACPP_PATHS = frozenset(
    "/completion /completions /infill /embedding /apply-template /props /lora-adapters "
    "/chat/completions /responses /embeddings".split()
)
"""llama-server's own paths, and its names of OpenAI's endpoints without /v1, which vLLM does not have."""


KEY_DIGEST = "key_digest"
"""Key in the request scope's state: digest of the API key that authorised the request."""


def path_of(scope: Scope) -> str:
    """Return the path of a request without the proxy's root path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def api_of(path: str) -> Api:
    """Return the API of a path; OpenAI's unless the path is known to belong to another one."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return Api.ANTHROPIC
    return Api.LLAMACPP if path in LLAMACPP_PATHS or path.startswith("/slots/") else Api.OPENAI
