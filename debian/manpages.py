#!/usr/bin/python3
"""Write vllmlite(1) and a page for every subcommand to a directory, generated from the argument parsers."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from subprocess import check_output

from vllmlite import __version__
from vllmlite.cli import build_parser


def roff(text: str) -> str:
    """Return ``text`` as roff input without requests, escapes or typographic hyphens."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def prose(text: str) -> Iterator[str]:
    """Yield ``text`` as roff input; an indented line is an example: a command, two blanks, and what it does."""
    for line in text.splitlines():
        if line.startswith(" "):
            command, _, does = line.strip().partition("  ")
            yield from (".TP", f"\\fB{roff(command)}\\fR", roff(does.strip()) or "\\&")
        elif line:
            yield roff(line)


def title(command: str) -> str:
    """Return the name of a subcommand's page."""
    return "vllmlite-" + command.replace(" ", "-")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of ``parser``'s subcommands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def related(command: str, commands: Iterable[str]) -> list[str]:
    """Return the pages of commands that share a word with this one, such as bench and bench serve."""
    return [title(other) for other in commands if other != command and {*other.split()} & {*command.split()}]


def option(action: argparse.Action, formatter: argparse.HelpFormatter) -> Iterator[str]:
    """Yield an option or argument: names in bold, value in italics, and its help."""
    yield ".TP"
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    if action.option_strings:
        spellings = ", ".join(f"\\fB{roff(spelling)}\\fR" for spelling in action.option_strings)
        yield spellings + (f" \\fI{roff(value)}\\fR" if action.nargs != 0 else "")
    else:
        yield f"\\fI{roff(value)}\\fR"
    yield roff(formatter._expand_help(action)) if action.help else "\\&"


def body(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield DESCRIPTION and the options, in the parser's groups."""
    yield from (".SH DESCRIPTION", *prose(parser.description or ""))
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        if not actions or isinstance(actions[0], argparse._SubParsersAction):
            continue
        heading = "arguments" if group is parser._positionals else group.title or "options"
        yield f".SH {roff(heading.upper())}"
        yield from prose(group.description or "")
        for action in actions:
            yield from option(action, formatter)


def page(name: str, summary: str, synopsis: str, date: str, sections: list[str], also: list[str]) -> str:
    """Return a whole manual page."""
    lines = [
        f'.TH {name.upper()} 1 "{date}" "vllmlite {__version__}" "User Commands"',
        *(".nh", ".ad l"),
        *(".SH NAME", f"{roff(name)} \\- {roff(summary)}"),
        *(".SH SYNOPSIS", f"\\fB{roff(name.replace('-', ' '))}\\fR {roff(synopsis)}"),
        *sections,
        ".SH EXIT STATUS",
        "0 on success, 1 if something failed, 2 if the command line was wrong, 130 after an interrupt.",
        *(".SH SEE ALSO", ", ".join(f"\\fB{roff(page)}\\fR(1)" for page in also)),
    ]
    return "\n".join(lines) + "\n"


def main(directory: Path) -> None:
    """Write the pages to ``directory``."""
    changed = check_output(["dpkg-parsechangelog", "-S", "Date"], text=True)
    date = parsedate_to_datetime(changed.strip()).strftime("%Y-%m-%d")
    parser = build_parser()
    commands = subcommands(parser)
    summaries = {name: (command.description or name).rstrip(".") for name, command in commands.items()}
    listing = [".SH COMMANDS"]
    for name, summary in summaries.items():
        listing += [".TP", f"\\fB{name}\\fR", f"{roff(summary)}; see \\fB{roff(title(name))}\\fR(1)."]
    pages = [title(name) for name in commands]
    text = page("vllmlite", "run language models", "COMMAND ...", date, [*body(parser), *listing], pages)
    (directory / "vllmlite.1").write_text(text, encoding="utf-8")
    for name, command in commands.items():
        summary = summaries[name][0].lower() + summaries[name][1:]
        _, _, synopsis = command.format_usage().strip().partition(f" {name} ")
        text = page(
            title(name), summary, synopsis, date, [*body(command)], ["vllmlite", *related(name, commands)]
        )
        (directory / f"{title(name)}.1").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
