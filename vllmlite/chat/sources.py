"""The chat templates that a checkpoint brings, by name, and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmlite.chat.builtin import BUILT_IN, built_in
from vllmlite.errors import ModelError, ParameterError
from vllmlite.weights.json_object import read_object

DEFAULT, TOOL_USE = "default", "tool_use"
"""The template that is taken where none is named, and the one that goes before it where tools are given."""


def read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, of the first place that has any.

    The places: ``chat_template.jinja`` with ``additional_chat_templates/NAME.jinja``; ``tokenizer_config.json``, which
    is ``config`` (for a GGUF file, what its metadata says); ``chat_template.json``. Raises ModelError for a file that
    cannot be read."""
    files = _files(path)
    if files:
        return {name: _read(file) for name, file in files.items()}
    found = _named(config.get("chat_template"))
    if not found and path.is_dir():
        found = _named(read_object(path / "chat_template.json", optional=True).get("chat_template"))
    return found


def choose(templates: Mapping[str, str], wanted: str | None, *, with_tools: bool, begins: str) -> str:
    """The text of the template that is ``wanted``: the name of one of ``templates``, of a built-in one, or the text
    itself; None: the model's own.

    ``begins`` is the token, if any, with which the tokenizer begins texts, and so does a built-in template. Raises
    :class:`ParameterError`."""
    if wanted is None:
        name = TOOL_USE if with_tools and TOOL_USE in templates else DEFAULT
        if name in templates:
            return templates[name]
        if not templates:
            raise ParameterError(
                "chat_template",
                None,
                "the model has no chat template: give one, such as chatml, or a plain prompt",
            )
        raise ParameterError("chat_template", None, f"the model has several: choose {_either(templates)}")
    if wanted in templates:
        return templates[wanted]
    if wanted in BUILT_IN:
        return built_in(wanted, begins)
    if "{" in wanted:
        return wanted
    raise ParameterError(
        "chat_template",
        wanted,
        f"must be a Jinja template or the name of one: {_either({**templates, **BUILT_IN})}",
    )


def read_template(given: str | None) -> str | None:
    """The text of the chat template in the file ``given``; ``given`` itself where it is a template or can be the name
    of one, and None. Raises :class:`ParameterError`."""
    if given is None:
        return None
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        if "{" in given or given in BUILT_IN or re.fullmatch(r"[\w-]+", given):
            return given
        reason = getattr(error, "strerror", None) or error
        raise ParameterError(
            "chat_template",
            given,
            f"is neither a template, nor the name of one, nor a readable file: {reason}",
        ) from None


def _either(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


def _files(path: Path) -> dict[str, Path]:
    first = path / "chat_template.jinja"
    more = sorted((path / "additional_chat_templates").glob("*.jinja"))
    return ({DEFAULT: first} if first.is_file() else {}) | {
        file.stem: file for file in more if file.is_file()
    }


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{file}: is not UTF-8: {error}") from None


def _named(given: Any) -> dict[str, str]:
    """Templates of one text, of a list of objects with ``name`` and ``template``, or of an object by name."""
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, Mapping)}
    if not isinstance(given, Mapping):
        return {}
    return {name: text for name, text in given.items() if isinstance(name, str) and isinstance(text, str)}
