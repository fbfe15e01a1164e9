"""Matching module names with regular expressions that a file contains.

Some expressions take time exponential in the length of the text (``(a+)+``), during which Python runs nothing else.
Those with more than one quantifier are therefore matched in a process of their own, which is stopped after a while.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from vllmlite.errors import ModelError

SECONDS = 10
"""Maximum time to match all names with one expression."""
MAX_LENGTH = 10_000
"""Maximum characters of an expression."""

_PROGRAM = """
import json, re, sys
expression, names = json.load(sys.stdin)
found = re.compile(expression)
json.dump([name for name in names if found.fullmatch(name)], sys.stdout)
"""


def matching(where: str, pattern: str, names: Iterable[str], *, ends: bool = False) -> set[str]:
    """Return the ``names`` that ``pattern`` matches as a whole or, with ``ends``, from one of their dots on. Raises
    ModelError, which begins with ``where``, if it is not a regular expression or takes too long."""
    listed: Sequence[str] = list(names)
    if len(pattern) > MAX_LENGTH:
        raise ModelError(f"{where}: is longer than {MAX_LENGTH} characters")
    complete = rf"(?:.*\.)?(?:{pattern})" if ends else pattern
    try:
        re.compile(pattern)
        expression = re.compile(complete)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{where}={pattern[:80]!r}: is not a regular expression: {error}") from None
    if sum(pattern.count(quantifier) for quantifier in "*+?{") <= 1:
        return {name for name in listed if expression.fullmatch(name)}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([complete, listed]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{where}={pattern[:80]!r}: takes more than {SECONDS} s to match module names"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise ModelError(f"{where}={pattern[:80]!r}: cannot be matched in a process: {error}") from error
    return set(json.loads(done.stdout))
