"""JSON Schema's regular expressions, restricted to the inside of a JSON string.

A grammar of JSON describes its text, in which a quotation mark, a backslash or a control character cannot be part of a
string as it is. Patterns are parsed with Python's own parser and written again with every character class spelled out
and limited to permitted characters, so that ``.`` and ``[^a]`` stay inside the string. A pattern must match the whole
string: where JSON Schema would search for a match, the grammar allows less, never more.
"""

from __future__ import annotations

import math
import re
import re._constants as syntax  # type: ignore[import-not-found]  # of the standard library, without stubs
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Ranges = list[tuple[int, int]]

SAFE: Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF)]
"""Characters that a JSON string contains unescaped: no quotation mark, backslash, control character, surrogate."""
LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
"""Characters that ``.`` does not match."""
CATEGORIES: dict[Any, Ranges] = {
    syntax.CATEGORY_DIGIT: [(0x30, 0x39)],
    syntax.CATEGORY_WORD: [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    syntax.CATEGORY_SPACE: [(0x20, 0x20), (0xA0, 0xA0)],
}
"""ECMA 262's character classes, which are subsets of Python's; for white space only plain spaces are generated."""
WHITE_SPACE: Ranges = [
    (0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
"""All characters that ECMA 262 or Python consider white space: none is generated where white space is excluded."""
NEGATED = {
    syntax.CATEGORY_NOT_DIGIT: syntax.CATEGORY_DIGIT,
    syntax.CATEGORY_NOT_WORD: syntax.CATEGORY_WORD,
    syntax.CATEGORY_NOT_SPACE: syntax.CATEGORY_SPACE,
}
MAX_COUNT = 1 << 20
"""Largest repetition count; xgrammar's time does not depend on it."""
SPECIAL = frozenset("\\^$.|?*+()[]{}-/")


class PatternError(ValueError):
    """Raised for a pattern that has no grammar; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an expression, with the minimum and the maximum number of characters that it matches."""

    text: str
    low: int
    high: float
    repeated: tuple[str, int, float] | None = None
    """(expression of one character, minimum, maximum) if the piece is a repetition of one character."""


def string_pattern(pattern: str | None, min_length: int, max_length: float) -> str:
    """Return an anchored expression for strings that match ``pattern`` (if given) and have a length within the bounds.

    Raises :class:`PatternError` if there is none."""
    if min_length > max_length:
        raise PatternError(f"allows nothing: minLength {min_length} is over maxLength {max_length}")
    if pattern is None:
        return f"^{_times(_class(SAFE), min_length, max_length)}$"
    pieces = _fitted(_pieces(_anchors_off(_parsed(pattern))), min_length, max_length)
    return f"^{''.join(piece.text for piece in pieces)}$"


def other_than(names: Iterable[str]) -> str:
    """Return an anchored expression for every string that is not in ``names``."""
    excluded = {name for name in names if all(_within(ord(character)) for character in name)}
    return f"^{_other_than(excluded)}$"


def _other_than(words: set[str]) -> str:
    heads = sorted({word[0] for word in words if word})
    fresh = _class(_without(SAFE, [(ord(head), ord(head)) for head in heads]))
    options = [f"{fresh}{_class(SAFE)}*"]
    for head in heads:
        options.append(_literal(head) + _other_than({word[1:] for word in words if word[:1] == head}))
    return f"({'|'.join(options)}){'' if '' in words else '?'}"


def _parsed(pattern: str) -> Any:
    try:
        found = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"is not a regular expression: {error}") from None
    if found.state.flags & ~re.UNICODE:
        raise PatternError("must not set flags")
    return found


def _anchors_off(items: Any) -> list[Any]:
    """Remove ``^`` at the beginning and ``$`` at the end, also in alternatives: the whole string is matched anyway."""
    found = list(items)
    if found and found[0] in ((syntax.AT, syntax.AT_BEGINNING), (syntax.AT, syntax.AT_BEGINNING_STRING)):
        del found[0]
    if found and found[-1] in ((syntax.AT, syntax.AT_END), (syntax.AT, syntax.AT_END_STRING)):
        del found[-1]
    if len(found) == 1 and found[0][0] is syntax.BRANCH:
        found = [(syntax.BRANCH, (None, [_anchors_off(branch) for branch in found[0][1][1]]))]
    elif len(found) == 1 and found[0][0] is syntax.SUBPATTERN:
        group, on, off, inner = found[0][1]
        found = [(syntax.SUBPATTERN, (group, on, off, _anchors_off(inner)))]
    return found


def _pieces(items: Iterable[Any]) -> list[Piece]:
    return [_piece(operation, value) for operation, value in items]


def _joined(items: Iterable[Any]) -> Piece:
    pieces = _pieces(items)
    text = "".join(piece.text for piece in pieces)
    return Piece(text, sum(piece.low for piece in pieces), sum(piece.high for piece in pieces))


def _piece(operation: Any, value: Any) -> Piece:
    if operation is syntax.LITERAL:
        if not _within(value):
            raise PatternError(f"has {chr(value)!r}, which a JSON string can only contain escaped")
        return Piece(_literal(chr(value)), 1, 1)
    if operation is syntax.NOT_LITERAL:
        return Piece(_class(_without(SAFE, [(value, value)])), 1, 1)
    if operation is syntax.ANY:
        return Piece(_class(_without(SAFE, LINE_ENDS)), 1, 1)
    if operation is syntax.IN:
        return Piece(_class(_members(value)), 1, 1)
    if operation is syntax.BRANCH:
        branches = [_joined(branch) for branch in value[1]]
        text = "|".join(branch.text for branch in branches)
        return Piece(f"({text})", min(b.low for b in branches), max(b.high for b in branches))
    if operation is syntax.SUBPATTERN:
        _, on, off, inner = value
        if on or off:
            raise PatternError("must not set flags")
        found = _joined(inner)
        return Piece(f"({found.text})", found.low, found.high)
    if operation in (syntax.MAX_REPEAT, syntax.MIN_REPEAT):
        least, most, inner = value
        most = math.inf if most is syntax.MAXREPEAT else most
        found = _joined(inner)
        single = len(inner) == 1 and inner[0][0] in (
            syntax.LITERAL,
            syntax.NOT_LITERAL,
            syntax.ANY,
            syntax.IN,
        )
        one = found.text if single else f"({found.text})"
        high = found.high * most if found.high and most else 0
        return Piece(
            _times(one, least, most), found.low * least, high, (one, least, most) if single else None
        )
    raise PatternError(f"has an operation that a grammar cannot enforce: {str(operation).lower()}")


def _fitted(pieces: list[Piece], min_length: int, max_length: float) -> list[Piece]:
    """Limit ``pieces`` to a length within the bounds.

    Raises PatternError unless the length depends on the repetition of a single character only."""
    low, high = sum(piece.low for piece in pieces), sum(piece.high for piece in pieces)
    if low >= min_length and high <= max_length:
        return pieces
    if high < min_length or low > max_length:
        raise PatternError("allows nothing of such a length")
    loose = [index for index, piece in enumerate(pieces) if piece.low != piece.high]
    if len(loose) != 1 or (repeated := pieces[loose[0]].repeated) is None:
        raise PatternError("cannot be combined with minLength or maxLength: put the length into the pattern")
    one, least, most = repeated
    others = low - pieces[loose[0]].low
    least, most = max(least, min_length - others), min(most, max_length - others)
    fitted = Piece(_times(one, least, most), least, most)
    return [*pieces[: loose[0]], fitted, *pieces[loose[0] + 1 :]]


def _members(items: Iterable[Any]) -> Ranges:
    found: Ranges = []
    negate = False
    for operation, value in items:
        if operation is syntax.NEGATE:  # it comes first
            negate = True
        elif operation is syntax.LITERAL:
            found.append((value, value))
        elif operation is syntax.RANGE:
            found.append(value)
        else:
            kind = NEGATED.get(value, value)
            removed = negate != (value in NEGATED)
            ranges = WHITE_SPACE if removed and kind is syntax.CATEGORY_SPACE else CATEGORIES[kind]
            found += _without([(0, 0x10FFFF)], ranges) if value in NEGATED else ranges
    inside = _without(SAFE, found)
    return inside if negate else _without(SAFE, inside)


def _without(ranges: Ranges, removed: Ranges) -> Ranges:
    """Return ``ranges`` (sorted and disjoint) minus ``removed``."""
    gaps: Ranges = []
    for low, high in sorted(removed):
        if gaps and low <= gaps[-1][1] + 1:
            gaps[-1] = (gaps[-1][0], max(gaps[-1][1], high))
        else:
            gaps.append((low, high))
    found: Ranges = []
    at = 0
    for first, last in ranges:
        while at < len(gaps) and gaps[at][0] <= last:
            low, high = gaps[at]
            if low > first:
                found.append((first, low - 1))
            first = max(first, high + 1)
            if high > last:
                break  # it may reach into the next range
            at += 1
        if first <= last:
            found.append((first, last))
    return found


def _within(code: int) -> bool:
    return any(low <= code <= high for low, high in SAFE)


def _class(ranges: Ranges) -> str:
    if not ranges:
        raise PatternError("has a character class of which a JSON string contains none unescaped")
    parts = (
        _literal(chr(low)) if low == high else f"{_literal(chr(low))}-{_literal(chr(high))}"
        for low, high in ranges
    )
    return f"[{''.join(parts)}]"


def _literal(character: str) -> str:
    return "\\" + character if character in SPECIAL else character


def _times(one: str, least: int, most: float) -> str:
    count = least if most == math.inf else most
    if count > MAX_COUNT:
        raise PatternError(f"has the length or count {count}, which must be at most {MAX_COUNT}")
    if most == math.inf:
        return one + ("*" if least == 0 else "+" if least == 1 else f"{{{least},}}")
    return one if least == most == 1 else f"{one}{{{least},{int(most)}}}"
