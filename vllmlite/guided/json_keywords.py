"""The keywords of JSON Schema: the types they apply to, checks of their values, and the values a schema names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from vllmlite.guided.json_formats import FORMATS, UNSUPPORTED_FORMATS

TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
KEYWORDS: dict[str, frozenset[str]] = {
    "string": frozenset("minLength maxLength pattern format".split()),
    "number": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()),
    "array": frozenset("items prefixItems additionalItems minItems maxItems uniqueItems".split()),
    "object": frozenset(
        "properties required additionalProperties patternProperties propertyNames minProperties maxProperties".split()
    ),
}
"""Keywords by the type of the values they restrict."""
KEYWORDS["integer"] = KEYWORDS["number"]
APPLICATORS = frozenset("$ref allOf anyOf oneOf enum const type".split())
KNOWN = APPLICATORS.union(*KEYWORDS.values())
UNENFORCEABLE = frozenset(
    "contains not if dependentRequired dependentSchemas dependencies unevaluatedProperties unevaluatedItems "
    "$dynamicRef $recursiveRef".split()
)
"""Keywords that are refused. Keywords without effect unless one of these is present (``then``, ``minContains``) are
not listed."""
VACUOUS = {"not": False, "unevaluatedProperties": True, "unevaluatedItems": True}
"""Values with which an unenforceable keyword restricts nothing."""
CLOSED = "unevaluatedProperties"
IN_PLACE = frozenset("$ref allOf anyOf oneOf".split())
"""Keywords whose schemas apply to the same value, and may name its properties and items."""
NAMED = frozenset("properties patternProperties $defs definitions".split())
"""Keywords that map names, which are not keywords themselves, to schemas."""
LITERAL = frozenset("enum const default examples".split())
"""Keywords that contain values, not schemas."""
LARGER = frozenset("minimum exclusiveMinimum minLength minItems minProperties".split())
SMALLER = frozenset("maximum exclusiveMaximum maxLength maxItems maxProperties".split())
MAX_INTEGER = 2**63 - 1

Schema = dict[str, Any]


class SchemaError(ValueError):
    """Raised for a schema that has no grammar; the text is the reason."""


class Impossible(SchemaError):
    """Raised for a schema that no value satisfies."""


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _fraction(number: float) -> Fraction:
    """Return the exact value of the number's decimal notation."""
    return Fraction(repr(number))


def identity(value: Any) -> str:
    """Return a text that is the same for all values that JSON Schema considers equal."""
    return json.dumps(int(value) if _is_whole(value) else value, sort_keys=True)


FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys("$ref pattern format".split(), ("a text", lambda value: isinstance(value, str))),
    **dict.fromkeys(
        "allOf anyOf oneOf enum".split(),
        ("a list that is not empty", lambda value: isinstance(value, list) and bool(value)),
    ),
    "prefixItems": ("a list", lambda value: isinstance(value, list)),
    "required": ("a list of names", lambda value: isinstance(value, list) and _are_texts(value)),
    "type": (
        f"of {', '.join(TYPES)}",
        lambda value: _are_texts(_as_list(value)) and {*_as_list(value)} <= {*TYPES},
    ),
    **dict.fromkeys(
        "properties patternProperties".split(), ("a JSON object", lambda value: isinstance(value, Mapping))
    ),
    **dict.fromkeys(
        "minLength maxLength minItems maxItems minProperties maxProperties".split(),
        ("a whole number, at least 0", lambda value: _is_whole(value) and value >= 0),
    ),
    **dict.fromkeys(
        "minimum maximum exclusiveMinimum exclusiveMaximum".split(),
        ("a number", _is_number),
    ),
    "multipleOf": ("a number over 0", lambda value: _is_number(value) and value > 0),
    "uniqueItems": ("true or false", lambda value: isinstance(value, bool)),
}
"""Keyword → a description of the values that it may have, and a function that checks a value."""
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "minLength": lambda value, limit: not isinstance(value, str) or len(value) >= limit,
    "maxLength": lambda value, limit: not isinstance(value, str) or len(value) <= limit,
    "minimum": lambda value, limit: not _is_number(value) or value >= limit,
    "maximum": lambda value, limit: not _is_number(value) or value <= limit,
    "exclusiveMinimum": lambda value, limit: not _is_number(value) or value > limit,
    "exclusiveMaximum": lambda value, limit: not _is_number(value) or value < limit,
    "multipleOf": lambda value, step: not _is_number(value) or _fraction(value) % _fraction(step) == 0,
    "format": lambda value, name: not isinstance(value, str) or bool(re.fullmatch(FORMATS[name], value)),
    "minItems": lambda value, limit: not isinstance(value, list) or len(value) >= limit,
    "maxItems": lambda value, limit: not isinstance(value, list) or len(value) <= limit,
    "minProperties": lambda value, limit: not isinstance(value, dict) or len(value) >= limit,
    "maxProperties": lambda value, limit: not isinstance(value, dict) or len(value) <= limit,
    "required": lambda value, names: not isinstance(value, dict) or {*names} <= value.keys(),
}
"""Keyword → function that checks a value; values of types to which the keyword does not apply pass."""


