"""The argument parser of all subcommands; its errors suggest the closest option."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

from vllmlite.config.options import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        kwargs.setdefault("max_help_position", 30)
        super().__init__(prog, **kwargs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class OptionParser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that reads ``_`` in option names as ``-``; positionals may stand
    anywhere.

    The usage line does not list the options. Errors are one line with a hint."""

    def __init__(self, **kwargs: Any) -> None:
        """Take the arguments of ArgumentParser."""
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``args``; report an unknown option with the closest known one."""
        argv = self._join_dotted([*map(_with_dashes, args)])
        split = argv.index("--") if "--" in argv else len(argv)
        parsed, rest = self.parse_known_intermixed_args(argv[:split])
        unknown = next((arg for arg in rest if arg.startswith("-")), None)
        if unknown is not None:
            name = unknown.partition("=")[0]
            self.error(f"unknown option {name}" + did_you_mean(name, self._option_string_actions))
        positional = next((a for a in self._actions if not a.option_strings and a.nargs == "*"), None)
        if positional is None:
            rest += argv[split + 1 :]
        else:
            setattr(parsed, positional.dest, [*getattr(parsed, positional.dest), *argv[split + 1 :]])
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed

    def _join_dotted(self, args: list[str]) -> list[str]:
        """Replace ``--option.key.name value`` by ``--option '{"key": {"name": value}}'``, as vLLM does.

        Keys of a JSON object given for the same option are merged."""
        end = args.index("--") if "--" in args else len(args)
        dotted = {
            _with_dashes(arg.partition(".")[0]) for arg in args[:end] if re.match(r"--?[a-zA-Z][\w-]*\.", arg)
        }
        objects: dict[str, dict[str, Any]] = {
            option: {} for option in dotted & {*self._option_string_actions}
        }
        rest: list[str] = []
        given = iter(args[:end])
        for arg in given:
            name, equals, text = arg.partition("=")
            option, *keys = name.split(".")
            option = _with_dashes(option)
            if option not in objects:
                rest.append(arg)
                continue
            part = _value(text if equals else next(given, ""))
            for key in reversed(keys):
                part = {key: part}
            if not isinstance(part, dict):
                self.error(f"argument {option}: {part!r} is not a JSON object")
            _merge(objects[option], part)
        return [*(f"{option}={json.dumps(found)}" for option, found in objects.items()), *rest, *args[end:]]

    def format_usage(self) -> str:
        """Return the short usage line."""
        self._shorten_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """Return the help text with the short usage line."""
        self._shorten_usage()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Report a usage error and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n")

    def _shorten_usage(self) -> None:
        if self.usage is None:
            formatter = self._get_formatter()
            places = (
                formatter._format_args(a, str(a.metavar)) for a in self._actions if not a.option_strings
            )
            self.usage = " ".join(["%(prog)s [options]", *places])


def _with_dashes(arg: str) -> str:
    """Return ``--max_tokens=a_b`` as ``--max-tokens=a_b``; leave anything but long options unchanged."""
    match = re.match(r"--\w[\w-]*(?==|$)", arg)
    return arg if match is None else match.group().replace("_", "-") + arg[match.end() :]


def _value(text: str) -> Any:
    """Parse ``text`` as JSON, or return it unchanged if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
