"""The chat templates that a checkpoint contains, and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmlite.chat.builtin import BUILT_IN, built_in
from vllmlite.errors import ModelError, ParameterError
from vllmlite.weights.json_object import read_object

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of the template used by default, and of the one preferred when the request has tools."""


def read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a checkpoint's chat templates by name, from the first of these places that has any:

    ``chat_template.jinja`` with ``additional_chat_templates/NAME.jinja``; ``config``, the contents of
    ``tokenizer_config.json`` (for a GGUF file, the equivalent metadata); ``chat_template.json``. Raises ModelError for
    an unreadable file."""
    files = _files(path)
    if files:
        return {name: _read(file) for name, file in files.items()}
    found = _named(config.get("chat_template"))
    if not found and path.is_dir():
        found = _named(read_object(path / "chat_template.json", optional=True).get("chat_template"))
    return found


def choose(templates: Mapping[str, str], wanted: str | None, *, with_tools: bool, bos: str) -> str:
    """Return the source of the chosen template.

    ``wanted`` is the name of one of ``templates``, the name of a built-in template, Jinja source, or None for the
    model's own template. ``bos`` is the bos token, or "" if the tokenizer adds none; a built-in template begins with
    it. Raises :class:`ParameterError`."""
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
        return built_in(wanted, bos)
    if "{" in wanted:
        return wanted
    raise ParameterError(
        "chat_template",
        wanted,
        f"must be a Jinja template or the name of one: {_either({**templates, **BUILT_IN})}",
    )


def read_template(given: str | None) -> str | None:
    """Return the contents of the template file ``given``; or ``given`` itself if it is None, Jinja source, or a
    possible template name. Raises :class:`ParameterError`."""
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
    """Return templates by name, from one text, a list of ``{name, template}`` objects, or an object by name."""
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, Mapping)}
    if not isinstance(given, Mapping):
        return {}
    return {name: text for name, text in given.items() if isinstance(name, str) and isinstance(text, str)}
