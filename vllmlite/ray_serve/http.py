"""HTTP requests as values that are sent from the ingress to a replica, and the prefixes of their prompts for the
router.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vllmlite.engine.block_pool import root_digest
from vllmlite.engine.routing import Prefix, prefix_of

Message: TypeAlias = MutableMapping[str, Any]
"""A message of ASGI."""

BLOCK_BYTES = 256
"""Size of the blocks by which prompts are compared."""
BYTES_PER_TOKEN = 4
"""Usual length of a token's text, to compare the lengths of texts with those of caches."""
SCOPE_KEYS = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
"""Keys of an ASGI scope that are plain values; others belong to the process that received the request."""
PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt")
"""Fields of the APIs' requests that make the prompt, in the order in which chat templates render them."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """An HTTP request with its whole body."""

    scope: dict[str, Any]
    """The plain values of its ASGI scope."""
    body: bytes
    prefix: Prefix
    """The prompt's text in bytes, by which a router chooses the replica."""


def make_request(scope: Message, body: bytes) -> HttpRequest:
    """Return the request with an ASGI scope and a body."""
    return HttpRequest({key: scope[key] for key in SCOPE_KEYS if key in scope}, body, prompt_prefix(body))


def prompt_prefix(body: bytes) -> Prefix:
    """Return the prefix of the prompt in a request's body, empty if there is none.

    Prompts are compared as JSON text, without a tokenizer: equal text has equal tokens. Prompts for different models
    or with different cache salts do not match, since engines do not share their blocks either."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Prefix(0, ())
    if not isinstance(fields, dict):
        return Prefix(0, ())
    root = root_digest("salt", repr([fields.get("model"), fields.get("cache_salt")]))
    parts = [[name, fields[name]] for name in PROMPT_FIELDS if fields.get(name)]
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return prefix_of(text, root, BLOCK_BYTES) if parts else Prefix(0, ())
