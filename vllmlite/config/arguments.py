"""Command-line flags of an engine's options, and vLLM's classes of arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from typing import Any

from vllmlite.config.engine_config import EngineConfig, known_options
from vllmlite.config.options import add_fields, flag
from vllmlite.config.refused import ABSENT
from vllmlite.config.speculative import OLDER, SHORTHANDS
from vllmlite.errors import ParameterError


class EngineArgs(EngineConfig):
    """vLLM's name for :class:`EngineConfig`; accepts every keyword of :meth:`EngineConfig.from_kwargs`."""

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """Create the configuration from keywords, which are the fields of :class:`EngineConfig`."""
        super().__init__(model=model, **known_options(options))

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Call :func:`add_engine_arguments` (vLLM's name for it) and return ``parser``."""
        add_engine_arguments(parser)
        return parser

    from_cli_args = EngineConfig.from_namespace


AsyncEngineArgs = EngineArgs
"""vLLM's name for the options of an AsyncLLM; they are the same here."""


SHORT = {
    "compilation_config": ("-cc",),
    "optimization_level": ("-O",),
}
"""vLLM's short flags of unsupported options."""


def add_engine_arguments(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add a flag for each field, ``--config``, and hidden flags for the unsupported options in :data:`ABSENT`.

    Flags not given stay out of the namespace, so that :meth:`EngineConfig.from_namespace` can merge them with the file.
    ``leave_out`` names options that get no flag because the command defines them itself."""
    groups = add_fields(parser, EngineConfig, leave_out)
    parser.add_argument("--config", metavar="FILE", help="YAML file with these options; flags override it")
    for name, (key, kind) in SHORTHANDS.items():
        help = argparse.SUPPRESS if name in OLDER else f"the key {key} of speculative-config"
        groups["speculative decoding"].add_argument(
            flag(name),
            dest=name,
            type=kind,
            default=argparse.SUPPRESS,
            help=help,
            metavar="N" if kind is int else "NAME",
        )
    for name, absent in ABSENT.items():
        if name in leave_out:
            continue
        action = _AbsentFlag if any(isinstance(n, bool) for n in absent.neutral) else _AbsentValue
        parser.add_argument(
            *SHORT.get(name, ()),
            flag(name),
            dest=name,
            action=action,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


class _AbsentValue(argparse.Action):
    """Action of ``--flag VALUE`` of an unsupported option: reports an error, unless the value has no effect in vLLM
    either."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        flag: str | None = None,
    ) -> None:
        absent = ABSENT[self.dest]
        if absent.accepts(values):
            return
        try:
            absent.check(self.dest, json.loads(values))
        except ValueError:
            parser.error(f"{flag}={values}: {absent.reason}")


class _AbsentFlag(argparse.BooleanOptionalAction):
    """Action of ``--flag`` or ``--no-flag`` of an unsupported option: reports an error, unless it leaves the feature
    off."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        flag: str | None = None,
    ) -> None:
        absent = ABSENT[self.dest]
        if flag is not None:
            try:
                absent.check(self.dest, not flag.startswith("--no-"))
            except ParameterError:
                parser.error(f"{flag}: {absent.reason}")
