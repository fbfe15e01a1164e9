"""ServerConfig: what ``vllmlite serve`` can be told besides the engine's options, under vLLM's names."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmlite.chat.messages import CONTENT_FORMATS, check_variables
from vllmlite.config.options import check_fields, mapping_option, option
from vllmlite.errors import ParameterError
from vllmlite.server.parsers import TOOL_PARSERS
from vllmlite.server.parsers.reasoning import STYLES

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where and how to serve. Raises :class:`ParameterError` on bad values."""

    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 or :: for all", group="server", metavar="ADDRESS"
    )
    port: int = option(8000, "port to listen on; 0 chooses a free one", group="server", low=0, high=65535)
    uds: str | None = option(
        None, "Unix socket to listen on, in place of host and port", group="server", metavar="PATH"
    )
    root_path: str = option("", "path under which a proxy shows the server", group="server", metavar="PATH")
    served_model_name: tuple[str, ...] = option(
        (), "names that requests may use for the model, the first in answers; default: as it was given",
        group="server", metavar="NAME",
    )  # fmt: skip
    response_role: str = option(
        "assistant", "role of answers to a conversation", group="server", metavar="ROLE"
    )
    chat_template: str | None = option(
        None,
        "chat template in place of the model's default: a Jinja file, the text itself, or the name of another one of "
        "the model's or of a built-in one, such as chatml",
        group="server",
        metavar="FILE|TEXT|NAME",
    )
    chat_template_content_format: str = option(
        "auto",
        "show the chat template content as text (string), as a list of parts (openai), or as it can take it",
        group="server",
        choices=CONTENT_FORMATS,
    )
    default_chat_template_kwargs: Mapping[str, Any] = mapping_option(
        'variables of the chat template where a request has none, such as {"enable_thinking": false}',
        group="server",
    )
    trust_request_chat_template: bool = option(
        False,
        "let requests bring chat templates of their own, which can keep the server busy",
        group="server",
    )
    enable_auto_tool_choice: bool = option(
        False, "let models choose to call tools; needs a tool-call-parser", group="server"
    )
    tool_call_parser: str | None = option(
        None, "the format in which the model calls tools", group="server", choices=tuple(TOOL_PARSERS)
    )
    exclude_tools_when_tool_choice_none: bool = option(
        False, "show the model no tools where tool_choice is none", group="server"
    )
    reasoning_parser: str | None = option(
        None,
        "how the model marks its reasoning, which answers have apart",
        group="server",
        choices=tuple(STYLES),
    )
    return_tokens_as_token_ids: bool = option(
        False, "name tokens token_id:N in log-probabilities, for text that JSON cannot hold", group="server"
    )
    enable_force_include_usage: bool = option(
        False, "tell the usage in every chunk of every stream", group="server"
    )
    sse_keep_alive_interval: float = option(
        0.0,
        "seconds after which a stream that has nothing to say brings a comment, so that proxies keep it; 0: never",
        group="server",
        low=0,
        high=3600,
    )
    strict_requests: bool = option(
        False,
        "refuse requests with fields that have no effect, in place of logging each once",
        group="server",
    )
    ui: bool = option(True, "serve a page to chat in at /", group="server")
    shutdown_timeout: int = option(
        30, "seconds that running requests get to finish after SIGTERM", group="server", low=0, high=86400
    )
    engine_process: bool = option(
        True, "run the engine in a process of its own, so that its steps never wait for HTTP", group="server"
    )
    profile_dir: str | None = option(
        None,
        "serve /start_profile and /stop_profile, which write Chrome traces here",
        group="server",
        metavar="DIR",
    )

    api_key: tuple[str, ...] = option(
        (), "keys, one of which a request must bring; other users see flags: prefer api-key-file, or $VLLM_API_KEY",
        group="security", metavar="KEY",
    )  # fmt: skip
    api_key_file: str | None = option(None, "file with a key a line", group="security", metavar="FILE")
    ssl_keyfile: str | None = option(None, "TLS private key", group="security", metavar="FILE")
    ssl_certfile: str | None = option(
        None, "TLS certificate, with its chain", group="security", metavar="FILE"
    )
    ssl_ca_certs: str | None = option(
        None, "authorities of client certificates", group="security", metavar="FILE"
    )
    ssl_cert_reqs: int = option(
        int(ssl.CERT_NONE),
        "client certificates: 0 none, 1 optional, 2 required",
        group="security",
        low=0,
        high=2,
    )
    ssl_ciphers: str | None = option(
        None, "OpenSSL's list of ciphers for TLS up to 1.2", group="security", metavar="LIST"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "web origins whose pages may use the server; * for all (CORS)", group="security", metavar="ORIGIN"
    )
    allowed_methods: tuple[str, ...] = option(("*",), "methods for them", group="security", metavar="METHOD")
    allowed_headers: tuple[str, ...] = option(("*",), "headers for them", group="security", metavar="HEADER")
    allow_credentials: bool = option(False, "let their pages send cookies", group="security")
    middleware: tuple[str, ...] = option(
        (), "more ASGI middleware: package.module.Class", group="security", metavar="NAME"
    )
    disable_fastapi_docs: bool = option(False, "serve no /docs and /openapi.json", group="security")

    max_queue: int = option(
        1024, "sequences that may wait beyond max-num-seqs; more are answered 429", group="limit", low=0
    )
    max_body_size: int = option(
        32 << 20, "longest body of a request in bytes, or 32M; longer ones are answered 413", group="limit",
        low=1024, size=True, metavar="SIZE",
    )  # fmt: skip
    max_stored_responses: int = option(
        0, "responses of /v1/responses to keep in memory, for requests that continue or fetch them; 0: none",
        group="limit", low=0, high=100_000,
    )  # fmt: skip
    max_prompts: int = option(1024, "most prompts in one request", group="limit", low=1)

    uvicorn_log_level: str = option("info", "what uvicorn logs", group="log", choices=LOG_LEVELS)
    disable_uvicorn_access_log: bool = option(False, "log no line a request", group="log")
    disable_access_log_for_endpoints: str | None = option(
        None,
        "paths whose requests have no line, such as /health,/metrics",
        group="log",
        metavar="PATH,...",
    )
    enable_log_requests: bool = option(False, "log prompts and parameters", group="log")
    max_log_len: int | None = option(
        None, "characters of a prompt that are logged; default: all", group="log", low=0
    )
    disable_log_stats: bool = option(False, "log no statistics", group="log")
    log_stats_interval: float = option(
        10.0, "seconds between lines of statistics, where something ran", group="log"
    )
    log_config_file: str | None = option(
        None, "JSON file for logging.config.dictConfig", group="log", metavar="FILE"
    )
    enable_request_id_headers: bool = option(False, "answer with X-Request-Id", group="log")

    def __post_init__(self) -> None:
        """Check every field, then the fields against one another."""
        check_fields(self)
        if (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_ciphers) and not self.ssl_certfile:
            raise ParameterError("ssl_certfile", None, "must be given for TLS")
        if self.ssl_ciphers is not None:
            try:
                ssl.create_default_context().set_ciphers(self.ssl_ciphers)
            except ssl.SSLError:
                raise ParameterError(
                    "ssl_ciphers", self.ssl_ciphers, "names no cipher that OpenSSL has"
                ) from None
        if not self.log_stats_interval > 0:
            raise ParameterError("log_stats_interval", self.log_stats_interval, "must be over 0")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ParameterError("enable_auto_tool_choice", True, "needs tool_call_parser")
        if self.root_path and not self.root_path.startswith("/"):
            raise ParameterError("root_path", self.root_path, "must begin with /")
        check_variables("default_chat_template_kwargs", self.default_chat_template_kwargs)
        for name in self.middleware:
            if "." not in name:
                raise ParameterError("middleware", name, "must be package.module.Class")

    def api_keys(self) -> tuple[str, ...]:
        """The keys of ``api_key``, of ``api_key_file``, and of the credential ``vllmlite.api-key`` where systemd hands
        one over; VLLM_API_KEY's, where there is none of these; empty where none is needed. Raises ParameterError."""
        keys = self.api_key
        for path in (self.api_key_file, _credential("vllmlite.api-key")):
            keys += _read_keys(path) if path is not None else ()
        from_environment = os.environ.get("VLLM_API_KEY", "")
        return keys or ((from_environment,) if from_environment else ())


def _credential(name: str) -> str | None:
    """The file of a credential that the service manager hands over (systemd.exec(5)), if it does."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        return os.path.join(directory, name) if directory and name in os.listdir(directory) else None
    except OSError as error:
        raise ParameterError("CREDENTIALS_DIRECTORY", directory, f"cannot be read: {error}") from None


def _read_keys(path: str) -> tuple[str, ...]:
    """The lines of a file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            keys = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError("api_key_file", path, f"cannot be read: {error}") from None
    if not keys:
        raise ParameterError("api_key_file", path, "holds no key")
    return keys
