"""A fake hub on the loopback interface: the part of Hugging Face's protocol that downloads use, with faults."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gguf")
"""Files that the hub keeps in large file storage, by SHA-256."""


class Hub:
    """Repositories by name, each with its files by name, at one commit, and a record of the requests."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of every request."""
        self.status: int | None = None
        """The status of every answer, if set."""
        self.cut: dict[str, int] = {}
        """File name → number of bytes after which its next download breaks off."""
        self.sent_instead: dict[str, bytes] = {}
        """File name → other content of the same size that is sent instead."""
        self.gate: threading.Event | None = None
        """What downloads of large files wait for."""

    def downloads(self, file: str) -> list[str | None]:
        """The byte ranges in which ``file`` was downloaded."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith(f"/{file}")]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that serves until the context ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.status is not None:
                self.answer(hub.status, b"{}")
            elif path.startswith("/api/models/"):
                self.describe(path.removeprefix("/api/models/").split("/"))
            else:
                self.resolve(path.strip("/").split("/"))

        def describe(self, parts: list[str]) -> None:
            name, rest = "/".join(parts[:2]), parts[2:]
            files = hub.repositories.get(name)
            if files is None:
                return self.refuse(404, "RepoNotFound")
            if len(rest) == 2 and rest[1] not in ("main", SHA):
                return self.refuse(404, "RevisionNotFound")
            if rest[:1] == ["tree"]:
                content: Any = [
                    {"type": "file", "path": file, "size": len(data), "oid": git_id(data)}
                    | (
                        {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 9}}
                        if is_large(file)
                        else {}
                    )
                    for file, data in files.items()
                ]
            else:
                siblings = [
                    {"rfilename": file, "size": len(data), "blobId": git_id(data)}
                    | (
                        {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 9}}
                        if is_large(file)
                        else {}
                    )
                    for file, data in files.items()
                ]
                content = {"id": name, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def resolve(self, parts: list[str]) -> None:
            name, file = "/".join(parts[:2]), "/".join(parts[4:])
            data = hub.repositories[name].get(file)
            if data is None:
                return self.refuse(404, "EntryNotFound")
            digest = sha256(data) if is_large(file) else git_id(data)
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            data, start, status = hub.sent_instead.get(file, data), 0, 200
            if self.command == "GET" and self.headers.get("Range"):
                start, status = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if self.command == "GET" and hub.gate is not None and is_large(file):
                hub.gate.wait(30)
            cut = hub.cut.pop(file, None) if self.command == "GET" else None
            self.answer(status, data[start:], headers, cut)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})

        def answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def is_large(file: str) -> bool:
    return file.endswith(LARGE)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
