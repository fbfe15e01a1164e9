"""JSON Schemas: output generated under a schema is valid, and a keyword that no grammar can enforce is refused, not
ignored."""

from __future__ import annotations

import json
import math
import re
import time
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from vllmlite.guided.json_formats import FORMATS
from vllmlite.guided.json_keywords import SchemaError
from vllmlite.guided.json_pattern import PatternError, other_than, string_pattern
from vllmlite.guided.json_schema import exact

INTEGER = {"type": "integer"}
MANY: dict[str, Any] = {f"p{i}": {} for i in range(4000)}
SPACES = " \xa0\x85\u1680\u2000\u2005\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
"""White space in ECMA 262 or in Python."""
LEFT = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
RIGHT = {"type": "object", "properties": {"b": INTEGER}, "required": ["b"]}
NODE = {
    "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
    "$ref": "#/$defs/n",
}


def test_output_of_random_weights_is_valid() -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)")
    pytest.importorskip("jsonschema", reason="needs jsonschema (Debian: python3-jsonschema)")
    from schemas import Maker, judge

    from vllmlite import LLM

    maker = Maker(5)
    llm = LLM(load_format="dummy", max_model_len=1024, max_num_seqs=32, device="cpu")
    verdict = judge(llm, [maker.schema() for _ in range(12)], max_tokens=400, temperature=1.0)
    assert verdict.invalid == []
    assert verdict.num_valid >= 8


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        (True, {}),
        ({"title": "T", "default": 3, "x-order": 1}, {}),
        ({"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"minimum": 3}, {"type": "number", "minimum": 3.0}),
        ({"type": ["integer", "number"]}, {"type": "number"}),
        ({"type": "integer", "exclusiveMinimum": 0.5, "maximum": 3.7}, {**INTEGER, "minimum": 1, "maximum": 3}),
        ({"type": "number", "exclusiveMaximum": 1}, {"type": "number", "maximum": 0.999999}),
        ({"type": "string", "enum": ["a", 1]}, {"enum": ["a"]}),
        ({"enum": ["a", "abc"], "maxLength": 1}, {"enum": ["a"]}),
        ({"const": None}, {"enum": [None]}),
        ({"enum": ["ab", 1, "12"], "pattern": "^[a-z]"}, {"enum": ["ab", 1, "12"], "pattern": "^[a-z]"}),
        ({"enum": ["2024-02-29", "2023-02-29", 3], "format": "date"}, {"enum": ["2024-02-29", 3]}),
        ({"enum": [[], [1, 2], {}, {"a": 1}], "minItems": 1, "required": ["a"]}, {"enum": [[1, 2], {"a": 1}]}),
        ({"type": "number", "multipleOf": 0.1, "minimum": -0.1, "exclusiveMaximum": 0.35},
         {"enum": [-0.1, 0, 0.1, 0.2, 0.3]}),
        ({**INTEGER, "multipleOf": 2.5, "minimum": 1, "maximum": 10}, {"enum": [5, 10]}),
        ({"allOf": [{"$ref": "#/$defs/a"}, RIGHT], "unevaluatedProperties": False, "$defs": {"a": LEFT}},
         {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "required": ["a", "b"],
          "additionalProperties": False}),
        ({"$ref": "#/$defs/a", "properties": {"b": INTEGER}, "unevaluatedProperties": False, "$defs": {"a": LEFT}},
         {"type": "object", "properties": {"b": INTEGER, "a": INTEGER}, "required": ["a"],
          "additionalProperties": False}),
        ({"properties": {"c": INTEGER}, "anyOf": [LEFT, {}], "unevaluatedProperties": False},
         {"anyOf": [
             {"type": "object", "properties": {"c": INTEGER, "a": INTEGER}, "required": ["a"],
              "additionalProperties": False},
             {"type": "object", "properties": {"c": INTEGER}, "required": [], "additionalProperties": False}]}),
        ({"oneOf": [LEFT, {**RIGHT, "additionalProperties": False}]},
         {"anyOf": [{**LEFT, "additionalProperties": False}, {**RIGHT, "additionalProperties": False}]}),
        ({"oneOf": [LEFT, RIGHT, {"type": "null"}]},
         {"anyOf": [{**LEFT, "additionalProperties": False}, {**RIGHT, "additionalProperties": False},
                    {"type": "null"}]}),
        ({**INTEGER, "format": "int32", "enum": [1, 2, 4], "multipleOf": 2}, {"enum": [2, 4]}),
        ({"enum": [0.3, 0.35, "a"], "multipleOf": 0.1}, {"enum": [0.3, "a"]}),
        ({**INTEGER, "format": "int32", "not": False, "unevaluatedItems": True}, INTEGER),
        ({"allOf": [INTEGER], "minimum": 5}, {**INTEGER, "minimum": 5}),
        ({"allOf": [{**INTEGER, "minimum": 1}, {"minimum": 3, "maximum": 9}]}, {**INTEGER, "minimum": 3, "maximum": 9}),
        (
            {**INTEGER, "anyOf": [{"maximum": 1}, {"minimum": 5}]},
            {"anyOf": [{**INTEGER, "maximum": 1}, {**INTEGER, "minimum": 5}]},
        ),
        ({"oneOf": [INTEGER, {"type": "string"}]}, {"anyOf": [INTEGER, {"type": "string"}]}),
        ({"anyOf": [False, INTEGER]}, INTEGER),
        ({"type": "array", "items": [INTEGER], "additionalItems": False},
         {"type": "array", "prefixItems": [INTEGER], "items": False}),
        ({"type": "array", "prefixItems": [INTEGER, INTEGER], "maxItems": 1},
         {"type": "array", "prefixItems": [INTEGER], "items": False}),
        (
            {"type": "object", "required": ["z"], "additionalProperties": INTEGER},
            {"type": "object", "properties": {"z": INTEGER}, "required": ["z"], "additionalProperties": False,
             "patternProperties": {other_than(["z"]): INTEGER}},
        ),
        (
            {"type": "object", "properties": {"a": INTEGER, "b": False}, "minProperties": 1},
            {"type": "object", "properties": {"a": INTEGER}, "required": [], "additionalProperties": False,
             "minProperties": 1},
        ),
        ({"type": "object"}, {"type": "object", "additionalProperties": {}}),
        ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
         {"type": "object", "additionalProperties": INTEGER}),
        ({"type": "object", "propertyNames": {"type": "string"}, "properties": {"a": INTEGER}},
         {"type": "object", "properties": {"a": INTEGER}, "required": [], "additionalProperties": False}),
        ({"type": "object", "unevaluatedProperties": False},
         {"type": "object", "properties": {}, "additionalProperties": False}),
        ({"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False},
         {"type": "array", "prefixItems": [INTEGER], "items": False}),
        ({"type": "array", "items": [INTEGER], "unevaluatedItems": False},
         {"type": "array", "prefixItems": [INTEGER], "items": False}),
        ({"type": "array", "items": INTEGER, "unevaluatedItems": False}, {"type": "array", "items": INTEGER}),
        ({"type": "number", "minimum": 0.1, "exclusiveMaximum": 2**53 + 2},
         {"type": "number", "minimum": 0.1, "maximum": float(2**53)}),
        ({"$ref": "#/definitions/a", "definitions": {"a": INTEGER}},
         {"$ref": "#/$defs/r0", "$defs": {"r0": INTEGER}}),
        ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": INTEGER}}, {**INTEGER, "minimum": 3}),
        ({"items": {"$ref": "#/$defs/a~1b"}, "$defs": {"a/b": INTEGER}},
         {"type": "array", "items": {"$ref": "#/$defs/r0"}, "$defs": {"r0": INTEGER}}),
    ],
)  # fmt: skip
def test_a_translated_schema_enforces_all_keywords(schema: Any, written: dict[str, Any]) -> None:
    assert exact(schema) == written


