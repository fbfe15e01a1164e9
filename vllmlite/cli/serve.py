"""``vllmlite serve``: the OpenAI API over HTTP."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from vllmlite.config.arguments import add_engine_arguments
from vllmlite.config.engine_config import REASONING_KEYS, EngineConfig
from vllmlite.config.options import add_fields, given_options, read_yaml
from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.server.config import ServerConfig
from vllmlite.server.parsers.reasoning import STYLES

if TYPE_CHECKING:
    import argparse

    from vllmlite.cli.parser import OptionParser

SERVER_OPTIONS = {"served_model_name", "disable_log_stats", "disable_log_requests", "reasoning_parser"}
"""Options that the server defines differently from a bare engine."""


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="same as --model")
    add_fields(parser, ServerConfig)
    add_engine_arguments(parser, leave_out=SERVER_OPTIONS)


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Serve until a signal stops the server; return the exit status."""
    try:
        engine, server = configurations(args)
    except ParameterError as error:
        parser.error(str(error))
    if server.headless:
        from vllmlite.ranks.node import serve_node

        serve_node(engine)
        return 0
    # Spinning OpenMP threads make a step tens of times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from vllmlite.server.run import serve
    except ModuleNotFoundError as error:
        if (error.name or "vllmlite").partition(".")[0] == "vllmlite":
            raise
        raise VllmliteError(
            f"the Python package {error.name}, which the server needs, is not installed (Debian: vllmlite-server; "
            "pip: vllmlite[server])"
        ) from None
    return serve(engine, server)


def configurations(args: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    """Return the engine's and the server's options from flags and ``--config``. Raises :class:`ParameterError`."""
    from_file = read_yaml(args.config) if args.config is not None else {}
    flags = given_options(args, ServerConfig) | given_options(args, EngineConfig)
    if args.model_tag is not None:
        if "model" in flags:
            raise ParameterError("model", args.model_tag, "is given twice: as an argument and with --model")
        flags["model"] = args.model_tag
    options = {**from_file, **flags}
    names = ServerConfig.__dataclass_fields__
    server = ServerConfig(**{name: value for name, value in options.items() if name in names})
    engine = EngineConfig.from_kwargs(**{name: value for name, value in options.items() if name not in names})
    if server.reasoning_parser is not None and not engine.reasoning_config:
        style = STYLES[server.reasoning_parser]
        marks = dict(zip(REASONING_KEYS, (style.opening, style.closing), strict=True))
        engine = replace(engine, reasoning_config=marks)
    return engine, server
