"""Match module names with regular expressions that come from a file.

Some expressions, such as ``(a+)+``, take time exponential in the length of the text, during which no other Python code
runs. Expressions with more than one quantifier are therefore matched in a separate process, which is stopped after
:data:`SECONDS`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from vllmlite.errors import ModelError

SECONDS = 10
"""Maximum time to match all names with the expressions of a field."""
MAX_LENGTH = 10_000
"""Maximum characters of an expression."""
MAX_PATTERNS = 1000
"""Maximum expressions of a field."""

_PROGRAM = """
import json, re, sys
expressions, names = json.load(sys.stdin)
json.dump([[name for name in names if re.fullmatch(each, name)] for each in expressions], sys.stdout)
"""


def matching(
    where: str, patterns: Sequence[str], names: Iterable[str], *, ends: bool = False
) -> list[set[str]]:
    """Return the ``names`` that each of ``patterns`` matches as a whole or, with ``ends``, from one of their dots on.

    Raises ModelError, which begins with ``where``, if one is not a regular expression, or they take too long."""
    listed = list(names)
    if len(patterns) > MAX_PATTERNS:
        raise ModelError(f"{where}: has {len(patterns)} expressions; accepted: at most {MAX_PATTERNS}")
    expressions = [_complete(where, pattern, ends) for pattern in patterns]
    slow = [index for index, pattern in enumerate(patterns) if _may_be_slow(pattern)]
    in_process = dict(zip(slow, _match_apart(where, [expressions[i] for i in slow], listed), strict=True))
    return [
        in_process[index]
        if index in in_process
        else {name for name in listed if re.fullmatch(expression, name)}
        for index, expression in enumerate(expressions)
    ]


def _may_be_slow(pattern: str) -> bool:
    return sum(pattern.count(quantifier) for quantifier in "*+?{") > 1


def _complete(where: str, pattern: str, ends: bool) -> str:
    """Return the expression that matches whole names."""
    if len(pattern) > MAX_LENGTH:
        raise ModelError(f"{where}: is longer than {MAX_LENGTH} characters")
    complete = rf"(?:.*\.)?(?:{pattern})" if ends else pattern
    try:
        re.compile(pattern)
        re.compile(complete)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{where}={pattern[:80]!r}: is not a regular expression: {error}") from None
    return complete


def _match_apart(where: str, expressions: list[str], names: list[str]) -> list[set[str]]:
    """Match ``expressions`` with ``names`` in a separate process."""
    if not expressions:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([expressions, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{where}: takes more than {SECONDS} s to match module names") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise ModelError(f"{where}: cannot be matched in a process: {error}") from error
    return list(map(set, json.loads(done.stdout)))
