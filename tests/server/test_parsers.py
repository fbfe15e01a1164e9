"""Parsing of tool calls and reasoning: whole texts, any stream chunks, well-formed and malformed ones."""

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

TOOLS = {
    "add": None,
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "array"},
            "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "unit": {"enum": ["C", "5"]},
            "either": {"type": ["string", "number"]},
        },
    },
}
WEATHER = '{"city": "Oslo }]", "days": [1, {"a": "\\"{"}]}'
MAKE: dict[str, Callable[[], Parser]] = {
    **{name: lambda kind=kind: kind(TOOLS) for name, kind in TOOL_PARSERS.items()},  # type: ignore[misc]
    "required": RequiredCalls,
    "named": lambda: NamedCall("add"),
    "think": lambda: ThinkParser(STYLES["qwen3"], "", TOOL_PARSERS["hermes"](TOOLS)),
    "implied": lambda: ThinkParser(STYLES["deepseek_r1"], ""),
    "granite thoughts": lambda: ThinkParser(STYLES["granite"], ""),
    "kimi thoughts": lambda: ThinkParser(STYLES["kimi_k2"], "<think>", TOOL_PARSERS["kimi_k2"](TOOLS)),
}


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def calls(*named: tuple[str, str]) -> list[Part]:
    """The parts of a stream that the given (name, arguments) pairs correspond to."""
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
    (
        "granite",
        f"<|tool_call|>[{call('add', '{}')}, {call('weather', WEATHER)}]",
        calls(("add", "{}"), ("weather", WEATHER)),
    ),
    ("granite", f"<tool_call>[{call('add', '{}')}]</tool_call>", calls(("add", "{}"))),
    ("granite", "No call.", [Content("No call.")]),
    (
        "jamba",
        f"Well. <tool_calls>[{call('add', '{}')}]</tool_calls>",
        [Content("Well."), *calls(("add", "{}"))],
    ),
    (
        "deepseek_v3",
        "Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + WEATHER
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [Content("Yes."), *calls(("weather", WEATHER), ("add", "{}"))],
    ),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>none", [Content("<｜tool▁calls▁begin｜>none")]),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        + WEATHER
        + "<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls(("weather", WEATHER), ("add", "{}")),
    ),
    (
        "kimi_k2",
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:3<|tool_call_argument_begin|>"
        + WEATHER
        + "<|tool_call_end|><|tool_call_begin|>functions.add:4<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        [
            Content("I look."),
            CallBegin(0, "weather", "functions.weather:3"),
            CallArguments(0, WEATHER),
            CallBegin(1, "add", "functions.add:4"),
            CallArguments(1, "{}"),
        ],
    ),
    (
        "kimi thoughts",
        "Hm.<|tool_calls_section_begin|><|tool_call_begin|>add:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        [Reasoning("Hm."), CallBegin(0, "add", "add:0"), CallArguments(0, "{}")],
    ),
    (
        "glm45",
        'Sure.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo "}</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n<arg_key>count</arg_key>\n"
        "<arg_value>null</arg_value>\n</tool_call>\n<tool_call>add\n</tool_call>",
        [
            Content("Sure."),
            *calls(("weather", '{"city":"Oslo \\"}","days":[1, 2],"count":null}'), ("add", "{}")),
        ],
    ),
    (
        "glm47",
        "<tool_call>weather<arg_key>unit</arg_key><arg_value>5</arg_value><arg_key>count</arg_key>"
        "<arg_value>5</arg_value><arg_key>either</arg_key><arg_value>true</arg_value></tool_call>",
        calls(("weather", '{"unit":"5","count":5,"either":"true"}')),
    ),
    ("glm45", "<tool_call></tool_call> x", [Content("<tool_call></tool_call> x")]),
    (
        "qwen3_coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n\nNorway\n</parameter>\n<parameter=count>\n"
        "3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\nTrue\n</parameter>\n"
        "<parameter=b>\nx<5\n</parameter>\n</function>\n</tool_call>",
        calls(("weather", '{"city":"Oslo\\n\\nNorway","count":3}'), ("add", '{"a":true,"b":"x<5"}')),
    ),
    ("qwen3_coder", "<function=add>\n</function> done", [*calls(("add", "{}")), Content(" done")]),
    ("qwen3_coder", "<tool_call>\nno", [Content("<tool_call>\nno")]),
    (
        "qwen3_coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOs",
        calls(("weather", '{"city":"Os"}')),
    ),
    (
        "pythonic",
        "[weather(city='Oslo )\\'', days=[1, {'a': -2.5}], count=None), add(ok=true)]",
        calls(
            ("weather", '{"city": "Oslo )\'", "days": [1, {"a": -2.5}], "count": null}'),
            ("add", '{"ok": true}'),
        ),
    ),
    ("pythonic", "[see(it)] and", [Content("[see(it)] and")]),
    ("pythonic", "[add(1)]", [Content("[add(1)]")]),
    ("pythonic", "[add(a=print())]", [Content("[add(a=print())]")]),
    ("pythonic", "[add(a=1), then", [*calls(("add", '{"a": 1}')), Content(", then")]),
    (
        "llama4_pythonic",
        "<|python_start|>[add(a=1)]<|python_end|> ok",
        [*calls(("add", '{"a": 1}')), Content(" ok")],
    ),
    ("llama4_pythonic", "[add()]", calls(("add", "{}"))),
    (
        "olmo3",
        'Hm.<function_calls>\nadd(a=1)\nweather(city="Oslo")\n</function_calls>',
        [Content("Hm."), *calls(("add", '{"a": 1}'), ("weather", '{"city": "Oslo"}'))],
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>Hm, <b>.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        + WEATHER
        + "<|call|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}",
        [Reasoning("Hm, <b>."), Content("I look."), *calls(("weather", WEATHER), ("add", "{}"))],
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        [Reasoning("Hm."), Content("Yes.")],
    ),
    ("openai", "Plain.", [Content("Plain.")]),
    (
        "granite thoughts",
        "Here's my thought process: Hm. Here is my response: Yes.",
        [Reasoning(" Hm. "), Content(" Yes.")],
    ),
    ("granite thoughts", "Here is a plan", [Content("Here is a plan")]),
]


