"""Prompts from the command line, standard input or a file, checked before a model is loaded for them."""

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
    "a prompt a line; or JSON lines, each with prompt or prompt_token_ids, sampling parameters of its own, priority; "
    "-: standard input"
)


@dataclass(slots=True)
class Wish:
    """A prompt, the sampling parameters that it brings along, and where it stands in its file."""

    prompt: str | list[int]
    options: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    place: str = ""


ABOUT = """\
One prompt is streamed: the prompt, then its continuation, so that the output
reads as one text. Several are printed in order, each under a heading. Without
a prompt, standard input is the prompt."""


def add_prompt_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The positional prompts and ``--prompts-file``; returns their group."""
    group = parser.add_argument_group("prompts", ABOUT)
    group.add_argument(
        "prompts", nargs="*", metavar="PROMPT", default=[], help="text to complete; -: standard input"
    )
    group.add_argument("-f", "--prompts-file", metavar="FILE", help=FILE_HELP)
    return group


def read_wishes(args: argparse.Namespace, base: SamplingParams, parser: OptionParser) -> list[Wish]:
    """Prompts of the command line, then those of the file; what is wrong with one ends the program."""
    if args.prompts.count("-") + (args.prompts_file == "-") > 1:
        parser.error("standard input can be read once")
    prompts = list(args.prompts)
    if not prompts and args.prompts_file is None:
        if is_terminal(sys.stdin):
            parser.error("no prompt: give one, or --prompts-file FILE")
        prompts = ["-"]
    wishes = [Wish(_read("-", parser).removesuffix("\n") if text == "-" else text) for text in prompts]
    if args.prompts_file is not None:
        wishes += _read_file(args.prompts_file, parser)
    for wish in wishes:
        _check(wish, base, args.json, parser)
    return wishes


def _check(wish: Wish, base: SamplingParams, as_json: bool, parser: OptionParser) -> None:
    try:
        params = sampling_from_mapping(base, wish.options)
    except ParameterError as e:
        parser.error(f"{wish.place}{e}")
    if type(wish.priority) is not int:
        parser.error(f"{wish.place}priority={wish.priority!r}: must be a whole number")
    if not wish.prompt:
        parser.error(f"{wish.place}the prompt is empty")
    if isinstance(wish.prompt, str) and not _is_utf8(wish.prompt):
        parser.error(f"{wish.place}the prompt is not UTF-8")
    if not as_json and not params.detokenize:
        parser.error(f"{wish.place}without text there are only token ids to print: add --json")
    if not as_json and (params.logprobs is not None or params.prompt_logprobs is not None):
        parser.error(f"{wish.place}log-probabilities are printed by --json alone: add it")


def _is_utf8(text: str) -> bool:
    """Whether the bytes that the system gave us were UTF-8: others came in as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(name: str, parser: OptionParser) -> str:
    """The text of a file, without a byte-order mark and with lines that end as they do on Unix."""
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


def _read_file(name: str, parser: OptionParser) -> list[Wish]:
    lines = [(n, line) for n, line in enumerate(_read(name, parser).split("\n"), 1) if line.strip()]
    if not lines:
        parser.error(f"{name}: holds no prompt")
    if _from_json(lines[0][1]) is None:
        return [Wish(line, place=f"{name}:{n}: ") for n, line in lines]
    wishes = []
    for n, line in lines:
        wish = _from_json(line)
        if wish is None:
            parser.error(
                f"{name}:{n}: is not, as the first line is, a JSON object with prompt or prompt_token_ids"
            )
        wish.place = f"{name}:{n}: "
        wishes.append(wish)
    return wishes


def _from_json(line: str) -> Wish | None:
    """The wish that a JSON line makes; None for any other line."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not {"prompt", "prompt_token_ids"} & value.keys():
        return None
    text, ids, priority = (value.pop(name, None) for name in ("prompt", "prompt_token_ids", "priority"))
    return Wish(text if ids is None else ids, value, priority or 0)
