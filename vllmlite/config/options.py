"""Configurations as frozen dataclasses; flags, YAML and ``--help`` are derived from the fields.

A field's type is ``str``, ``int``, ``float`` or ``bool``, any of these or None, ``tuple[str, ...]``, or
``Mapping[str, Any]`` (JSON in a flag). Its metadata are ``help`` and ``group``; ``choices`` and ``synonyms`` of a
string; ``low`` and ``high`` of a number; ``size`` for integers that may have a unit suffix; ``metavar``; ``short``,
further names of the flag.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Collection
from dataclasses import Field, field, fields
from typing import Any

from vllmlite.errors import ParameterError


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field with its ``help`` and other ``metadata``."""
    return field(default=default, metadata={"help": help, "group": "engine", **metadata})


def mapping_option(help: str, **metadata: Any) -> Any:
    """Return a dataclass field for a mapping, excluded from the hash."""
    return field(
        default=None, hash=False, metadata={"help": help, "group": "engine", "metavar": "JSON", **metadata}
    )


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """Return ``; did you mean …?`` with the candidate closest to ``name``, or "" if none is close."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def parse_size(text: str) -> int:
    """Parse an integer with an optional suffix: K, M, G, T, KiB … are powers of 1024; k, m, g, t, KB … of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 1048576, 512M, 4G or 2GiB")
    number, unit, rest = match.group(1), match.group(2) or "", (match.group(3) or "").lower()
    base = 1024 if rest == "ib" or (unit.isupper() and not rest) else 1000
    size = float(number) * base ** ("kmgt".index(unit.lower()) + 1 if unit else 0)
    if not unit:
        size = int(number) if number.isdigit() else size
    if size != int(size):
        raise ValueError(f"{text!r} is not an integer")
    return int(size)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping in a YAML file, with dashes in keys replaced by underscores. Raises ParameterError."""
    try:
        import yaml
    except ImportError:
        raise ParameterError(
            "config", str(path), "reading YAML needs PyYAML (Debian: python3-yaml)"
        ) from None
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = yaml.safe_load(file)
    except OSError as e:
        raise ParameterError("config", str(path), f"cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ParameterError("config", str(path), f"is not YAML: {' '.join(str(e).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ParameterError("config", str(path), "must contain one mapping from option names to values")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in options:
            raise ParameterError("config", str(path), f"sets {name} twice")
        options[name] = value
    return options


def argument(f: Field[Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``add_argument`` for a field."""
    meta = f.metadata
    text = meta["help"].replace("%", "%%")
    if f.default not in (None, (), "") and "default" not in text and not isinstance(f.default, (bool, tuple)):
        text += f" (default: {f.default})"
    if "bool" in f.type:
        on = f" (default: {'on' if f.default else 'off'})" if f.default is not None else ""
        return {"action": argparse.BooleanOptionalAction, "help": text + on}
    if f.type == "tuple[str, ...]":
        return {"nargs": "+", "help": text, "metavar": meta.get("metavar")}
    found: dict[str, Any] = {"help": text, "metavar": meta.get("metavar")}
    if "choices" in meta:
        found["choices"] = (*meta["choices"], *meta.get("synonyms", ()))
        found["metavar"] = "{" + ",".join(meta["choices"]) + "}"
    elif meta.get("size"):
        found.update(type=_size_argument, metavar="SIZE" if "memory" in f.name else "N")
    elif "int" in f.type:
        found.update(type=int, metavar="N")
    elif "float" in f.type:
        found.update(type=float, metavar="X")
    return found


def _size_argument(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def flag(name: str) -> str:
    """Return the flag of the field ``name``."""
    return "--" + name.replace("_", "-")


def normalised(f: Field[Any], value: Any) -> Any:
    """Return ``value`` normalised: paths as str, sizes as int, synonyms resolved, lists as tuples, JSON parsed."""
    if f.type == "tuple[str, ...]":
        return _tuple(f, value)
    if "str" in f.type:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if "synonyms" in f.metadata and value is not None:
            text = str(value).removeprefix("torch.")
            return f.metadata["synonyms"].get(text, text)
    if f.type == "Mapping[str, Any]":
        return mapping(f.name, value)
    if f.metadata.get("size") and isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as e:
            raise ParameterError(f.name, value, str(e)) from None
    if f.type == "float" and type(value) is int:
        return float(value)
    return value


_TYPES = {
    "str": (str, "a string"),
    "int": (int, "an integer"),
    "float": (float, "a number"),
    "bool": (bool, "True or False"),
}


def check(f: Field[Any], value: Any) -> None:
    """Raise :class:`ParameterError` unless ``value`` is valid for the field."""
    if f.type in ("tuple[str, ...]", "Mapping[str, Any]"):
        return
    type_name, _, optional = str(f.type).partition(" | ")
    if value is None and optional:
        return
    expected, words = _TYPES[type_name]
    if type(value) is not expected:
        raise ParameterError(f.name, value, f"must be {words}" + (" or None" if optional else ""))
    choices = f.metadata.get("choices")
    if choices is not None and value not in choices:
        close = did_you_mean(str(value), choices)
        raise ParameterError(f.name, value, f"must be {', '.join(choices[:-1])} or {choices[-1]}{close}")
    if value == "" != f.default:
        raise ParameterError(f.name, value, "must not be empty")
    low, high = f.metadata.get("low"), f.metadata.get("high")
    if low is not None and not low <= value:
        raise ParameterError(f.name, value, f"must be at least {low}")
    if high is not None and not value <= high:
        raise ParameterError(f.name, value, f"must be at most {high}")


def check_fields(config: Any) -> None:
    """Normalise and check every field of a frozen dataclass; to be called from ``__post_init__``."""
    for f in fields(config):
        value = normalised(f, getattr(config, f.name))
        object.__setattr__(config, f.name, value)
        check(f, value)


def add_fields(
    parser: argparse.ArgumentParser, config: type[Any], leave_out: Collection[str] = ()
) -> dict[str, argparse._ArgumentGroup]:
    """Add a flag for each field of dataclass ``config``, in argument groups, which are returned by name.

    Flags not given stay out of the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(config):
        if f.name in leave_out:
            continue
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(f"{group} options")
        names = [*f.metadata.get("short", ()), flag(f.name)]
        groups[group].add_argument(*names, dest=f.name, default=argparse.SUPPRESS, **argument(f))
    return groups


def given_options(namespace: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """Return the fields of ``config`` that were given as flags."""
    return {f.name: getattr(namespace, f.name) for f in fields(config) if hasattr(namespace, f.name)}


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a dict from a mapping, the text of a JSON object, or None (empty)."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            raise ParameterError(name, value, "is not JSON") from None
    if not isinstance(found, dict | None):
        raise ParameterError(name, value, "must be a mapping (in a flag: a JSON object)")
    return dict(found or {})


def _tuple(f: Field[Any], value: Any) -> tuple[str, ...]:
    """Return a tuple from a list, one value, or values that contain JSON lists (as vLLM's flags allow)."""
    values: list[Any] = []
    for entry in [value] if isinstance(value, str) or not isinstance(value, (list, tuple)) else value:
        if isinstance(entry, str) and entry.lstrip().startswith("["):
            try:
                values += json.loads(entry)
            except ValueError:
                raise ParameterError(f.name, entry, "is not a JSON list of strings") from None
        else:
            values.append(entry)
    if not all(isinstance(entry, str) and entry for entry in values):
        raise ParameterError(f.name, value, "must be non-empty strings")
    return tuple(values)