def parts_of(kind: str, pieces: list[str], cut: bool = False) -> list[Part]:
    parser = MAKE[kind]()
    found: list[Part] = []
    for piece in pieces:
        found += parser.feed(piece)
    return merged([*found, *parser.finish(cut)])


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_output_is_parsed_into_reasoning_calls_and_content(
    kind: str, text: str, expected: list[Part]
) -> None:
    assert parts_of(kind, [text]) == expected
    assert parts_of(kind, list(text)) == expected


MARKS = (
    *("<tool_call>", "[TOOL_CALLS]", "</think>", "<think>", '{"name": "', '<|python_tag|>{"name": "'),
    *("<|tool_call|>", "<tool_calls>", "<｜tool▁calls▁begin｜>", "<|tool_calls_section_begin|>"),
    *("<function=", "[weather(", "[add(", "<|python_start|>[", "<function_calls>", "<|channel|>"),
    *("Here is my response:", "Here's my response:", "Here is my thought process:"),
)
"""What opens a call, and what opens and ends reasoning."""
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


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str]:
    """Strategy: a format and pieces of an answer in it, in any order."""
    kind, text, _ = draw(st.sampled_from(CASES))
    places = st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))
    pieces = draw(st.lists(places, min_size=1, max_size=5))
    return kind, "".join(text[min(ends) : max(ends)] for ends in pieces)


@settings(max_examples=600, deadline=None)
@given(
    given=damaged() | st.tuples(st.sampled_from(sorted(MAKE)), FRAGMENTS), cut=st.booleans(), data=st.data()
)
def test_parsing_does_not_depend_on_stream_chunks(
    given: tuple[str, str], cut: bool, data: st.DataObject
) -> None:
    kind, text = given
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parts_of(kind, [text], cut)
    assert parts_of(kind, pieces, cut) == whole == parts_of(kind, list(text), cut)
    begun = [part.index for part in whole if isinstance(part, CallBegin)]
    assert begun == list(range(len(begun)))


def told(parts: list[Part], kind: type) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind) and not isinstance(part, CallBegin))


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_a_truncated_answer_parses_to_a_prefix_of_the_whole(
    kind: str, text: str, expected: list[Part]
) -> None:
    """For every position, calls and content are those of the whole answer up to there. Markup of a call is not content;
    part of an opening mark, which might be content, is."""
    calls = [(part.index, part.name) for part in expected if isinstance(part, CallBegin)]
    for end in range(len(text)):
        found = parts_of(kind, [text[:end]], cut=True)
        assert parts_of(kind, list(text[:end]), cut=True) == found
        begun = [(part.index, part.name) for part in found if isinstance(part, CallBegin)]
        assert begun == calls[: len(begun)]
        for index, _ in begun:
            arguments = [
                told([p for p in parts if getattr(p, "index", None) == index], CallArguments)
                for parts in (found, expected)
            ]
            assert arguments[1].startswith(arguments[0])
        for part in (Reasoning, Content) if calls or kind == "openai" else (Reasoning,):
            text_of_part, whole = told(found, part).strip(), told(expected, part).strip()
            same = max(end for end in range(len(text_of_part) + 1) if whole.startswith(text_of_part[:end]))
            leaked = text_of_part[same:].strip()
            assert not leaked or any(mark.startswith(leaked) and mark != leaked for mark in MARKS)


def test_truncated_forced_calls_leak_no_markup() -> None:
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
def test_arguments_are_passed_on_unchanged(arguments: dict[str, object]) -> None:
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
