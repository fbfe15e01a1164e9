"""Conversion of llama.cpp's GBNF (described in its ``grammars/README.md``) to xgrammar's EBNF."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r'\s+|#[^\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[A-Za-z_][\w.\-]*(?:\s*::=)?|\{,|.', re.DOTALL
)
"""Whitespace, comment, string, character class, name (with ``::=`` if it defines a rule), ``{,``, or one character."""


def readable(grammar: str) -> str:
    """Return ``grammar`` in xgrammar's syntax: empty alternatives, ``.`` and ``{,n}`` are rewritten."""
    written: list[str] = []
    opened = False
    for token in _TOKEN.findall(grammar):
        if token.isspace() or token.startswith("#"):
            written.append(token)
            continue
        if opened and (token in "|)" or token.endswith("::=")):
            written.append('"" ')
        opened = token in "|(" or token.endswith("::=")
        written.append({".": r"[\0-\U0010ffff]", "{,": "{0,"}.get(token, token))
    if opened:
        written.append(' ""')
    return "".join(written)
