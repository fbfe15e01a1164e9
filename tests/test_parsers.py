"""Tool calls and reasoning out of text: whole, in any pieces, well and badly formed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmlite.server.parsers import TOOL_PARSERS
from vllmlite.server.parsers.forced import NamedCall, RequiredCalls
from vllmlite.server.parsers.parts import CallArguments, CallBegin, Content, Parser, Part, Reasoning, merged
from vllmlite.server.parsers.reasoning import STYLES, ThinkParser

NAMES = frozenset({"add", "weather"})
WEATHER = '{"city": "Oslo }]", "days": [1, {"a": "\\"{"}]}'
MAKE: dict[str, Callable[[], Parser]] = {
    **{name: lambda kind=kind: kind(NAMES) for name, kind in TOOL_PARSERS.items()},  # type: ignore[misc]
    "required": RequiredCalls,
    "named": lambda: NamedCall("add"),
    "think": lambda: ThinkParser(STYLES["qwen3"], "", TOOL_PARSERS["hermes"](NAMES)),
    "implied": lambda: ThinkParser(STYLES["deepseek_r1"], ""),
}


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def calls(*named: tuple[str, str]) -> list[Part]:
    """The parts that (name, arguments) are."""
    found: list[Part] = []
    for index, (name, arguments) in enumerate(named):
        found += [CallBegin(index, name), CallArguments(index, arguments)]
    return found


CASES: list[tuple[str, str, list[Part]]] = [
    ("hermes", "Just text, 1 < 2.\n", [Content("Just text, 1 < 2.\n")]),
    ("hermes", f"<tool_call>\n{call('weather', WEATHER)}\n</tool_call>", calls(("weather", WEATHER))),
    (
        "hermes",
        f"Wait. \n<tool_call>{call('add', '{}')}</tool_call>\n<tool_call>{call('x', '{}')}</tool_call>\n",
        [Content("Wait."), *calls(("add", "{}"), ("x", "{}"))],
    ),
    ("hermes", f"<tool_call>{call('add', '{}')}</tool_call> done", [*calls(("add", "{}")), Content(" done")]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', calls(("add", '{"a": 1}'))),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', calls(("add", "{}"))),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', calls(("add", "{}"))),
    ("hermes", r'<tool_call>{"name": "add", "arguments": "{\"a\": 1}"}', calls(("add", '{"a": 1}'))),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "x', calls(("add", '{"a": "x'))),
    ("hermes", "a <tool_call>no</tool_call>", [Content("a <tool_call>no</tool_call>")]),
    ("hermes", '<tool_call>{"nome": 1}', [Content('<tool_call>{"nome": 1}')]),
    ("hermes", "<tool_ca", [Content("<tool_ca")]),
    ("llama3_json", call("weather", WEATHER, "parameters"), calls(("weather", WEATHER))),
    (
        "llama3_json",
        f"<|python_tag|>{call('add', '{}')}; {call('weather', '{}')}",
        calls(("add", "{}"), ("weather", "{}")),
    ),
    ("llama3_json", " A {", [Content(" A {")]),
    ("llama3_json", call("Bob", "5"), [Content(call("Bob", "5"))]),
    ("mistral", f"[TOOL_CALLS] [{call('add', '{}')}, {call('x', '{}')}]", calls(("add", "{}"), ("x", "{}"))),
    (
        "mistral",
        f"Yes.[TOOL_CALLS]add{{}}[TOOL_CALLS]get_x[ARGS]{WEATHER}",
        [Content("Yes."), *calls(("add", "{}"), ("get_x", WEATHER))],
    ),
    ("mistral", "[TOOL_CALLS]f[ARGS]abc{", [Content("[TOOL_CALLS]f[ARGS]abc{")]),
    ("mistral", "[TOOL_CALLS]", [Content("[TOOL_CALLS]")]),
    ("required", f"[{call('add', '{}', 'parameters')}]", calls(("add", "{}"))),
    ("required", "what", [Content("what")]),
    ("named", '{"a": 1}', [CallBegin(0, "add"), CallArguments(0, '{"a": 1}')]),
    (
        "think",
        f"<think>\nHm, <tool_call>?\n</think>\n\n<tool_call>{call('add', '{}')}</tool_call>",
        [Reasoning("\nHm, <tool_call>?\n"), *calls(("add", "{}"))],
    ),
    ("think", "No <think> here", [Content("No <think> here")]),
    ("think", "<think>cut", [Reasoning("cut")]),
    ("implied", "Hm.</think>Yes.</think>", [Reasoning("Hm."), Content("Yes.</think>")]),
    ("implied", "<think>Hm", [Reasoning("Hm")]),
]


def parts_of(kind: str, pieces: list[str], cut: bool = False) -> list[Part]:
    parser = MAKE[kind]()
    found: list[Part] = []
    for piece in pieces:
        found += parser.feed(piece)
    return merged([*found, *parser.finish(cut)])


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_text_is_taken_apart(kind: str, text: str, expected: list[Part]) -> None:
    assert parts_of(kind, [text]) == expected
    assert parts_of(kind, list(text)) == expected


MARKS = ("<tool_call>", "[TOOL_CALLS]", "</think>", "<think>", '{"name": "', '<|python_tag|>{"name": "')
"""What opens a call or ends reasoning."""
WORDS = (
    '<tool_call> </tool_call> [TOOL_CALLS] [ARGS] <think> </think> <|python_tag|> {"name": "add" "arguments" '
    '"parameters": {"name":"add","arguments":{"a":[1]}} {} { } [ ] , ; : " \\ null 5 <tool <'
)
FRAGMENTS = st.lists(
    st.sampled_from(
        [*WORDS.split(), " ", "\n", "text", call("add", "{}"), "<tool_call>" + call("add", '{"x": "y"}')]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(MAKE)), text=FRAGMENTS, cut=st.booleans(), data=st.data())
def test_any_split_gives_the_same_parts(kind: str, text: str, cut: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parts_of(kind, [text], cut)
    assert parts_of(kind, pieces, cut) == whole == parts_of(kind, list(text), cut)
    begun = [part.index for part in whole if isinstance(part, CallBegin)]
    assert begun == list(range(len(begun)))


def told(parts: list[Part], kind: type) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind) and not isinstance(part, CallBegin))


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_an_answer_that_is_cut_tells_a_beginning_of_the_whole(
    kind: str, text: str, expected: list[Part]
) -> None:
    """At every position: the calls and contents are those of the whole answer up to there. What only belongs to a
    call's form is not content; a part of an opening mark, which might be content, is."""
    calls = [(part.index, part.name) for part in expected if isinstance(part, CallBegin)]
    for end in range(len(text)):
        found = parts_of(kind, [text[:end]], cut=True)
        begun = [(part.index, part.name) for part in found if isinstance(part, CallBegin)]
        assert begun == calls[: len(begun)]
        for index, _ in begun:
            arguments = [
                told([p for p in parts if getattr(p, "index", None) == index], CallArguments)
                for parts in (found, expected)
            ]
            assert arguments[1].startswith(arguments[0])
        assert told(expected, Reasoning).startswith(told(found, Reasoning)) or kind in ("think", "implied")
        content, whole = told(found, Content).strip(), told(expected, Content).strip()
        same = max(end for end in range(len(content) + 1) if whole.startswith(content[:end]))
        leaked = content[same:].strip()
        assert not calls or not leaked or any(mark.startswith(leaked) and mark != leaked for mark in MARKS)


