"""llama.cpp's form of EBNF (GBNF, its ``grammars/README.md``) as xgrammar reads it."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r'\s+|#[^\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[A-Za-z_][\w.\-]*(?:\s*::=)?|\{,|.', re.DOTALL
)
"""White space, a comment, a text, a class, a name (with what makes it a rule's), the beginning of ``{,n}``, a sign."""


def readable(grammar: str) -> str:
    """``grammar``, where alternatives of nothing, ``.`` and ``{,n}`` are written as xgrammar has them."""
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
