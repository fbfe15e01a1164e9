"""The command line: one module per subcommand, imported only when it runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Protocol, cast

from vllmlite.cli.parser import OptionParser
from vllmlite.config.options import did_you_mean
from vllmlite.errors import VllmliteError
from vllmlite.terminal import is_terminal, note, open_closed_streams

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "generate": "complete prompts",
    "chat": "talk to a model in the terminal",
    "serve": "serve the OpenAI API over HTTP",
    "download": "fetch a model from the Hugging Face hub",
    "quantize": "write a copy of a checkpoint in 8 or 4 bits",
    "bench": "measure throughput and latency of this engine",
    "bench serve": "measure a running server, vllmlite or another",
    "env": "show versions, hardware and backends",
}
"""Subcommands with their summaries; each is a module (``bench serve``: bench_serve), see :class:`Command`."""

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 128 + signal.SIGINT, 141


class Command(Protocol):
    """The interface of a subcommand's module."""

    def add_arguments(self, parser: OptionParser) -> None:
        """Add the subcommand's options to ``parser``."""

    def run(self, args: argparse.Namespace, parser: OptionParser) -> int:
        """Run the subcommand and return its exit status; report usage errors with ``parser.error``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 1 error, 2 usage error, 130 interrupted, 141 broken pipe."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Replace characters that the terminal cannot show instead of failing.
        sys.stdout.reconfigure(errors="replace")
    try:
        if open_closed_streams() and argv[:1] != ["serve"]:
            raise VllmliteError("standard output is closed")
        try:
            status = _dispatch(argv)
        except SystemExit as e:  # raised by argparse after --help and errors
            status = e.code if isinstance(e.code, int) else EXIT_FAILURE
        sys.stdout.flush()
        return status
    except VllmliteError as e:
        from vllmlite.cli.screen import visible

        note(f"vllmlite: error: {visible(' '.join(str(e).split()))}")
        return EXIT_FAILURE
    except KeyboardInterrupt:
        if is_terminal(sys.stderr):
            note("")  # after the terminal's ^C
        return EXIT_INTERRUPTED
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # The output cannot be written: redirect what Python flushes at exit to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.EPIPE:
            return EXIT_BROKEN_PIPE
        note(f"vllmlite: error: writing the output: {e.strerror}")
        return EXIT_FAILURE


def build_parser() -> argparse.ArgumentParser:
    """Return one parser for the whole command line, for generators of shell completions and manual pages."""
    parser = _top_parser()
    parser.epilog = None
    subparsers = parser.add_subparsers(prog=parser.prog, metavar="COMMAND", parser_class=OptionParser)
    for name, summary in COMMANDS.items():
        _load(name).add_arguments(subparsers.add_parser(name, help=summary, description=_sentence(summary)))
    return parser


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        parser = _top_parser()
        if argv and not argv[0].startswith("-"):
            parser.error(f"unknown command {argv[0]}" + did_you_mean(argv[0], COMMANDS))
        parser.parse(argv)
        parser.error(f"no command given; choose one of {', '.join(COMMANDS)}")
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    command = _load(name)
    parser = OptionParser(prog=f"vllmlite {name}", description=_sentence(COMMANDS[name]))
    command.add_arguments(parser)
    return command.run(parser.parse(argv[len(name.split()) :]), parser)


def _top_parser() -> OptionParser:
    listing = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    parser = OptionParser(
        prog="vllmlite",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Run language models: vLLM's engine made small.",
        epilog=f"commands:\n{listing}\n\n'vllmlite COMMAND --help' lists a command's options.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vllmlite import __version__

        print(f"vllmlite {__version__}")
        parser.exit()


def _load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"vllmlite.cli.{name.replace(' ', '_')}"))


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."
