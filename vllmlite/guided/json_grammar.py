"""The grammar of a schema as :mod:`vllmlite.guided.json_schema` writes it: xgrammar's, with strings of our own.

xgrammar finds ahead of time which tokens may follow in a rule, unless they run over its end. Those it tries one by one
at every step, which takes milliseconds where a string has a length: the quotation mark that ends it is outside the rule
that counts, and most tokens run over the end of that. Here each remaining length is a rule that holds the mark too, and
longer strings are counted by xgrammar within such a rule. Strings of one kind share a rule wherever they stand, so that
many of them take no longer to compile than one.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllmlite.guided.json_keywords import LITERAL, Schema

MAX_RULES = 128
"""Longest string that is counted by rules: each takes its share of the time to compile."""
MAX_CHARACTERS = 1 << 16
"""Of the classes in them, together."""
_COUNTED = re.compile(r"\^\[((?:\\.|[^\\\]])+)\](?:(\*)|(\+)|\{(\d+),(\d*)\})\$", re.DOTALL)
"""A pattern of one class of characters and its count."""


def grammar_of(schema: Schema) -> Any:
    """An ``xgrammar.Grammar`` of ``schema``. Raises ValueError or xgrammar's RuntimeError if there is none."""
    from xgrammar import Grammar

    def native(schema: Schema) -> Any:
        return Grammar.from_json_schema(json.dumps(schema), any_whitespace=False, strict_mode=False)

    marker = "@string"
    while marker in json.dumps(schema):
        marker += "@"
    strings = _Strings(marker)
    schema = _filtered(schema)
    marked = native(strings.marked(schema))
    if not strings.names:
        return marked
    text = _readable(str(marked))
    faithful = str(Grammar.from_ebnf(text)) == str(marked)
    for name, literal in strings.names.items():
        text = text.replace(json.dumps(json.dumps(literal)), name)
    if not faithful or marker in text:
        return native(schema)  # to a version of xgrammar that writes grammars in another way
    return Grammar.from_ebnf("\n".join([text, *strings.rules.values()]))


def with_grammars(tag: Any) -> Any:
    """A part of a structural tag, where grammars take the place of written schemas, but for those of another style
    than JSON, or with more to say."""
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
    """A text of a grammar that xgrammar has written, so that it reads the same: an escape of two hexadecimal digits
    would take in those that follow."""
    return re.sub(
        r"\\(x[0-9a-f]{2}|.)", lambda found: rf"\u00{found[1][1:]}" if len(found[1]) == 3 else found[0], text
    )


def _filtered(schema: Any) -> Any:
    """``schema`` with the values of each ``enum`` that match the pattern beside it.

    That is looked for here, where a pattern that takes for ever meets a limit. Raises ValueError where none do."""
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
    """The strings of a schema that have rules of their own."""

    def __init__(self, marker: str) -> None:
        """``marker`` begins the texts that stand for them."""
        self._marker = marker
        self._classes: dict[str, int] = {}
        self.names: dict[str, str] = {}
        """Rule → the text that stands for it in the schema."""
        self.rules: dict[str, str] = {}
        """By name; names are none that xgrammar gives."""

    def marked(self, schema: Any) -> Any:
        """``schema`` with a constant in the place of each such string."""
        if isinstance(schema, list):
            return [self.marked(entry) for entry in schema]
        if not isinstance(schema, dict):
            return schema
        if schema.get("type") == "string" and (name := self._rule(schema.get("pattern", ""))):
            return {"const": self.names[name]}
        return {key: value if key in LITERAL else self.marked(value) for key, value in schema.items()}

    def _rule(self, pattern: str) -> str | None:
        """Return the name of the rule of a pattern; None if it is of another form, or its class is too long."""
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
        """The rule of at most so many more characters, and the mark after them."""
        for count in range(most + 1):
            name = f"rest_{kind}_{count}"
            more = f" | {one} rest_{kind}_{count - 1}" if count else ""
            self.rules[name] = f'{name} ::= "\\""{more}'
        return f"rest_{kind}_{most}"


def _class(members: str) -> str:
    """A class of characters as EBNF writes it."""
    parts = re.findall(r"\\?.", members, re.DOTALL)
    written = (part if part == "-" else f"\\U{ord(part[-1]):08x}" for part in parts)
    return f"[{''.join(written)}]"