def test_schemas_of_pydantic_are_accepted() -> None:
    pydantic = pytest.importorskip("pydantic", reason="needs pydantic (Debian: python3-pydantic)")
    from datetime import date, datetime, timedelta
    from decimal import Decimal
    from enum import Enum
    from typing import Annotated, Literal
    from uuid import UUID

    make, limits = pydantic.create_model, pydantic.Field
    cat = make("Cat", kind=(Literal["cat"], ...), lives=(int, 9))
    dog = make("Dog", kind=(Literal["dog", "puppy"], "dog"), name=(str, ...))
    pet = Annotated[cat | dog, limits(discriminator="kind")]  # type: ignore[valid-type]
    colour = Enum("colour", {"red": "red", "blue": "blue"})
    for kind in (
        colour, str | None, list[list[int]], dict[str, list[cat]], tuple[int, str], tuple[int, ...],  # type: ignore[valid-type]
        dict[colour, int], datetime, date, timedelta, UUID, Decimal, bytes, pydantic.AnyUrl, pet, list[pet],
        Annotated[int, limits(ge=0, lt=100, multiple_of=5)], Annotated[str, limits(min_length=1, max_length=50)],
        Annotated[str, limits(pattern=r"^\d{3}-\d{4}$")], Annotated[list[cat], limits(min_length=1, max_length=3)],  # type: ignore[valid-type]
    ):  # fmt: skip
        for mode in ("validation", "serialization"):
            assert exact(pydantic.TypeAdapter(kind).json_schema(mode=mode))


