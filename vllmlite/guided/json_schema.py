"""Rewrite JSON Schemas to the few forms that xgrammar enforces exactly, or give the reason why that is impossible.

xgrammar accepts nearly any schema and drops what it cannot express: keywords beside ``anyOf`` or ``$ref``, lengths
beside a pattern, bounds without a type. :func:`exact` rewrites a schema (draft 2020-12, and what remains of older
drafts) so that nothing is dropped. The result may allow less than the schema, never more: keys come in the order of
``properties``, an object that names properties has no others unless the schema allows them explicitly, and a pattern
matches the whole string.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from vllmlite.guided.json_branches import Branch, disjoint
from vllmlite.guided.json_keywords import (
    CLOSED,
    IN_PLACE,
    KEYWORDS,
    LARGER,
    LITERAL,
    SMALLER,
    TYPES,
    Impossible,
    Schema,
    SchemaError,
    allowed_values,
    expanded,
    identity,
    keywords_of,
    kinds_of,
    literals,
    types_of,
)
from vllmlite.guided.json_pattern import other_than
from vllmlite.guided.json_scalars import counts, exact_integer, exact_number, exact_pattern, exact_string

MAX_SCHEMAS = 5000
"""Maximum number of subschemas, counting each use of a merged one."""


def exact(schema: Any) -> Schema:
    """Return an equivalent schema of which xgrammar enforces every part, or a narrower one. Raises :class:`SchemaError`
    if there is none."""
    writer = _Writer(schema)
    try:
        written = writer.write(schema)
    except RecursionError:
        raise SchemaError("is too deep") from None
    return {**written, "$defs": writer.definitions} if writer.definitions else written


class _Writer:
    """Rewrites the schemas of one document."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[tuple[str, ...], str] = {}
        """Definition names by ``$ref`` pointer and additionally required properties."""
        self._budget = MAX_SCHEMAS
        self.definitions: dict[str, Schema] = {}

    def write(self, schema: Any) -> Schema:
        """Return the rewritten form of one schema."""
        self._spend(1)
        said = keywords_of(schema)
        if said.keys() == {"$ref"}:
            return self._reference(said["$ref"])
        if said.keys() == {"$ref", "required"}:
            return self._reference(said["$ref"], tuple(said["required"]))
        closed = {CLOSED: False} if said.pop(CLOSED, True) is False else {}
        for keyword in ("$ref", "allOf"):
            if keyword in said:
                parts = [self._target(said["$ref"])] if keyword == "$ref" else said["allOf"]
                rest = {name: value for name, value in said.items() if name != keyword}
                for part in parts:
                    rest = self._merged(rest, part)
                return self.write({**rest, **closed})
        for keyword in ("anyOf", "oneOf"):
            if keyword in said:
                branches = said[keyword]
                rest = {name: value for name, value in said.items() if name != keyword}
                if keyword == "oneOf":
                    alone = not KEYWORDS["object"] & rest.keys()
                    branches = disjoint([self._branch(branch) for branch in branches], alone)
                return self._any_of(branches, rest, closed)
        if "enum" in said or "const" in said:
            about = {"pattern": said["pattern"]} if "pattern" in said else {}
            return {"enum": allowed_values(said), **about}
        types = types_of(said)
        if not types:
            return {}
        if len(types) > 1:
            return self._any_of([{**said, "type": kind} for kind in types], {}, {})
        kind = types[0]
        mine = {name: value for name, value in said.items() if name in KEYWORDS.get(kind, ())}
        writers: dict[str, Callable[[Schema], Schema]] = {
            "string": exact_string,
            "number": exact_number,
            "integer": exact_integer,
            "array": self._array,
            "object": self._object,
        }
        written = writers[kind](mine) if kind in writers else {"type": kind}
        self._spend(len(written.get("enum", ())) // 10)
        return written

    def _spend(self, work: int) -> None:
        """Count work, so that a short schema cannot cause much of it. Raises SchemaError over the limit."""
        self._budget -= work
        if self._budget < 0:
            raise SchemaError(
                f"must have at most {MAX_SCHEMAS} subschemas, counting each use of a merged one"
            )

    def _any_of(self, branches: list[Any], rest: Schema, closed: Schema) -> Schema:
        """Return a schema for any of ``branches`` combined with ``rest``; ``closed`` applies to the combination."""
        written = []
        for branch in branches:
            try:
                both = self._merged(rest, branch) if rest else branch
                written.append(self.write({**keywords_of(both), **closed} if closed else both))
            except Impossible:  # the others remain
                continue
        if not written:
            raise Impossible("allows nothing")
        return written[0] if len(written) == 1 else {"anyOf": written}

    def _reference(self, pointer: str, required: tuple[str, ...] = ()) -> Schema:
        key = (pointer, *required)
        if key not in self._names:
            seen: set[str] = set()
            target, at = self._target(pointer), pointer
            while keywords_of(target).keys() == {"$ref"}:
                if at in seen:
                    raise SchemaError(f"$ref {pointer} leads back to itself")
                seen.add(at)
                at = keywords_of(target)["$ref"]
                target = self._target(at)
            name = self._names[key] = f"r{len(self._names)}"
            try:
                if required:
                    target = self._merged(target, {"required": [*required]})
                self.definitions[name] = self.write(target)
            except Impossible as error:  # references to it may have been written already
                raise SchemaError(str(error)) from None
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _target(self, pointer: str) -> Any:
        """Return the part of the document that ``pointer`` (``#`` and a JSON pointer, RFC 6901) refers to."""
        if not (pointer == "#" or pointer.startswith("#/")):
            raise SchemaError(f"$ref {pointer!r} must be # or begin with #/: external schemas are not read")
        found = self._root
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise SchemaError(f"$ref {pointer} points to nothing")
        return found

    def _merged(self, first: Any, second: Any) -> Any:
        """Return a schema for values that satisfy both."""
        one, two = keywords_of(first), keywords_of(second)
        if CLOSED in one or CLOSED in two:
            raise SchemaError(f"has {CLOSED} in a schema that is combined with others")
        if not one or not two:
            return one or two
        if "$ref" in one:
            rest = {name: value for name, value in one.items() if name != "$ref"}
            return self._merged(self._merged(rest, self._target(one["$ref"])), two)
        if "$ref" in two:
            return self._merged(two, one)
        self._spend(1 + _weight(one) + _weight(two))
        _check_same_scope(one, two)
        both = dict(one)
        for keyword, value in two.items():
            both[keyword] = self._both(keyword, one[keyword], value) if keyword in one else value
        return both

    def _both(self, keyword: str, one: Any, two: Any) -> Any:
        if one == two and json.dumps(one) == json.dumps(two):
            return one
        if keyword == "type":
            common = sorted(set(expanded(one)) & set(expanded(two)))
            if not common:
                raise Impossible(f"allows nothing: type {one!r} and {two!r}")
            return common
        if keyword == "required":
            return list(dict.fromkeys([*one, *two]))
        if keyword == "properties":
            shared = {name: self._merged(one[name], two[name]) for name in one if name in two}
            return {**one, **two, **shared}
        if keyword == "allOf":
            return one + two
        if keyword in LARGER | SMALLER:
            return (max if keyword in LARGER else min)(one, two)
        if keyword == "enum":
            allowed = {identity(value) for value in two}
            return [value for value in one if identity(value) in allowed]
        if keyword == "const":
            raise Impossible(f"allows nothing: const {one!r} and {two!r}")
        raise SchemaError(f"has {keyword} twice for the same value, which cannot be combined")

    def _branch(self, branch: Any) -> Branch:
        """Return the properties that distinguish a branch of ``oneOf``, with its references followed."""
        said = seen = keywords_of(branch)
        for _ in range(8):
            if "$ref" not in seen:
                break
            rest = {name: value for name, value in seen.items() if name not in ("$ref", CLOSED)}
            seen = keywords_of(self._merged(rest, self._target(seen["$ref"])))
        self._spend(_weight(seen))
        tags = {}
        for name, value in seen.get("properties", {}).items():
            if isinstance(value, dict) and isinstance(value.get("$ref"), str):
                value = self._target(value["$ref"])
            if isinstance(value, dict):
                self._spend(_weight(value))
            if (values := literals(value)) is not None:
                tags[name] = values
        kinds = kinds_of(seen) or [kind for kind in TYPES if kind != "integer"]
        required = frozenset(seen.get("required", []))
        names, shut = None, seen.get("additionalProperties") is False
        if (shut or ("properties" in seen and "additionalProperties" not in seen)) and not (
            {"patternProperties", "propertyNames"} | IN_PLACE
        ) & seen.keys():
            names = frozenset(seen.get("properties", {})) | (frozenset() if shut else required)
        return Branch(said, frozenset(kinds), literals(seen), tags, required, names, shut)

    def _array(self, said: Schema) -> Schema:
        if said.get("uniqueItems"):
            raise SchemaError("has uniqueItems, a keyword that a grammar cannot enforce")
        least, most = counts(said, "minItems", "maxItems")
        first, rest = said.get("prefixItems", []), said.get("items", True)
        if isinstance(rest, list):  # before draft 2020-12
            first, rest = rest, said.get("additionalItems", True)
        if rest is False:
            most = min(most, len(first))
        if most <= len(first):
            first, rest = first[: int(most)], False
        if least > most:
            raise Impossible("allows nothing: more items are needed than allowed")
        written: Schema = {"type": "array"}
        if first:
            written["prefixItems"] = [self.write(item) for item in first]
        written["items"] = False if rest is False else self.write(rest)
        if least:
            written["minItems"] = least
        if rest is not False and most != math.inf:
            written["maxItems"] = int(most)
        return written

    def _object(self, said: Schema) -> Schema:
        given, required = said.get("properties", {}), said.get("required", [])
        patterns = said.get("patternProperties", {})
        others = said.get("additionalProperties", not {"properties", "patternProperties"} & said.keys())
        least, most = counts(said, "minProperties", "maxProperties")
        names = any_name = {"type": "string"}
        if "propertyNames" in said:
            names = self.write(self._merged(said["propertyNames"], any_name))
        if names != any_name:
            if given or patterns:
                raise SchemaError(
                    "has propertyNames beside properties or patternProperties: give only one of them"
                )
            given, patterns, others = _named(names, others)
        if patterns:
            return self._of_patterns(given, patterns, required, least, most)
        properties: Schema = {}
        needed = frozenset(required)
        for name in dict.fromkeys([*given, *required]):
            schema = given.get(name, others)
            if schema is False and name in needed:
                raise Impossible(f"allows nothing: property {name!r} is required but not allowed")
            if schema is False:
                others = False  # otherwise it could be generated as one of them
                continue
            try:
                properties[name] = self.write(schema)
            except Impossible:
                if name in needed:
                    raise
                others = False
        written: Schema = {
            "type": "object",
            "properties": properties,
            "required": list(dict.fromkeys(required)),
        }
        if others is False:
            written["additionalProperties"] = False
            most = min(most, len(properties))
        elif properties:
            written["patternProperties"] = {other_than(properties): self.write(others)}
            written["additionalProperties"] = False
        else:
            written = {"type": "object", "additionalProperties": self.write(others)}
        return _counted(written, len(written.get("required", ())), len(properties), others, least, most)

    def _of_patterns(
        self, given: Schema, patterns: Schema, required: list[str], least: int, most: float
    ) -> Schema:
        """Return the object schema for one key pattern; with two patterns, a key might match both."""
        if given or required or len(patterns) > 1:
            raise SchemaError(
                "has patternProperties beside properties, required or another pattern: a key may match both"
            )
        ((pattern, schema),) = patterns.items()
        if schema is False:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        key = exact_pattern(pattern, 0, math.inf)
        written = {
            "type": "object",
            "patternProperties": {key: self.write(schema)},
            "additionalProperties": False,
        }
        return _counted(written, 0, 0, True, least, most)


def _weight(said: Schema) -> int:
    """Return the cost of reading a schema's names and literal values, where merging it costs 1."""
    names = sum(len(value) for value in said.values() if isinstance(value, (list, dict)))
    values = sum(len(json.dumps(said[keyword])) for keyword in LITERAL & said.keys())
    return names // 10 + values // 100


def _check_same_scope(one: Schema, two: Schema) -> None:
    """Raise SchemaError if merging would change the scope of a keyword.

    ``additionalProperties`` applies to the properties beside it, ``items`` to the prefix beside it."""
    for mine, other in ((one, two), (two, one)):
        closes = mine.get("additionalProperties", True) not in (True, {}) or "patternProperties" in mine
        if closes and other.get("properties", {}).keys() - mine.get("properties", {}).keys():
            raise SchemaError("combines additionalProperties with properties of another subschema")
        if "items" in mine and "prefixItems" in other and mine.get("prefixItems") != other["prefixItems"]:
            raise SchemaError("combines items with prefixItems of another subschema")


def _named(names: Schema, others: Any) -> tuple[Schema, Schema, Any]:
    """Return (properties, patternProperties, additionalProperties) equivalent to the rewritten ``propertyNames``."""
    if "enum" in names and "pattern" not in names:
        return dict.fromkeys(names["enum"], others), {}, False
    if "enum" not in names and "pattern" in names:
        return {}, {names["pattern"]: others}, False
    raise SchemaError("has propertyNames that are neither an enum nor a pattern")


def _counted(written: Schema, required: int, named: int, others: Any, least: int, most: float) -> Schema:
    """Add bounds on the number of properties, or raise SchemaError where a repeated name would make the count wrong."""
    if most < max(required, least):
        raise Impossible("allows nothing: more properties are needed than allowed")
    if least > required:
        if others is not False and (named or least > 1):
            raise SchemaError("has minProperties with unnamed properties, whose names may repeat")
        written["minProperties"] = least
    if most == 0:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if most != math.inf and (others is not False or most < named):
        written["maxProperties"] = int(most)
    return written
