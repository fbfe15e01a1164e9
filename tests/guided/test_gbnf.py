"""llama.cpp's grammars (GBNF): every form that llama.cpp reads is read here."""

from __future__ import annotations

import pytest

from vllmlite.guided.gbnf import readable

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # "escapes |
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
"""Of the shape of llama.cpp's grammar of JSON."""


@pytest.mark.parametrize(
    ("grammar", "matches", "others"),
    [
        (JSON, ['{"a": [1, -2.5e3,"x\\n\\u00ef"], "b":{ }}', "{}\n"], ['{"a": .5}', "[]", '{"a" 1}']),
        ('root ::= "a" maybe-b "c"\nmaybe-b ::= "b" |\n', ["abc", "ac"], ["a", "abbc"]),
        ('root ::= ("a" | ) (| "b") "."\nrest ::=', ["a.", ".", "b.", "ab."], ["ba.", "a"]),
        ('root ::= . [.|(] ".|" # .|\n', ["é..|", "..|"[:1] + "(.|"], ["é..", ".x.|"]),
        ('root ::= "a"{2} [b]{1,} "c"{,2}\n', ["aab", "aabbcc"], ["aa", "aabccc"]),
        ('root ::= "a" # no rule ::= |\n', ["a"], [""]),
    ],
)
def test_grammars(grammar: str, matches: list[str], others: list[str]) -> None:
    xgrammar = pytest.importorskip(
        "xgrammar", reason="needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)"
    )
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(["a", '"']), cache_enabled=False)
    compiled = compiler.compile_grammar(readable(grammar))
    for text in [*matches, *others]:
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        assert (matcher.accept_string(text) and matcher.is_terminated()) == (text in matches), text


def test_other_grammars_stay_as_they_are() -> None:
    for grammar in (
        'root ::= "a" b\nb ::= [a-z.] | (=[,]) "|"\n',
        'root ::= a.b\na.b ::= "\\"{,"',
        "root ::= [",
    ):
        assert readable(grammar) == grammar