def test_recursive_schemas_are_accepted() -> None:
    written = exact(NODE)
    assert written["$ref"] == "#/$defs/r0"
    assert written["$defs"]["r0"]["properties"]["next"] == {"$ref": "#/$defs/r0"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (False, "allows nothing"),
        ({"anyOf": [False]}, "allows nothing"),
        ({"allOf": [{"type": "string"}, INTEGER]}, "allows nothing"),
        ({"type": "integer", "minimum": 0.5, "maximum": 0.6}, "allows nothing"),
        ({"enum": ["abc"], "type": "integer"}, "allows nothing"),
        (
            {"type": "object", "required": ["z"], "properties": {}, "additionalProperties": False},
            "allows nothing",
        ),
        ({"type": "number", "minimum": 1e-7, "maximum": 2e-7}, "more than six decimals"),
        ({"type": "number", "multipleOf": 0}, "a number over 0"),
        ({"type": "array", "contains": False}, "has contains"),
        ({"allOf": [{"allOf": [{}], "unevaluatedProperties": False}]}, "is combined with others"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "unevaluatedItems": False}, "has unevaluatedItems"),
        ({"type": "array", "unevaluatedItems": INTEGER}, "has unevaluatedItems"),
        ({"type": "string", "maxLength": 2**20 + 1}, "at most 1048576"),
        ({"type": "array", "maxItems": 2**20 + 1}, "at most 1048576"),
        ({"type": "object", "propertyNames": {"maxLength": 3}, "properties": {"a": {}}}, "beside properties"),
        ({"not": {"type": "string"}}, "cannot enforce"),
        ({"if": INTEGER, "then": INTEGER}, "cannot enforce"),
        ({"type": "array", "uniqueItems": True}, "cannot enforce"),
        ({"type": "number", "multipleOf": 0.5}, "at most 1000 numbers"),
        ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 5000}, "at most 1000 numbers"),
        ({"type": "integer", "multipleOf": 0.4, "minimum": 1, "maximum": 1.5}, "allows nothing"),
        ({"enum": [{"a": 1}], "properties": {"a": {}}}, "has properties beside enum"),
        ({"enum": ["a"], "format": "iri"}, "has format 'iri' beside enum"),
        ({"enum": ["x"], "format": "date"}, "allows nothing"),
        ({"propertyNames": {"enum": ["a"], "pattern": "b"}}, "neither an enum nor a pattern"),
        ({"oneOf": [LEFT, {**RIGHT, "required": []}]}, "two branches that may match at once"),
        ({"oneOf": [LEFT, {**RIGHT, "additionalProperties": True}]}, "two branches that may match at once"),
        ({"oneOf": [LEFT, RIGHT], "properties": {"b": {}}}, "two branches that may match at once"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "two branches that may match at once"),
        ({"oneOf": [{"type": "object", "properties": {"k": {"type": "string"}}}] * 2}, "two branches"),
        ({"type": "string", "pattern": "(ab)+", "maxLength": 3}, "put the length into the pattern"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "cannot enforce: assert"),
        ({"type": "string", "pattern": "["}, "not a regular expression"),
        ({"type": "string", "pattern": '^"$'}, "can only contain escaped"),
        ({"type": "string", "format": "iri"}, "'iri' has no grammar"),
        ({"type": "string", "format": "email", "maxLength": 9}, "cannot be combined"),
        ({"type": "object", "properties": {"a": INTEGER}, "patternProperties": {"^a": {}}}, "may match both"),
        ({"type": "object", "minProperties": 2}, "names may repeat"),
        ({"properties": {"a": INTEGER}, "allOf": [{"additionalProperties": False}]}, "of another subschema"),
        ({"$ref": "https://example.org/x"}, "external schemas"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "leads back"),
        ({**NODE["$defs"]["n"], "$ref": "#/$defs/n", "$defs": NODE["$defs"]}, None),  # type: ignore[index]
        ({"type": "integer", "minimum": 10**30}, "over 2"),
        ({"type": "strin"}, "must be of"),
        ({"properties": []}, "must be a JSON object"),
    ],
)
def test_keywords_that_cannot_be_enforced_are_refused(schema: Any, words: str | None) -> None:
    if words is None:
        assert exact(schema)["type"] == "object"
        return
    with pytest.raises(SchemaError, match=words):
        exact(schema)