def test_forced_calls_that_are_cut_leak_nothing() -> None:
    text = f"[{call('weather', WEATHER, 'parameters')}, {call('add', '{}', 'parameters')}]"
    for end in range(len(text)):
        parts = parts_of("required", [text[:end]], cut=True)
        assert not any(isinstance(part, Content) for part in parts)


@settings(max_examples=50, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=5),
        st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists),
        max_size=4,
    )
)
def test_arguments_come_through_as_they_are(arguments: dict[str, object]) -> None:
    text = json.dumps(arguments, ensure_ascii=False)
    forms = {
        "hermes": f"<tool_call>{call('add', text)}</tool_call>",
        "llama3_json": call("add", text, "parameters"),
        "mistral": f"[TOOL_CALLS]add{text}",
        "required": f"[{call('add', text)}]",
    }
    for kind, form in forms.items():
        assert parts_of(kind, [form]) == calls(("add", text))


def test_a_prompt_may_have_opened_or_closed_the_reasoning() -> None:
    style = STYLES["qwen3"]
    opened = ThinkParser(style, "<|im_start|>assistant\n<think>\n")
    assert [*opened.feed("Hm</think>Yes"), *opened.finish()] == [Reasoning("Hm"), Content("Yes")]
    closed = ThinkParser(STYLES["deepseek_r1"], "assistant\n<think>\n\n</think>\n\n")
    assert [*closed.feed("Yes"), *closed.finish()] == [Content("Yes")]
