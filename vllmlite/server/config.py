"""ServerConfig: options of ``vllmlite serve`` besides the engine's, under vLLM's names."""

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
    """Options of the server. Raises :class:`ParameterError` for invalid values."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 or :: for all addresses",
        group="server",
        metavar="ADDRESS",
    )
    port: int = option(8000, "port to listen on; 0 chooses a free one", group="server", low=0, high=65535)
    uds: str | None = option(
        None, "Unix socket to listen on instead of host and port", group="server", metavar="PATH"
    )
    headless: bool = option(
        False,
        "serve nothing: run the ranks of a node above 0 for the engine of node 0; see nnodes and node-rank",
        group="server",
    )
    root_path: str = option("", "path under which a proxy serves this server", group="server", metavar="PATH")
    served_model_name: tuple[str, ...] = option(
        (), "names of the model in requests, the first also in answers; default: the value of --model",
        group="server", metavar="NAME",
    )  # fmt: skip
    response_role: str = option(
        "assistant", "role of generated chat messages", group="server", metavar="ROLE"
    )
    chat_template: str | None = option(
        None,
        "chat template to use instead of the default: a Jinja file, Jinja source, or the name of one of the model's or "
        "a built-in template, such as chatml",
        group="server",
        metavar="FILE|TEXT|NAME",
    )
    chat_template_content_format: str = option(
        "auto",
        "pass content to the chat template as text (string), as a list of parts (openai), or as it accepts it",
        group="server",
        choices=CONTENT_FORMATS,
    )
    default_chat_template_kwargs: Mapping[str, Any] = mapping_option(
        'default variables of the chat template, such as {"enable_thinking": false}',
        group="server",
    )
    trust_request_chat_template: bool = option(
        False,
        "accept chat templates in requests; they can keep the server busy",
        group="server",
    )
    enable_auto_tool_choice: bool = option(
        False, "let the model decide to call tools; needs tool-call-parser", group="server"
    )
    tool_call_parser: str | None = option(
        None, "format in which the model writes tool calls", group="server", choices=tuple(TOOL_PARSERS)
    )
    exclude_tools_when_tool_choice_none: bool = option(
        False, "do not show tools to the model if tool_choice is none", group="server"
    )
    reasoning_parser: str | None = option(
        None,
        "format of the model's reasoning, which is then separated from the answer",
        group="server",
        choices=tuple(STYLES),
    )
    return_tokens_as_token_ids: bool = option(
        False,
        "name tokens token_id:N in log-probabilities, for text that JSON cannot represent",
        group="server",
    )
    enable_force_include_usage: bool = option(
        False, "include usage in every chunk of every stream", group="server"
    )
    sse_keep_alive_interval: float = option(
        0.0,
        "seconds without output after which a stream sends a comment, to keep proxies from closing it; 0: never",
        group="server",
        low=0,
        high=3600,
    )
    strict_requests: bool = option(
        False,
        "refuse requests with fields that have no effect, instead of logging each once",
        group="server",
    )
    ui: bool = option(True, "serve a chat page at /", group="server")
    shutdown_timeout: int = option(
        30, "seconds for running requests to finish after SIGTERM", group="server", low=0, high=86400
    )
    engine_process: bool = option(
        True, "run the engine in its own process, so that its steps never wait for HTTP", group="server"
    )
    profile_dir: str | None = option(
        None,
        "serve /start_profile and /stop_profile, which write Chrome traces to this directory",
        group="server",
        metavar="DIR",
    )

    lora_modules: tuple[str, ...] = option(
        (),
        'LoRA adapters to serve under their own names: NAME=PATH, or {"name": …, "path": …, "base_model_name": …}',
        group="LoRA",
        metavar="MODULE",
    )
    lora_root: str | None = option(
        None,
        "serve /v1/load_lora_adapter and /v1/unload_lora_adapter, for adapters inside this directory; needs a key in "
        "lora-admin-key-file",
        group="LoRA",
        metavar="DIR",
    )
    lora_admin_key_file: str | None = option(
        None,
        "file with the keys, one per line, that these two endpoints accept instead of the API keys",
        group="LoRA",
        metavar="FILE",
    )

    api_key: tuple[str, ...] = option(
        (), "accepted keys; other users can see flags: prefer api-key-file or $VLLM_API_KEY",
        group="security", metavar="KEY",
    )  # fmt: skip
    api_key_file: str | None = option(None, "file with one key per line", group="security", metavar="FILE")
    ssl_keyfile: str | None = option(None, "TLS private key", group="security", metavar="FILE")
    ssl_certfile: str | None = option(
        None, "TLS certificate with its chain", group="security", metavar="FILE"
    )
    ssl_ca_certs: str | None = option(
        None, "certificate authorities for client certificates", group="security", metavar="FILE"
    )
    ssl_cert_reqs: int = option(
        int(ssl.CERT_NONE),
        "client certificates: 0 none, 1 optional, 2 required",
        group="security",
        low=0,
        high=2,
    )
    ssl_ciphers: str | None = option(
        None, "OpenSSL cipher list for TLS up to 1.2", group="security", metavar="LIST"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "web origins whose pages may use the server (CORS); * for all", group="security", metavar="ORIGIN"
    )
    allowed_methods: tuple[str, ...] = option(
        ("*",), "methods allowed to these origins", group="security", metavar="METHOD"
    )
    allowed_headers: tuple[str, ...] = option(
        ("*",), "headers allowed to these origins", group="security", metavar="HEADER"
    )
    allow_credentials: bool = option(False, "let pages of these origins send cookies", group="security")
    middleware: tuple[str, ...] = option(
        (), "additional ASGI middleware: package.module.Class", group="security", metavar="NAME"
    )
    disable_fastapi_docs: bool = option(False, "do not serve /docs and /openapi.json", group="security")

    max_queue: int = option(
        1024,
        "sequences that may wait beyond max-num-seqs; further requests get status 429",
        group="limit",
        low=0,
    )
    max_body_size: int = option(
        32 << 20, "maximum size of a request body, in bytes or as 32M; larger bodies get status 413", group="limit",
        low=1024, size=True, metavar="SIZE",
    )  # fmt: skip
    max_stored_responses: int = option(
        0, "responses of /v1/responses to keep in memory for each API key, to continue or fetch them; 0: none",
        group="limit", low=0, high=100_000,
    )  # fmt: skip
    max_prompts: int = option(1024, "maximum prompts per request", group="limit", low=1)

    uvicorn_log_level: str = option("info", "log level of uvicorn", group="log", choices=LOG_LEVELS)
    disable_uvicorn_access_log: bool = option(False, "do not log a line per request", group="log")
    disable_access_log_for_endpoints: str | None = option(
        None,
        "paths whose requests are not logged, such as /health,/metrics",
        group="log",
        metavar="PATH,...",
    )
    enable_log_requests: bool = option(False, "log prompts and parameters", group="log")
    max_log_len: int | None = option(
        None, "characters of each prompt to log; default: all", group="log", low=0
    )
    disable_log_stats: bool = option(False, "do not log statistics", group="log")
    log_stats_interval: float = option(
        10.0, "seconds between lines of statistics, which are logged if something ran", group="log"
    )
    log_config_file: str | None = option(
        None, "JSON file for logging.config.dictConfig", group="log", metavar="FILE"
    )
    enable_request_id_headers: bool = option(False, "add X-Request-Id to answers", group="log")

    def __post_init__(self) -> None:
        """Check each field, then combinations of fields."""
        check_fields(self)
        if (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_ciphers) and not self.ssl_certfile:
            raise ParameterError("ssl_certfile", None, "is required for TLS")
        if self.ssl_ciphers is not None:
            try:
                ssl.create_default_context().set_ciphers(self.ssl_ciphers)
            except ssl.SSLError:
                raise ParameterError(
                    "ssl_ciphers", self.ssl_ciphers, "has no cipher that OpenSSL knows"
                ) from None
        if not self.log_stats_interval > 0:
            raise ParameterError("log_stats_interval", self.log_stats_interval, "must be greater than 0")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ParameterError("enable_auto_tool_choice", True, "needs tool_call_parser")
        if self.root_path and not self.root_path.startswith("/"):
            raise ParameterError("root_path", self.root_path, "must begin with /")
        check_variables("default_chat_template_kwargs", self.default_chat_template_kwargs)
        for name in self.middleware:
            if "." not in name:
                raise ParameterError("middleware", name, "must be package.module.Class")

    def api_keys(self) -> tuple[str, ...]:
        """Return the API keys; empty if none is required. Raises ParameterError.

        They come from ``api_key``, ``api_key_file`` and systemd's credential ``vllmlite.api-key``, or, without any of
        these, from VLLM_API_KEY."""
        keys = self.api_key
        for path in (self.api_key_file, _credential("vllmlite.api-key")):
            keys += _read_keys("api_key_file", path) if path is not None else ()
        from_environment = os.environ.get("VLLM_API_KEY", "")
        return keys or ((from_environment,) if from_environment else ())

    def lora_admin_keys(self) -> tuple[str, ...]:
        """Return the keys for loading adapters, of which there is one if it is allowed. Raises ParameterError.

        They come from ``lora_admin_key_file``, systemd's credential ``vllmlite.lora-admin-key``, or
        VLLMLITE_LORA_ADMIN_KEY."""
        if self.lora_root is None:
            return ()
        if not os.path.isdir(self.lora_root):
            raise ParameterError("lora_root", self.lora_root, "must be a directory")
        keys: tuple[str, ...] = ()
        for path in (self.lora_admin_key_file, _credential("vllmlite.lora-admin-key")):
            keys += _read_keys("lora_admin_key_file", path) if path is not None else ()
        keys = keys or tuple(filter(None, [os.environ.get("VLLMLITE_LORA_ADMIN_KEY", "")]))
        if not keys:
            raise ParameterError(
                "lora_root",
                self.lora_root,
                "lets clients load adapters, and needs a key for that: lora_admin_key_file, the credential "
                "vllmlite.lora-admin-key, or $VLLMLITE_LORA_ADMIN_KEY",
            )
        return keys


def _credential(name: str) -> str | None:
    """Return the file of a credential passed by systemd (systemd.exec(5)), or None."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        return os.path.join(directory, name) if directory and name in os.listdir(directory) else None
    except OSError as error:
        raise ParameterError("CREDENTIALS_DIRECTORY", directory, f"cannot be read: {error}") from None


def _read_keys(option: str, path: str) -> tuple[str, ...]:
    """Return the non-empty lines of a file. Raises ParameterError, which names ``option``."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            keys = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(option, path, f"cannot be read: {error}") from None
    if not keys:
        raise ParameterError(option, path, "has no keys")
    return keys
