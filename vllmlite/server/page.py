"""The chat page at ``/``: a single file, restricted to its own script and to requests to this server."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILE = Path(__file__).with_name("page.html")


def page_route() -> Route:
    """Return the route ``GET /``; its Content-Security-Policy allows only the page's own script and style, by hash."""
    body = FILE.read_bytes()
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": _policy(body),
        "cache-control": "no-cache",
        "etag": f'"{sha256(body).hexdigest()[:32]}"',
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return Route("/", page, include_in_schema=False)


def _policy(body: bytes) -> str:
    """Return the Content-Security-Policy for a page with one script and one style."""
    (script,) = re.findall(rb"<script>(.*?)</script>", body, re.DOTALL)
    (style,) = re.findall(rb"<style>(.*?)</style>", body, re.DOTALL)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(sha256(text).digest()).decode()}'"
