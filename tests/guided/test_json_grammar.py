"""The grammar of a JSON schema: rules that count characters match the same strings as the plain grammar."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from vllmlite.guided.json_grammar import MAX_RULES, grammar_of
from vllmlite.guided.json_schema import exact

xgrammar = pytest.importorskip(
    "xgrammar", reason="needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)"
)


def accepts(grammar: Any, texts: list[str]) -> list[bool]:
    """For each text, whether ``grammar`` matches it from start to end."""
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(["a", '"']), cache_enabled=False)
    compiled = compiler.compile_grammar(grammar)
    found = []
    for text in texts:
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        found.append(matcher.accept_string(text) and matcher.is_terminated())
    return found


def strings(schema: dict[str, Any]) -> list[str]:
    """Strings near the length limits of ``schema``, and some that no JSON string may contain."""
    random = Random(json.dumps(schema))
    lengths = {schema.get(name, 0) + more for name in ("minLength", "maxLength") for more in (-1, 0, 1, 7)}
    alphabets = ("a", "az", "ü🦀", "]-^a", "[\\", 'a"', "A\n", " ~\x7f")
    return [
        "".join(random.choice(alphabet) for _ in range(length))
        for length in sorted(lengths)
        if length >= 0
        for alphabet in alphabets
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"maxLength": 0},
        {"maxLength": 7},
        {"minLength": 3},
        {"minLength": 2, "maxLength": 2},
        {"minLength": 2, "maxLength": 9},
        {"maxLength": MAX_RULES},
        {"minLength": 5, "maxLength": MAX_RULES + 1},
        {"pattern": "^[a-z]+$", "maxLength": 4},
        {"pattern": r"^[\]a^\-]*$", "minLength": 2, "maxLength": 6},
        {"pattern": r"^[^b-y]*$", "minLength": 1},
        {"pattern": r"^\w{0,3}$"},
    ],
)
def test_a_string_with_length_limits_matches_its_pattern(schema: dict[str, Any]) -> None:
    written = exact({"type": "string", **schema})
    texts = strings(schema)
    expected = [re.fullmatch(written["pattern"], text) is not None for text in texts]
    assert any(expected) and not all(expected)
    assert accepts(grammar_of(written), [f'"{text}"' for text in texts]) == expected


def test_strings_with_length_limits_work_beside_others() -> None:
    short, long = {"type": "string", "maxLength": 3}, {"type": "string", "maxLength": 5, "minLength": 5}
    schema = {
        "type": "object",
        "properties": {
            "@string": {"enum": ["@string@0.", "@string0."]},
            "pattern": short,
            "type": {"type": "array", "items": {"anyOf": [short, long, {"type": "null"}]}},
            "again": {"$ref": "#/$defs/long"},
        },
        "required": ["@string", "pattern", "type", "again"],
        "$defs": {"long": long},
    }
    value: dict[str, Any] = {
        "@string": "@string0.",
        "pattern": "abc",
        "type": ["", "abc", "abcde", None],
        "again": "edcba",
    }
    wrong = [
        {**value, "@string": "abc"},
        {**value, "pattern": "abcd"},
        {**value, "pattern": "@string0."},
        {**value, "type": ["abcd"]},
        {**value, "again": "abc"},
    ]
    grammar = grammar_of(exact(schema))
    assert accepts(grammar, [json.dumps(value), *map(json.dumps, wrong)]) == [True] + [False] * len(wrong)


def test_strings_of_one_kind_share_their_rules() -> None:
    fields = {f"field{i}": {"type": "string", "maxLength": 60 + i} for i in range(40)}
    one = str(grammar_of(exact({"type": "object", "properties": {"a": fields["field39"]}})))
    all_of_them = str(grammar_of(exact({"type": "object", "properties": fields})))
    assert all_of_them.count("\nrest_") == one.count("\nrest_") == 100


def test_properties_of_equal_types_share_their_rules() -> None:
    date = {"type": "string", "format": "date"}
    point = {"type": "object", "properties": {"x": {"type": "integer"}, "at": date}, "required": ["x", "at"]}
    schema = {
        "type": "object",
        "properties": {
            **{f"point{i}": point for i in range(40)},
            **{f"root_prop_{i}": date for i in range(40)},  # names of rules as texts
            "last": {"enum": ["root_prop_1", "[root_prop_2"]},
        },
        "required": ["point0", "point39", "root_prop_39", "last"],
    }
    grammar = grammar_of(exact(schema))
    assert str(grammar).count("Regex(") <= 2
    assert str(grammar).count("\n") < 40 + 2 * 81
    place, day = {"x": 1, "at": "2024-02-29"}, "2025-11-29"
    value: dict[str, Any] = {"point0": place, "point39": place, "root_prop_39": day, "last": "root_prop_1"}
    values = [
        value,
        {**value, "last": "[root_prop_2"},
        {**value, "point39": {**place, "at": "2023-02-29"}},
        {**value, "root_prop_39": "2025-02-29"},
        {**value, "last": "root_prop_0"},
        {**value, "last": "[root_prop_0"},
    ]
    assert accepts(grammar, list(map(json.dumps, values))) == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"type": "null"}}},
        {"type": "array", "items": {"type": "array", "items": {"$ref": "#"}}},
    ],
)
def test_the_first_rule_stays(schema: dict[str, Any]) -> None:
    grammar = grammar_of(exact(schema))
    texts = ['"a"', "{}", '{"a": {"a": {}, "b": null}}', '{"b": {}}', "[]", "[[[[]]]]", "[[]]", "[1]"]
    native = xgrammar.Grammar.from_json_schema(
        json.dumps(exact(schema)), any_whitespace=False, strict_mode=False
    )
    assert accepts(grammar, texts) == accepts(native, texts)


@pytest.mark.parametrize("character", ["é", "ÿ", "\x80", "Ā", "\u2028", "🦀", "\\", "'", "]"])
def test_other_strings_survive_beside_one_with_length_limits(character: str) -> None:
    name, short = f"{character}c0de", {"type": "string", "maxLength": 3}
    of_class = {"type": "string", "pattern": "^x[é-ÿ]f$"}
    properties = {name: {"enum": [name + "1", f"f{name}"]}, "short": short, "class": of_class}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    value = {name: f"f{name}", "short": "éc0", "class": "xïf"}
    wrong = [{**value, name: name}, {**value, "class": "xàf"}, {**value, "short": "long"}]
    texts = [json.dumps(each, ensure_ascii=False) for each in (value, *wrong)]
    assert accepts(grammar_of(exact(schema)), texts) == [True, False, False, False]


def test_an_enum_keeps_values_that_match_the_pattern() -> None:
    schema = exact({"type": ["string", "integer"], "enum": ["ab", 1, "12", "xa"], "pattern": "a"})
    assert accepts(grammar_of(schema), ['"ab"', "1", '"12"', '"xa"']) == [True, True, False, True]
    with pytest.raises(ValueError, match="allows nothing"):
        grammar_of(exact({"enum": ["ab"], "pattern": "c"}))
