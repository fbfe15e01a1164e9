"""Conversion of a rewritten schema (:mod:`vllmlite.guided.json_schema`) to a grammar with rules for counted strings.

xgrammar precomputes the tokens allowed within a rule and checks those that cross the end of a rule one by one at every
step. For a string with a length limit that takes milliseconds: the closing quotation mark is outside the counting rule,
so most tokens cross its end. Here each remaining length is a rule of its own that includes the quotation mark; longer
strings are counted by xgrammar within such a rule. Strings with the same character class share rules, so that many of
them compile as fast as one.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllmlite.guided.json_keywords import LITERAL, Schema

MAX_RULES = 128
"""Longest string counted by one rule per length; each rule adds to the compilation time."""
MAX_CHARACTERS = 1 << 16
"""Limit for the total length of the character classes in those rules."""
_COUNTED = re.compile(r"\^\[((?:\\.|[^\\\]])+)\](?:(\*)|(\+)|\{(\d+),(\d*)\})\$", re.DOTALL)
"""A pattern that is one character class with a repetition count."""

_NAME = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\w+')
"""A text, a class of characters, or a name in a rule: texts and classes hold no names."""


def grammar_of(schema: Schema) -> Any:
    """Return an ``xgrammar.Grammar`` for ``schema``. Raises ValueError or xgrammar's RuntimeError if there is none."""
    from xgrammar import Grammar

    def native(schema: Schema) -> Any:
        return Grammar.from_json_schema(json.dumps(schema), any_whitespace=False, strict_mode=False)

    marker = "@string"
    while marker in json.dumps(schema):
        marker += "@"
    strings = _Strings(marker)
    schema = _filtered(schema)
    marked = str(native(strings.marked(schema)))
    text = _readable(marked)
    faithful = str(Grammar.from_ebnf(text)) == marked
    for name, literal in strings.names.items():
        text = text.replace(json.dumps(json.dumps(literal)), name)
    if not faithful or marker in text:
        return native(schema)  # this version of xgrammar writes grammars in another way
    return Grammar.from_ebnf("\n".join([_with_equal_rules_merged(text), *strings.rules.values()]))


def with_grammars(tag: Any) -> Any:
    """Return a part of a structural tag with plain JSON schemas replaced by grammars.

    Schemas with other fields beside them (such as another ``style``) are kept."""
    from xgrammar import Grammar

    if isinstance(tag, list):
        return [with_grammars(entry) for entry in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.keys() == {"type", "json_schema"} and tag["type"] == "json_schema":
        grammar = str(grammar_of(tag["json_schema"]))
        if str(Grammar.from_ebnf(text := _readable(grammar))) == grammar:
            return {"type": "grammar", "grammar": text}
    return {
        name: _filtered(value) if name == "json_schema" else with_grammars(value)
        for name, value in tag.items()
    }


def _readable(text: str) -> str:
    """Return a grammar printed by xgrammar with its two-digit hexadecimal escapes written with four digits.

    When the text is parsed again, a two-digit escape would also consume hexadecimal digits that follow."""
    return re.sub(
        r"\\(x[0-9a-f]{2}|.)", lambda found: rf"\u00{found[1][1:]}" if len(found[1]) == 3 else found[0], text
    )


def _with_equal_rules_merged(text: str) -> str:
    """Return a grammar that xgrammar has written, with one rule in place of those that are equal.

    Each rule takes its share of the time to compile, and a schema repeats its types of properties."""
    rules = [line.partition(" ::= ") for line in text.splitlines() if line]
    bodies = {name: body for name, _, body in rules}
    while True:
        first = {bodies["root"]: "root"}
        others = {
            name: kept for name, body in bodies.items() if (kept := first.setdefault(body, name)) != name
        }
        if not others:
            return "\n".join(f"{name} ::= {body}" for name, body in bodies.items())

        def renamed(found: re.Match[str], others: dict[str, str] = others) -> str:
            return others.get(found[0], found[0])

        bodies = {name: _NAME.sub(renamed, body) for name, body in bodies.items() if name not in others}


def _filtered(schema: Any) -> Any:
    """Return ``schema`` with only those ``enum`` values that match the ``pattern`` beside them.

    This runs in the compiling child, whose time limit stops a slow pattern. Raises ValueError if no value matches."""
    if isinstance(schema, list):
        return [_filtered(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(values := schema.get("enum"), list):
        pattern = re.compile(schema.get("pattern", ""))
        matching = [value for value in values if not isinstance(value, str) or pattern.search(value)]
        if not matching:
            raise ValueError("allows nothing: no value of enum or const matches the pattern")
        return {"enum": matching}
    return {key: _filtered(value) for key, value in schema.items()}


class _Strings:
    """The strings of a schema that get counting rules of their own."""

    def __init__(self, marker: str) -> None:
        """Start without rules. ``marker`` is the prefix of the placeholder constants for the strings."""
        self._marker = marker
        self._classes: dict[str, int] = {}
        self.names: dict[str, str] = {}
        """The placeholder constant of each rule, by rule name."""
        self.rules: dict[str, str] = {}
        """Rules by name; the names never clash with xgrammar's."""

    def marked(self, schema: Any) -> Any:
        """Return ``schema`` with each such string replaced by its placeholder constant."""
        if isinstance(schema, list):
            return [self.marked(entry) for entry in schema]
        if not isinstance(schema, dict):
            return schema
        if schema.get("type") == "string" and (name := self._rule(schema.get("pattern", ""))):
            return {"const": self.names[name]}
        return {key: value if key in LITERAL else self.marked(value) for key, value in schema.items()}

    def _rule(self, pattern: str) -> str | None:
        """Return the rule name for ``pattern``, or None if it has another form or its class is too long."""
        found = _COUNTED.fullmatch(pattern)
        if found is None:
            return None
        members, star, plus, least, most = found.groups()
        low = 0 if star else 1 if plus else int(least)
        high = int(most) if most else None
        longest = max(low, high or 0)
        by_rules = longest <= MAX_RULES
        if (longest if by_rules else 1) * len(members) > MAX_CHARACTERS:
            return None
        kind = self._classes.setdefault(members, len(self._classes))
        one = _class(members)
        if not by_rules:
            text = f'{one}{{{low},{"" if high is None else high}}} "\\""'
        elif high is None:
            text = f'{(one + " ") * low}{one}* "\\""'
        else:
            text = f"{(one + ' ') * low}{self._rest(kind, one, high - low)}"
        name = f"counted_{kind}_{low}_{'' if high is None else high}"
        self.rules[name] = f'{name} ::= "\\"" {text}'
        self.names.setdefault(name, f"{self._marker}{len(self.names)}.")
        return name

    def _rest(self, kind: int, one: str, most: int) -> str:
        """Return the rule for at most ``most`` more characters and the closing quotation mark; define it if needed."""
        for count in range(most + 1):
            name = f"rest_{kind}_{count}"
            more = f" | {one} rest_{kind}_{count - 1}" if count else ""
            self.rules[name] = f'{name} ::= "\\""{more}'
        return f"rest_{kind}_{most}"


def _class(members: str) -> str:
    """Return a character class in EBNF syntax."""
    parts = re.findall(r"\\?.", members, re.DOTALL)
    written = (part if part == "-" else f"\\U{ord(part[-1]):08x}" for part in parts)
    return f"[{''.join(written)}]"
