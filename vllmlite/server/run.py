"""Starting, running and stopping the server."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import logging.config
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from vllmlite.async_llm import AsyncLLM
from vllmlite.chat.sources import read_template
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine_process.host import SWITCH_SECONDS, settle_garbage
from vllmlite.errors import EngineDeadError, ParameterError
from vllmlite.server.app import build_app
from vllmlite.server.config import ServerConfig
from vllmlite.server.http10 import use_h11_for_http10
from vllmlite.server.service import Service, start_service
from vllmlite.terminal import is_terminal

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Seconds for which idle connections are kept. It is longer than clients keep them; otherwise a connection might be
closed just when a client sends a request."""
CLOSING_SECONDS = 2
"""Maximum seconds for connections to close after their requests have ended."""


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT; return 0, or 1 if the engine died. Raises VllmliteError."""
    begin = time.monotonic()
    keys, lora_keys = config.api_keys(), config.lora_admin_keys()
    if (config.lora_modules or config.lora_root) and not engine_config.enable_lora:
        raise ParameterError("enable_lora", False, "must be True to serve adapters (--enable-lora)")
    if engine_config.slot_save_path is not None and not keys:
        raise ParameterError(
            "slot_save_path",
            engine_config.slot_save_path,
            "lets clients write files: needs an api_key, an api_key_file or the credential vllmlite.api-key",
        )
    config = replace(config, chat_template=read_template(config.chat_template))
    logging_config = _logging(config)
    sys.setswitchinterval(SWITCH_SECONDS)
    # Bind the address first, so that an address in use is reported before a model is loaded.
    with _listen(config) as listener:
        engine = AsyncLLM(engine_config, engine_process=config.engine_process)
        try:
            service = start_service(engine, config)
            asyncio.run(service.adapters.load_modules(config.lora_modules))
            uvicorn_config = uvicorn.Config(
                build_app(service, keys, lora_keys),
                loop="asyncio",  # uvloop accepts one connection per iteration, which delays many at once
                log_level=config.uvicorn_log_level,
                access_log=not config.disable_uvicorn_access_log,
                log_config=logging_config,
                ssl_keyfile=config.ssl_keyfile,
                ssl_certfile=config.ssl_certfile,
                ssl_ca_certs=config.ssl_ca_certs,
                ssl_cert_reqs=config.ssl_cert_reqs,
                ssl_ciphers=config.ssl_ciphers,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=config.shutdown_timeout + CLOSING_SECONDS,
                server_header=False,
            )
            use_h11_for_http10(uvicorn_config)
            stats = engine.llm_engine.stats()
            about = f"{', '.join(service.model_names)} on {stats.backend} ({stats.device}, {stats.dtype})"
            server = Server(uvicorn_config, service, f"{about} at {_address(config, listener)}", begin)
            server.run(sockets=[listener])
            return 1 if engine.dead_error is not None else 0
        finally:
            engine.shutdown()


class Server(uvicorn.Server):
    """uvicorn's server, which drains at the first signal and exits at the second."""

    def __init__(self, config: uvicorn.Config, service: Service, about: str, begin: float) -> None:
        """Serve ``service``. ``about`` describes the server in the log; ``begin`` is the time at which the start
        began."""
        super().__init__(config)
        self._service = service
        self._about = about
        self._begin = begin
        self._stopped = asyncio.Event()

    async def main_loop(self) -> None:
        """Replace uvicorn's loop: tick once a second instead of ten times, to be idle at 0 % CPU; :meth:`stop` wakes
        it."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), 1)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to :meth:`startup`; uvicorn would raise them again at exit."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start accepting connections and notify systemd."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._service.engine.on_death(self.stop)
        await super().startup(sockets=sockets)
        if self._service.engine.dead_error is not None:
            self.stop()
            return
        settle_garbage()
        logger.info("serving %s, after %.2f s", self._about, time.monotonic() - self._begin)
        notify_systemd("READY=1")

    def stop(self) -> None:
        """Accept no more requests and let running ones finish until the deadline; called again, exit at once."""
        if self.should_exit:
            self.force_exit = True
            return
        notify_systemd("STOPPING=1")
        self._service.admission.draining = True
        self.should_exit = True
        self._stopped.set()
        deadline = self._service.config.shutdown_timeout
        loop = asyncio.get_running_loop()
        loop.call_later(
            deadline, lambda: setattr(self, "_ending", asyncio.ensure_future(self._end_requests()))
        )

    async def _end_requests(self) -> None:
        try:
            await self._service.engine.abort_all("the server is shutting down")
        except EngineDeadError:
            return


def notify_systemd(state: str) -> None:
    """Notify the service manager, if there is one (sd_notify(3)); failures are only logged."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address)
    except OSError as error:
        logger.warning("cannot send %s to NOTIFY_SOCKET=%s: %s", state, address, error.strerror)


@contextmanager
def _listen(config: ServerConfig) -> Iterator[socket.socket]:
    """Yield the listening socket; remove a Unix socket's file at the end."""
    if config.uds is None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise ParameterError("host", config.host, f"is not an address: {error.strerror}") from None
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            listener.close()
            place = f"{config.host}:{config.port}"
            raise ParameterError("host", place, f"cannot be listened on: {error.strerror}") from None
        with listener:
            yield listener
        return
    path = Path(config.uds)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()  # left by a server that was killed
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ParameterError("uds", config.uds, f"cannot be listened on: {error.strerror or error}") from None
    try:
        with listener:
            yield listener
    finally:
        path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _address(config: ServerConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Unlogged(logging.Filter):
    """Drops requests to some paths from uvicorn's access log."""

    def __init__(self, paths: str) -> None:
        """Drop requests to ``paths``, a list separated by commas."""
        super().__init__()
        self._paths = frozenset(path.strip() for path in paths.split(","))

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a record; its arguments are the client, the method, the path, …"""
        path = str(record.args[2]) if isinstance(record.args, tuple) and len(record.args) > 2 else ""
        return path.partition("?")[0] not in self._paths


def _logging(config: ServerConfig) -> dict[str, Any]:
    """Apply and return the logging configuration: the file's, or uvicorn's with vllmlite's logger added."""
    if config.disable_access_log_for_endpoints is not None:
        logging.getLogger("uvicorn.access").addFilter(_Unlogged(config.disable_access_log_for_endpoints))
    if config.log_config_file is not None:
        try:
            with open(config.log_config_file, encoding="utf-8-sig") as file:
                settings: dict[str, Any] = json.load(file)
            logging.config.dictConfig(settings)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ParameterError(
                "log_config_file", config.log_config_file, f"cannot be used: {error}"
            ) from None
        return settings
    settings = copy.deepcopy(LOGGING_CONFIG)
    settings["loggers"]["vllmlite"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    settings["formatters"]["default"]["use_colors"] = is_terminal(sys.stderr)
    logging.config.dictConfig(settings)
    return settings