def keywords_of(schema: Any) -> Schema:
    """Return the restricting keywords of a schema. Raises SchemaError for malformed or unenforceable ones."""
    if schema is True:
        return {}
    if schema is False:
        raise Impossible("allows nothing: a schema is false")
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{schema!r}: a schema must be a JSON object, true or false")
    said = {
        name: value
        for name, value in schema.items()
        if (name in KNOWN and value is not None) or name == "const"
    }
    for keyword, value in said.items():
        what, holds = FORMS.get(keyword, ("", None))
        if holds is not None and not holds(value):
            raise SchemaError(f"{keyword}={value!r}: must be {what}")
    if said.get("format") not in (None, *FORMATS, *UNSUPPORTED_FORMATS):
        del said["format"]
    for keyword in UNENFORCEABLE & schema.keys():
        value = schema[keyword]
        if value is None or value is VACUOUS.get(keyword):
            continue
        in_place = bool(IN_PLACE & said.keys())
        if value is not False or not keyword.startswith("unevaluated") or (in_place and keyword != CLOSED):
            raise SchemaError(f"has {keyword}, a keyword that a grammar cannot enforce")
        if in_place:
            said[CLOSED] = False  # applies to names in none of the merged schemas
        elif keyword == CLOSED:
            said.setdefault("additionalProperties", False)
        else:
            said.setdefault("additionalItems" if isinstance(said.get("items"), list) else "items", False)
    return said


def literals(schema: Any) -> set[str] | None:
    """Return the identities of the values in ``const`` or ``enum``; None if the schema has neither."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return {identity(schema["const"])}
    values = schema.get("enum")
    return {identity(value) for value in values} if isinstance(values, list) else None


def kinds_of(shape: Schema) -> list[str]:
    """Return the types that a schema allows (integer counted as number), or [] if it does not restrict them."""
    if "type" in shape:
        return ["number" if kind == "integer" else kind for kind in expanded(shape["type"])]
    named = shape.get("enum", [shape["const"]] if "const" in shape else [])
    return [_kind(value) for value in named]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return names[type(value)]


def types_of(said: Schema) -> list[str]:
    """Return the types of a schema; if it has no ``type``, the types that its keywords apply to."""
    if "type" not in said:
        return [kind for kind in ("string", "number", "array", "object") if KEYWORDS[kind] & said.keys()]
    kinds = expanded(said["type"])
    return [kind for kind in TYPES if kind in kinds and not (kind == "integer" and "number" in kinds)]


def expanded(given: Any) -> list[str]:
    """Return ``type`` as a list, with ``integer`` added if it contains ``number``."""
    kinds = _as_list(given)
    if not kinds:
        raise Impossible("allows nothing: no type")
    return [*kinds, *(["integer"] if "number" in kinds and "integer" not in kinds else [])]


def allowed_values(said: Schema) -> list[Any]:
    """Return the values of ``enum`` and ``const`` that satisfy the keywords beside them, except ``pattern``."""
    values = said["enum"] if "enum" in said else [said["const"]]
    if "enum" in said and "const" in said:
        values = [value for value in values if identity(value) == identity(said["const"])]
    for keyword in said:
        if keyword not in {"enum", "const", "type", "pattern", *CHECKS}:
            raise SchemaError(f"has {keyword} beside enum or const, where that is not checked")
    if said.get("format") in UNSUPPORTED_FORMATS:
        raise SchemaError(f"has format {said['format']!r} beside enum or const, where that is not checked")
    kinds = expanded(said["type"]) if "type" in said else TYPES
    found = [
        value
        for value in values
        if (_kind(value) in kinds or (_is_whole(value) and "integer" in kinds))
        and all(CHECKS[keyword](value, limit) for keyword, limit in said.items() if keyword in CHECKS)
    ]
    if not found:
        raise Impossible("allows nothing: no value of enum or const is left")
    if any(_is_number(number) and abs(number) > MAX_INTEGER for number in found):
        raise SchemaError("has a number in enum or const that is over 2^63 - 1")
    return found
