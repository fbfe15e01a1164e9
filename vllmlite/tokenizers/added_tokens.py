"""Tokens that a checkpoint's ``tokenizer_config.json`` adds to its ``tokenizer.json``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from vllmlite.chat.special_tokens import LISTS, NAMED, is_unicode
from vllmlite.errors import ModelError

logger = logging.getLogger(__name__)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(fast: Tokenizer, config: Mapping[str, Any], special: Mapping[str, Any], file: Path) -> None:
    """Add the missing entries of ``added_tokens_decoder`` to ``fast`` and mark its ``special`` tokens as special.

    transformers does the same. ``file`` is the path of ``config``, for messages. Raises ModelError for a malformed
    entry."""
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or not all(
        key.isascii() and key.isdigit() and len(key) < 10 for key in entries
    ):
        raise ModelError(f"{file}: added_tokens_decoder: expected an object of tokens by id")
    declared = {int(key): _token(key, entry, file) for key, entry in entries.items()}
    # The library gives new tokens the next ids; it keeps the ids of tokens that exist and updates their flags.
    fast.add_tokens([declared[index] for index in sorted(declared)])
    wrong = [i for i, token in declared.items() if fast.token_to_id(token.content) != i]
    if wrong:
        token = declared[wrong[0]].content
        logger.warning(
            "%s: added_tokens_decoder: %r has id %d; the tokenizer gives %s, as transformers does",
            file, token, wrong[0], fast.token_to_id(token),
        )  # fmt: skip
    texts = [special[name] for name in NAMED if name in special]
    texts += [text for name in LISTS for text in special.get(name, ())]
    known = {token.content for token in fast.get_added_tokens_decoder().values()}
    missing = [
        text for text in dict.fromkeys(texts) if text not in known and fast.token_to_id(text) is not None
    ]
    fast.add_tokens([AddedToken(text, special=True) for text in missing])


def _token(key: str, entry: Any, file: Path) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    flags = {name: entry[name] for name in FLAGS if name in entry} if isinstance(entry, dict) else {}
    if (
        not isinstance(content, str)
        or not is_unicode(content)
        or not all(isinstance(value, bool) for value in flags.values())
    ):
        raise ModelError(f"{file}: added_tokens_decoder: {key}: expected a token with its content and flags")
    return AddedToken(content, **flags)