def test_malformed_schemas_raise_only_the_documented_error() -> None:
    random = Random(1)
    values: list[Any] = [
        None,
        True,
        False,
        -1,
        0.5,
        10**400,
        "x",
        "#",
        "#/$defs/a",
        "^[",
        [],
        [1],
        ["a"],
        [[]],
        {},
        {"a": 1},
        [{}],
    ]
    keywords = (
        "type enum const $ref allOf anyOf oneOf properties required additionalProperties patternProperties "
        "propertyNames items prefixItems minItems maxItems minimum exclusiveMaximum multipleOf pattern format "
        "minLength maxLength minProperties maxProperties uniqueItems $defs"
    ).split()

    def some(depth: int) -> Any:
        if not depth or random.random() < 0.3:
            return random.choice(values)
        made: Any = {name: some(depth - 1) for name in random.sample(keywords, random.randint(0, 4))}
        return [made, some(depth - 1)] if random.random() < 0.3 else made

    written = 0
    for _ in range(20_000):
        try:
            exact(some(3))
            written += 1
        except SchemaError:
            pass
    assert written > 100


@pytest.mark.parametrize(
    ("pattern", "bounds", "matches", "others"),
    [
        ("^[a-z]+$", (2, 5), ["ab", "abcde"], ["a", "abcdef"]),
        (None, (0, 3), ["", "ü🦀x"], ["abcd", '"', "a\n", "\\"]),
        (r"^\d{3}-\w*$", (0, 6), ["123-", "123-ab"], ["123-abc", "12-"]),
        ("^.[^a]$", (0, 9), ["xb", "é "], ["xa", 'x"', "x\t"]),
        ("^a$|^b$", (0, 9), ["a", "b"], ["ab", ""]),
        ("^(?:foo|ba?r)$", (0, 9), ["foo", "br"], ["baar"]),
        (r"^\S[^\s]$", (0, 9), ["ab", "éü"], [a + b for s in SPACES for a, b in ((s, "a"), ("a", s))]),
        (r"^[^\S][\s]$", (0, 9), ["  "], ["a ", " a", "\x85 "]),
        ("^.$", (0, 9), ["a", "\u3000"], ["\u2028", "\u2029"]),
    ],
)
def test_patterns_apply_to_the_inside_of_a_json_string(
    pattern: str | None, bounds: tuple[int, int], matches: list[str], others: list[str]
) -> None:
    written = re.compile(string_pattern(pattern, *bounds))
    assert all(written.fullmatch(text) for text in matches)
    assert not any(written.fullmatch(text) for text in others)


def test_other_than_matches_every_other_string() -> None:
    written = re.compile(other_than(["a", "ab", "été", 'with "quotes"']))
    assert not any(written.fullmatch(text) for text in ("a", "ab", "été"))
    assert all(written.fullmatch(text) for text in ("", "b", "abc", "aé", "ét", "étéé"))


