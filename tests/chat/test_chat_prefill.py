"""continue_final_message: the prompt ends where the text of the last message ends, whatever the text is."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import AFTER_CONTENT, PARTS_ALONE, PREFILLS, SPECIAL, TEMPLATES, assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmlite.chat.template import ChatTemplate, PromptOptions
from vllmlite.errors import ParameterError

WHOLE = PromptOptions(add_generation_prompt=False)
OPEN = PromptOptions(add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prefilled_prompt_is_the_rendering_without_its_end(name: str) -> None:
    template, after = ChatTemplate(TEMPLATES[name], SPECIAL), AFTER_CONTENT[name]
    for prefill in PREFILLS:
        messages = [user("Hi"), assistant(prefill)]
        whole = template.prompt(messages, WHOLE)
        assert whole.endswith(after)
        expected = whole.removesuffix(after)
        assert template.prompt(messages, OPEN) == expected, prefill
        parts = [{"type": "text", "text": prefill}]
        assert template.prompt([user("Hi"), assistant(parts)], OPEN) == expected, prefill
        if name != PARTS_ALONE and "think" not in prefill:
            assert expected.rstrip().endswith(prefill.strip()), prefill


COMPILED = {name: ChatTemplate(source, SPECIAL) for name, source in TEMPLATES.items()}
PIECES = st.sampled_from(
    ["<", "|", ">", "im_end", "</s>", "<think>", "</think>", " ", "\n", "\t", "Hi", "assistant", "\u3000"]
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(PIECES | st.text(max_size=3), max_size=6).map("".join))
def test_any_final_message_is_continued_at_its_end(name: str, prefill: str) -> None:
    messages = [user("Hi"), assistant(prefill)]
    whole = COMPILED[name].prompt(messages, WHOLE)
    assert COMPILED[name].prompt(messages, OPEN) + AFTER_CONTENT[name] == whole


def test_parts_of_content_are_continued_at_the_last_text() -> None:
    template = ChatTemplate(TEMPLATES["chatml"], {})
    messages = [user("Hi"), assistant([{"type": "text", "text": "One"}, "Two "])]
    assert template.prompt(messages, OPEN).endswith("<|im_start|>assistant\nOne\nTwo ")


def test_content_may_be_absent_after_reasoning() -> None:
    template = ChatTemplate(TEMPLATES["qwen 3: reasoning of the last turn alone, loop controls"], {})
    messages = [user("1+1?"), assistant(None, reasoning="One and one.")]
    assert template.prompt(messages, OPEN).endswith("<think>\nOne and one.\n</think>\n\n")


def test_an_empty_message_that_the_template_omits_is_begun() -> None:
    template = ChatTemplate("{% for m in messages if m.content %}[{{ m.content }}]{% endfor %}", {})
    assert template.prompt([user("Hi"), assistant("")], OPEN) == "[Hi]["


@pytest.mark.parametrize(
    ("source", "last", "why"),
    [
        ("{{ messages[0].content }}", assistant("x"), "does not show"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", assistant("x"), "repeats"),
        (
            "{{ messages[1].content | length }}: {{ messages[1].content }}",
            assistant("abcd"),
            "changes",
        ),
        (TEMPLATES["chatml"], assistant("x", tool_calls=[{"function": {"name": "f"}}]), "tool calls"),
        (TEMPLATES["chatml"], {"role": "system", "content": "x"}, "not be a system message"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(source: str, last: dict[str, Any], why: str) -> None:
    with pytest.raises(ParameterError, match=why) as caught:
        ChatTemplate(source, {}).prompt([user("Hi"), last], OPEN)
    assert caught.value.field == "continue_final_message"


def test_continue_final_message_excludes_add_generation_prompt() -> None:
    with pytest.raises(ParameterError, match="add_generation_prompt"):
        ChatTemplate(TEMPLATES["chatml"], {}).prompt([user("Hi")], PromptOptions(continue_final_message=True))
