"""The forms of strings and numbers that xgrammar enforces exactly, for schemas of one such type."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from vllmlite.guided.json_formats import FORMATS, UNSUPPORTED_FORMATS, format_expression
from vllmlite.guided.json_keywords import KEYWORDS, MAX_INTEGER, Impossible, Schema, SchemaError
from vllmlite.guided.json_pattern import MAX_COUNT, PatternError, string_pattern

MAX_MULTIPLES = 1000
"""Maximum number of values of a ``multipleOf`` that are listed one by one."""


def counts(said: Schema, least: str, most: str) -> tuple[int, float]:
    """Return the lower and upper bound of a count. Raises SchemaError if one is above MAX_COUNT."""
    for keyword in (least, most):
        if said.get(keyword, 0) > MAX_COUNT:
            raise SchemaError(f"{keyword}={said[keyword]}: must be at most {MAX_COUNT}")
    return _limits(said, least, most)


def _limits(said: Schema, least: str, most: str) -> tuple[int, float]:
    return int(said.get(least, 0)), int(said[most]) if most in said else math.inf


def exact_pattern(pattern: str | None, least: int, most: float) -> str:
    """Return an expression for strings of ``least`` to ``most`` characters that match ``pattern`` (None: any)."""
    try:
        return string_pattern(pattern, least, most)
    except PatternError as error:
        about = "a string" if pattern is None else f"pattern {pattern!r}"
        raise SchemaError(f"{about} {error}") from None


def exact_string(said: Schema) -> Schema:
    """Return the form of a schema of strings: a pattern that includes its lengths and its format."""
    least, most = _limits(said, "minLength", "maxLength")
    pattern, name = said.get("pattern"), said.get("format")
    if name in UNSUPPORTED_FORMATS:
        raise SchemaError(f"format {name!r} has no grammar; accepted: {', '.join(FORMATS)}")
    if name in FORMATS:
        if pattern is not None:
            raise SchemaError(f"has format {name!r} beside a pattern: give only one of them")
        pattern = format_expression(name, most)
    if pattern is None and (least, most) == (0, math.inf):
        return {"type": "string"}
    return {"type": "string", "pattern": exact_pattern(pattern, least, most)}


def _bounds(said: Schema, step: Decimal) -> tuple[Decimal | None, Decimal | None]:
    """Return the smallest and the largest multiple of ``step`` within the schema's bounds."""
    limits: dict[str, Decimal] = {}
    for keyword in KEYWORDS["number"] & said.keys():
        limits[keyword] = Decimal(repr(said[keyword]))
    low: Decimal | None = None
    high: Decimal | None = None
    if "minimum" in limits:
        low = _round(limits["minimum"], step, ROUND_CEILING)
    if "exclusiveMinimum" in limits:
        above = _round(limits["exclusiveMinimum"], step, ROUND_FLOOR) + step
        low = above if low is None else max(low, above)
    if "maximum" in limits:
        high = _round(limits["maximum"], step, ROUND_FLOOR)
    if "exclusiveMaximum" in limits:
        below = _round(limits["exclusiveMaximum"], step, ROUND_CEILING) - step
        high = below if high is None else min(high, below)
    if low is not None and high is not None and low > high:
        reason = "" if step == 1 else ", and no number is written with more than six decimals"
        raise Impossible(f"allows nothing: no multiple of {step} is within its bounds{reason}")
    return low, high


def _round(value: Decimal, step: Decimal, rounding: str) -> Decimal:
    if abs(value) > MAX_INTEGER:
        raise SchemaError(f"has the bound {value}, which is over 2^63 - 1")
    return (value / step).to_integral_value(rounding) * step


def _multiples(said: Schema, step: Decimal) -> Schema:
    """Return an enum of all multiples of ``step`` within the bounds, if there are few enough."""
    low, high = _bounds(said, step)
    if low is None or high is None or (high - low) / step >= MAX_MULTIPLES:
        raise SchemaError(
            f"has multipleOf, which a grammar can enforce where bounds leave at most {MAX_MULTIPLES} numbers"
        )
    values = [low + step * index for index in range(int((high - low) / step) + 1)]
    return {"enum": [int(value) if value == int(value) else float(value) for value in values]}


def exact_integer(said: Schema) -> Schema:
    """Return the form of a schema of integers: inclusive bounds, or an enum of its multiples."""
    step = Decimal(repr(said.get("multipleOf", 1)))
    if step != int(step):
        whole = [value for value in _multiples(said, step)["enum"] if value == int(value)]
        if not whole:
            raise Impossible("allows nothing: no multiple of multipleOf is an integer")
        return {"enum": whole}
    if step != 1:
        return _multiples(said, step)
    low, high = _bounds(said, Decimal(1))
    written: Schema = {"type": "integer"}
    if low is not None:
        written["minimum"] = int(low)
    if high is not None:
        written["maximum"] = int(high)
    return written


def exact_number(said: Schema) -> Schema:
    """Return the form of a schema of numbers: inclusive bounds, or an enum of its multiples."""
    if said.get("multipleOf", 0) == 1:
        return exact_integer(said)
    if "multipleOf" in said:
        return _multiples(said, Decimal(repr(said["multipleOf"])))
    low, high = _bounds(said, Decimal("0.000001"))
    written: Schema = {"type": "number"}
    if low is not None:
        least = float(low)
        written["minimum"] = least if Decimal(repr(least)) >= low else math.nextafter(least, math.inf)
    if high is not None:
        most = float(high)
        written["maximum"] = most if Decimal(repr(most)) <= high else math.nextafter(most, -math.inf)
    return written
