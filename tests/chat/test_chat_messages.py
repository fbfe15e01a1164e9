"""How messages are normalised and adapted to the form that a chat template expects."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_templates import PARTS_ALONE, SPECIAL, TEMPLATES, assistant, call, system, tool, user

from vllmlite.chat.messages import content_of, normalised, text_of
from vllmlite.chat.template import ChatTemplate, PromptOptions
from vllmlite.errors import ParameterError

DEEPSEEK = "deepseek: reasoning cut off, absent content is none, arguments are text"
MISTRAL = "mistral: strict alternation"
ROLES = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


def shown(source: str, *messages: dict[str, Any], **options: Any) -> str:
    """The messages as a chat template renders them, without a generation prompt."""
    return ChatTemplate(source, SPECIAL).prompt(list(messages), PromptOptions(False, **options))


@pytest.mark.parametrize("calls", [{}, {"tool_calls": None}, {"tool_calls": []}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_absent_or_empty_tool_calls_are_dropped(name: str, calls: dict[str, Any]) -> None:
    expected = shown(TEMPLATES[name], user("Hi"), assistant("Hello!"), user("Bye"))
    assert shown(TEMPLATES[name], user("Hi"), assistant("Hello!", **calls), user("Bye")) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_absent_content_renders_as_empty_not_as_none(name: str, role: str) -> None:
    def text(**content: Any) -> str:
        asked = {"role": role, "tool_call_id": "call00001", **content}
        before = {
            "user": [],
            "assistant": [user("Hi")],
            "tool": [user("?"), assistant("", tool_calls=[call({})])],
        }[role]
        after = assistant("x") if role == "user" else user("x")
        return shown(TEMPLATES[name], *before, asked, *([] if role == "tool" else [after]))

    if role == "tool" and name.startswith("gemma: "):
        return  # it refuses such messages
    found = text(content=None)
    assert text() == text(content=[]) == found and "None" not in found
    if name not in (
        DEEPSEEK,
        PARTS_ALONE,
    ):  # the one makes a call of what is none, the other shows no empty part
        assert text(content="") == found


def test_null_content_of_calls_reaches_templates_that_test_for_none() -> None:
    calls = assistant(None, tool_calls=[call('{"city":  "Oslo"}')])
    assert '<call>weather\n{"city":  "Oslo"}</call></s>' in shown(TEMPLATES[DEEPSEEK], user("?"), calls)
    assert '"arguments": {"city": "Oslo"}' in shown(TEMPLATES["hermes: tools in XML"], user("?"), calls)


@pytest.mark.parametrize("arguments", ['{"a": "ä"}', {"a": "ä"}])
def test_arguments_of_calls_render_as_object_or_as_json(arguments: Any) -> None:
    source = (
        "{% set f = messages[1].tool_calls[0].function %}{{ f.arguments }} {{ 'x' + f.arguments }} {{ f.arguments.a }} "
        "{{ f.arguments | tojson }} {{ f.arguments is mapping }} {{ f.arguments ~ '' }} {{ f | tojson }}"
    )
    made = '{"a": "ä"}'
    assert shown(source, user("?"), assistant(None, tool_calls=[call(arguments, "f")])) == (
        f'{made} x{made} ä {made} True {made} {{"name": "f", "arguments": {made}}}'
    )


@pytest.mark.parametrize("arguments", [None, "", " ", "{}", {}])
def test_absent_arguments_become_an_empty_object(arguments: Any) -> None:
    (found,) = normalised([assistant("", tool_calls=[call(arguments)])])
    assert found["tool_calls"][0]["function"]["arguments"] == {}
    (found,) = normalised([assistant("", tool_calls=[{"function": {"name": "f"}, "id": None}])])
    assert found["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("hello", "messages.1"),
        ({"content": "x"}, "messages.1.role"),
        ({"role": "", "content": "x"}, "messages.1.role"),
        ({"role": 5, "content": "x"}, "messages.1.role"),
        (user(5), "messages.1.content"),
        (user({"type": "text", "text": "x"}), "messages.1.content"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.1.content"),
        (user([{"type": "text", "text": 5}]), "messages.1.content.text"),
        (user([5]), "messages.1.content"),
        (assistant("", tool_calls={}), "messages.1.tool_calls"),
        (assistant("", tool_calls=[{}]), "messages.1.tool_calls.0"),
        (
            assistant("", tool_calls=[{"type": "custom", "function": {"name": "f"}}]),
            "messages.1.tool_calls.0.type",
        ),
        (assistant("", tool_calls=[call("{")]), "messages.1.tool_calls.0.function.arguments"),
        (assistant("", tool_calls=[call("[]")]), "messages.1.tool_calls.0.function.arguments"),
        (assistant("", tool_calls=[call(5)]), "messages.1.tool_calls.0.function.arguments"),
        (assistant("", reasoning_content=5), "messages.1.reasoning_content"),
        ({**user("x"), "when": object()}, "messages.1"),
        ({**user("x"), "when": {5: 5}}, "messages.1"),
    ],
)
def test_an_invalid_message_is_refused_by_index(message: Any, field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        normalised([user("Hi"), message])
    assert caught.value.field == field


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user"}, None, 5])
def test_an_invalid_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(ParameterError, match="messages"):
        normalised(messages)


def test_objects_are_converted_to_plain_data() -> None:
    @dataclass
    class Turn:
        role: str
        content: str

    dumps = SimpleNamespace(model_dump=lambda: {"role": "assistant", "content": "x", "refusal": None})
    found = normalised((Turn("user", "x"), dumps, {**user("y"), "n": np.int64(3), "t": (1, 2)}))
    assert found == [user("x"), assistant("x"), {**user("y"), "n": 3, "t": [1, 2]}]
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ParameterError, match="deep"):
        normalised([{**user("x"), "deep": deep}])


def test_every_kind_of_text_part_is_accepted() -> None:
    kinds = ["text", "input_text", "output_text", "refusal"]
    parts = [{"type": kind, "refusal" if kind == "refusal" else "text": kind} for kind in kinds]
    content = content_of([*parts, "plain", {"text": "untyped"}, {"type": "text", "text": None}], "content")
    assert text_of(content) == "text\ninput_text\noutput_text\nrefusal\nplain\nuntyped"


def test_thinking_parts_are_reasoning() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
        {"type": "text", "text": "Yes"},
    ]
    (found,) = normalised([assistant(parts)])
    assert {found[name] for name in ("reasoning_content", "reasoning", "thinking")} == {"Hm"}
    source = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.content }};{% endfor %}"
    assert shown(source, user("?"), assistant(parts)) == "/?;Hm/Yes;"
    knows = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'thinking' %}<{{ p.thinking }}>{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    assert shown(knows, user("?"), assistant(parts)) == "?<Hm>Yes"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_templates_under_every_name(name: str) -> None:
    (found,) = normalised([assistant("x", **{name: "Hm"})])
    assert found["reasoning_content"] == found["reasoning"] == found["thinking"] == "Hm"


def test_content_lists_reach_only_templates_that_show_them() -> None:
    two = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert shown(ROLES, user(two)) == "[user:a\nb]"
    either = TEMPLATES["gemma 3: text or parts"]
    assert "user\nab<end_of_turn>" in shown(either, user(two), assistant("x"))
    assert "user\na\nb<end_of_turn>" in shown(either, user(two), assistant("x"), content_format="string")
    assert "User: a b<end_of_utterance>" in shown(TEMPLATES[PARTS_ALONE], user(two))
    assert "User: a<end_of_utterance>" in shown(TEMPLATES[PARTS_ALONE], user("a"))
    assert shown(ROLES, user("a"), content_format="openai") == "[user:[{'type': 'text', 'text': 'a'}]]"
    assert "Tool: a b<end" in shown(
        TEMPLATES[PARTS_ALONE], user("?"), assistant(None, tool_calls=[call({})]), tool(two)
    )
    with pytest.raises(ParameterError, match="chat_template_content_format"):
        shown(ROLES, user("a"), content_format="xml")


def test_a_developer_message_becomes_a_system_message_if_the_template_needs_it() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    for name, source in TEMPLATES.items():
        if name.startswith("gemma: "):
            with pytest.raises(ParameterError, match="There is no system role"):
                shown(source, developer, user("Hi"))
        elif name.startswith("gpt-oss"):
            template = ChatTemplate(source, SPECIAL)
            assert "messages" in template.variables and template.mentions("developer")
            assert "developer<|message|># Instructions\n\nBe brief." in template.prompt(
                [developer, user("Hi")]
            )
        else:
            assert shown(source, developer, user("Hi")) == shown(source, system("Be brief."), user("Hi"))


def test_system_messages_stay_where_the_template_shows_them() -> None:
    messages = [system("a"), system("b"), user("Hi"), assistant("x"), system("c"), user("y")]
    assert shown(ROLES, *messages) == "[system:a][system:b][user:Hi][assistant:x][system:c][user:y]"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_system_message_is_lost(name: str) -> None:
    two = {"role": "developer", "content": [{"type": "text", "text": "two"}]}
    messages = [system("one"), two, user("Hi"), assistant("x"), system("three"), user("y")]
    if name.startswith("gemma: "):
        with pytest.raises(ParameterError, match="There is no system role"):
            shown(TEMPLATES[name], *messages)
        return
    text = shown(TEMPLATES[name], *messages)
    assert all(text.count(each) == 1 for each in ("one", "two", "three"))
    if name in (MISTRAL, "command-r: tokens of turns"):
        merged = [system("one\n\ntwo\n\nthree"), user("Hi"), assistant("x"), user("y")]
        assert text == shown(TEMPLATES[name], *merged)


def test_a_late_system_message_goes_to_the_front_of_a_strict_template() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('No!') }}{% endif %}"
        "[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    assert shown(source, user("Hi"), system("a"), system("")) == "[system:a][user:Hi]"
