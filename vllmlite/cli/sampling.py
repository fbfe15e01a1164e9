"""Sampling options: one per field of SamplingParams, with the field's docstring as help."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
from collections.abc import Set
from dataclasses import fields
from typing import Any

from vllmlite.beam_params import BeamOptions
from vllmlite.config.options import did_you_mean
from vllmlite.errors import ParameterError
from vllmlite.sampling_params import SamplingParams

NO_FLAG = {"beams", "output_kind", "seed", "spaces_between_special_tokens", "structured_outputs"}
"""Fields without an option: ``--seed`` is the engine's; the others are set by the commands or change nothing here."""


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, max_tokens: int, exclude: Set[str] = frozenset()
) -> None:
    """Add the sampling options to ``parser``; options not given, except ``max_tokens``, stay out of the namespace."""
    group = parser.add_argument_group(
        "sampling options",
        "Defaults come from the model's generation_config.json; --temperature 0 is greedy.",
    )
    docs = _field_docs(SamplingParams)
    for f in fields(SamplingParams):
        if f.name in NO_FLAG | exclude:
            continue
        help = docs.get(f.name, "").replace("%", "%%").rstrip(".")
        help = help[:1].lower() + help[1:].replace("``", "")
        default: Any = argparse.SUPPRESS
        if f.name == "max_tokens":
            help, default = f"{help} (default: {max_tokens})", max_tokens
        kind: dict[str, Any] = _OPTION_KINDS[str(f.type)]
        group.add_argument("--" + f.name.replace("_", "-"), dest=f.name, default=default, help=help, **kind)


def add_beam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of beam search."""
    group = parser.add_argument_group("beam search options")
    group.add_argument(
        "--beam-width",
        type=int,
        metavar="N",
        help="find the most likely completions with N beams, instead of sampling, and print the best --n",
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="compare completions by log-probability / tokens ** X: above 0 prefers long ones (default: 1)",
    )
    group.add_argument(
        "--early-stopping",
        choices=["false", "true", "never"],
        default="false",
        help="when to end, once N completions have ended: true: at once; false: if the best beam is no better than the"
        " worst of them; never: if no beam can become better (default: false)",
    )


def given_beams(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling fields of a beam search, if one is wanted. Raises ParameterError for invalid values."""
    if args.beam_width is None:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", "false")):
            if getattr(args, name) != neutral:
                raise ParameterError(name, getattr(args, name), "needs --beam-width")
        return {}
    early: Any = {"false": False, "true": True}.get(args.early_stopping, args.early_stopping)
    # The model's default temperature is meant for sampling.
    return {
        "beams": BeamOptions(args.beam_width, args.length_penalty, early),
        "temperature": getattr(args, "temperature", 0.0),
    }


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling fields given on the command line."""
    names = {f.name for f in fields(SamplingParams)} - NO_FLAG
    return {name: value for name, value in vars(args).items() if name in names}


def sampling_from_mapping(base: SamplingParams, options: dict[str, Any]) -> SamplingParams:
    """Return ``base`` with ``options`` applied. Raises ParameterError for an unknown name or a bad value."""
    names = {f.name for f in fields(SamplingParams)} - {"beams", "output_kind"}
    for name, value in options.items():
        if name not in names:
            raise ParameterError(name, value, "unknown sampling parameter" + did_you_mean(name, names))
    return base.clone(**options)


def _int_or_none(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor none") from None


def _id_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _bias(text: str) -> dict[str, float]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"42\": -100}}'")
    return value


_OPTION_KINDS: dict[str, dict[str, Any]] = {
    "int": {"type": int, "metavar": "N"},
    "int | None": {"type": _int_or_none, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "bool": {"action": argparse.BooleanOptionalAction},
    "str | None": {"metavar": "NAME"},
    "str | list[str] | None": {"action": "append", "metavar": "TEXT"},
    "list[str] | None": {"action": "append", "metavar": "TEXT"},
    "list[int] | None": {"type": _id_list, "metavar": "ID,ID"},
    "dict[int, float] | None": {"type": _bias, "metavar": "JSON"},
}
"""``add_argument`` arguments by field type."""


def _field_docs(cls: type) -> dict[str, str]:
    """Return each field's docstring, read from the source; empty if the source is not available."""
    try:
        body = ast.parse(inspect.getsource(cls)).body[0]
    except (OSError, TypeError):
        return {}
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[ast.unparse(node.target)] = str(after.value.value)
    return docs