def test_formats_are_enforced_by_expressions() -> None:
    examples = {
        "date": ["2024-02-29", "1999-12-31"], "time": ["23:59:59Z"], "date-time": ["2024-02-29T00:00:00.5+02:00"],
        "duration": ["P1Y2M3DT4H5M6S", "PT5M", "P3W"], "email": ["a.b@example.org"], "hostname": ["example.org"],
        "ipv4": ["255.0.10.1"], "ipv6": ["::1", "1:2:3:4:5:6:7:8", "fe80::1"],
        "uuid": ["12345678-1234-1234-1234-123456789abc"], "uri": ["https://example.org:80/a?b=c#d"],
        "uri-reference": ["/a/b"], "json-pointer": ["", "/a/0"],
    }  # fmt: skip
    assert examples.keys() == FORMATS.keys()
    for name, texts in examples.items():
        written = re.compile(string_pattern(FORMATS[name], 0, math.inf))
        assert all(written.fullmatch(text) for text in texts)
    dates = re.compile(string_pattern(FORMATS["date"], 0, 10))
    assert not any(dates.fullmatch(text) for text in ("2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31"))
    durations = re.compile(string_pattern(FORMATS["duration"], 0, math.inf))
    assert not any(durations.fullmatch(text) for text in ("P1Y2D", "PT1H2S", "P", "PT", "P1DT"))
    with pytest.raises(PatternError):
        string_pattern(FORMATS["email"], 0, 3)
    lengths = {"email": 254, "hostname": 253, "uri": 2083, "uri-reference": 255, "json-pointer": 9999}
    for name, longest in lengths.items():
        written = re.compile(exact({"type": "string", "format": name, "maxLength": longest})["pattern"])
        assert all(written.fullmatch(text) for text in examples[name])
        assert not written.fullmatch(f"https://example.org/{'a' * 300}")


def test_branches_of_one_of_are_told_apart_by_a_tag_that_they_come_to_require() -> None:
    def branch(kind: str) -> dict[str, Any]:
        tag = {"const": kind, "default": kind, "type": "string"}
        return {
            "type": "object",
            "properties": {"kind": tag, "below": {"type": "array", "items": union}, "size": INTEGER},
            "required": ["size"],
        }

    union: dict[str, Any] = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in "ab"]}
    union["discriminator"] = {"propertyName": "kind"}
    written = exact({**union, "$defs": {name: branch(name) for name in "ab"}})
    one, two = (written["$defs"][each["$ref"].removeprefix("#/$defs/")] for each in written["anyOf"])
    assert one["required"] == two["required"] == ["size", "kind"]
    assert [each["properties"]["kind"] for each in (one, two)] == [{"enum": ["a"]}, {"enum": ["b"]}]
    assert one["properties"]["below"]["items"] == {"anyOf": written["anyOf"]}
    assert len(written["$defs"]) == 2
    asked = {"type": "object", "properties": {"v": {"const": 1}, "k": {"const": "x"}}, "required": ["k"]}
    other = {**asked, "properties": {"v": {"const": 2}, "k": {"const": "y"}}}
    assert exact({"oneOf": [asked, other]})["anyOf"][0]["required"] == ["k"]
    with pytest.raises(SchemaError, match="two branches"):
        exact({"oneOf": [asked, other, asked]})


def test_a_schema_that_grows_when_it_is_merged_is_refused() -> None:
    level: dict[str, Any] = {"type": "string"}
    for _ in range(20):
        level = {"anyOf": [level, level], "maxLength": 3}
    with pytest.raises(SchemaError, match="at most 5000 subschemas"):
        exact(level)
    assert len(json.dumps(exact({"anyOf": [{"type": "string"}] * 50}))) < 10_000


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"const": number} for number in range(4000)]},
        {"type": "string", "pattern": f"^[{''.join(map(chr, range(0x400, 0xD000, 2)))}]$"},
        {"allOf": [{"enum": list(range(100))}] * 400},
        {"type": "object", "properties": {"x" * 5000: {}}, "additionalProperties": True},
        {"type": "string", "pattern": "(" * 3000 + ")" * 3000},
        {
            "allOf": [{"$ref": f"#/$defs/{i % 2}"} for i in range(2000)],
            "$defs": {i: {"required": [f"{i}{j}" for j in range(2000)]} for i in "01"},
        },
        {"required": [str(i) for i in range(5000)], "allOf": [{"minLength": 1}] * 2000},
        {"oneOf": [{"$ref": "#/$defs/a"}] * 2000, "$defs": {"a": {"type": "object", "properties": MANY}}},
        {
            "oneOf": [{"$ref": "#/$defs/a"}] * 2000,
            "$defs": {"a": {"type": "object", "properties": {"k": {"enum": [*range(8000)]}}}},
        },
        {"allOf": [{"properties": MANY}, {"properties": {name + "x": {} for name in MANY}}]},
    ],
)
def test_a_schema_is_translated_or_refused_quickly(schema: dict[str, Any]) -> None:
    begin = time.process_time()
    with suppress(SchemaError):
        exact(schema)
    assert time.process_time() - begin < 2
