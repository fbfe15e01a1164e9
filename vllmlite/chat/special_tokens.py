"""Special tokens that a checkpoint names, as variables of its chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmlite.weights.json_object import read_object

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that transformers knows for every model."""
LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Fields that list further special tokens. In the second, newer one a model may give them names."""


def read_special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens of the checkpoint at ``path``: text by name, and the lists of :data:`LISTS`.

    ``config``, the contents of ``tokenizer_config.json``, takes precedence over ``special_tokens_map.json``. Raises
    ModelError if the latter is not a JSON object."""
    found: dict[str, Any] = {}
    listed: dict[str, str] = {}
    mapped = read_object(path / "special_tokens_map.json", optional=True) if path.is_dir() else {}
    for source in (mapped, config):
        for name in NAMED:
            if (text := _text(source.get(name))) is not None:
                found[name] = text
        for name in LISTS:
            entries = source.get(name)
            if isinstance(entries, Mapping):  # names such as image_token
                found |= {
                    str(key): text for key, entry in entries.items() if (text := _text(entry)) is not None
                }
                entries = list(entries.values())
            if isinstance(entries, list):
                listed.update((text, text) for entry in entries if (text := _text(entry)) is not None)
    return found | {name: list(listed) for name in LISTS}


def _text(token: Any) -> str | None:
    """Return the text of a token given as text or as an object with ``content``; None for anything else."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and is_unicode(token) else None


def is_unicode(text: str) -> bool:
    """Return whether ``text`` has no lone surrogates. JSON can contain them, but no tokenizer accepts them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
