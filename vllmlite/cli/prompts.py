"""Read prompts from the command line, standard input or a file, and check them before a model is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllmlite.cli.sampling import sampling_from_mapping
from vllmlite.errors import ParameterError
from vllmlite.terminal import is_terminal

if TYPE_CHECKING:
    import argparse

    from vllmlite.cli.parser import OptionParser
    from vllmlite.sampling_params import SamplingParams

FILE_HELP = (
    "file with one prompt per line, or JSON lines with prompt or prompt_token_ids and, optionally, sampling parameters "
    "and priority; -: standard input"
)


@dataclass(slots=True)
class PromptEntry:
    """A prompt with its own sampling parameters, and its position in the file (``NAME:LINE: ``) for errors."""

    prompt: str | list[int]
    options: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    place: str = ""


ABOUT = """\
A single prompt is streamed: the prompt, then its continuation, so that the output
reads as one text. Several are printed in order, each under a heading. Without
a prompt, standard input is read as one prompt."""


def add_prompt_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the positional prompts and ``--prompts-file``; return their argument group."""
    group = parser.add_argument_group("prompts", ABOUT)
    group.add_argument(
        "prompts", nargs="*", metavar="PROMPT", default=[], help="text to complete; -: standard input"
    )
    group.add_argument("-f", "--prompts-file", metavar="FILE", help=FILE_HELP)
    return group


def read_prompts(args: argparse.Namespace, base: SamplingParams, parser: OptionParser) -> list[PromptEntry]:
    """Return the prompts of the command line, then those of the file; exit with a usage error if one is invalid."""
    if args.prompts.count("-") + (args.prompts_file == "-") > 1:
        parser.error("standard input can only be read once")
    prompts = list(args.prompts)
    if not prompts and args.prompts_file is None:
        if is_terminal(sys.stdin):
            parser.error("no prompt: give one, or --prompts-file FILE")
        prompts = ["-"]
    entries = [
        PromptEntry(_read("-", parser).removesuffix("\n") if text == "-" else text) for text in prompts
    ]
    if args.prompts_file is not None:
        entries += _read_file(args.prompts_file, parser)
    for entry in entries:
        _check(entry, base, args.json, parser)
    return entries


def _check(entry: PromptEntry, base: SamplingParams, as_json: bool, parser: OptionParser) -> None:
    try:
        params = sampling_from_mapping(base, entry.options)
    except ParameterError as e:
        parser.error(f"{entry.place}{e}")
    if type(entry.priority) is not int:
        parser.error(f"{entry.place}priority={entry.priority!r}: must be an integer")
    if not entry.prompt:
        parser.error(f"{entry.place}the prompt is empty")
    if isinstance(entry.prompt, str) and not _is_utf8(entry.prompt):
        parser.error(f"{entry.place}the prompt is not UTF-8")
    if not as_json and not params.detokenize:
        parser.error(f"{entry.place}without detokenize only token ids can be printed: add --json")
    if not as_json and (params.logprobs is not None or params.prompt_logprobs is not None):
        parser.error(f"{entry.place}log-probabilities are only printed with --json: add it")


def _is_utf8(text: str) -> bool:
    """Return whether the argument was valid UTF-8; Python decodes invalid bytes to lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(name: str, parser: OptionParser) -> str:
    """Return the text of a file without a byte-order mark and with Unix line ends."""
    try:
        if name == "-":
            text = sys.stdin.read()
        else:
            with open(name, encoding="utf-8", newline="") as file:
                text = file.read()
        return text.removeprefix("\ufeff").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as e:
        shown = "standard input" if name == "-" else name
        parser.error(f"{shown}: {getattr(e, 'strerror', None) or e}")


def _read_file(name: str, parser: OptionParser) -> list[PromptEntry]:
    lines = [(n, line) for n, line in enumerate(_read(name, parser).split("\n"), 1) if line.strip()]
    if not lines:
        parser.error(f"{name}: has no prompts")
    if _from_json(lines[0][1]) is None:
        return [PromptEntry(line, place=f"{name}:{n}: ") for n, line in lines]
    entries = []
    for n, line in lines:
        entry = _from_json(line)
        if entry is None:
            parser.error(
                f"{name}:{n}: must be a JSON object with prompt or prompt_token_ids, as the first line is"
            )
        entry.place = f"{name}:{n}: "
        entries.append(entry)
    return entries


def _from_json(line: str) -> PromptEntry | None:
    """Parse a JSON line with a prompt; return None for any other line."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not {"prompt", "prompt_token_ids"} & value.keys():
        return None
    text, ids, priority = (value.pop(name, None) for name in ("prompt", "prompt_token_ids", "priority"))
    return PromptEntry(text if ids is None else ids, value, priority or 0)
