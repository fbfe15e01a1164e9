"""Conversations of every API: one normalisation, prefill, named chat templates, token counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chat_templates import TEMPLATES
from served import Script, post, serving

from vllmlite.chat.template import ChatTemplate
from vllmlite.errors import ParameterError
from vllmlite.server.config import ServerConfig
from vllmlite.server.service import Service

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
APPLY = "/apply-template"
HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def prompt_of(service: Service, path: str, **body: Any) -> str:
    """The prompt that the engine receives for a request."""
    script = Script("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.engine, "submit", script)
        post(service, path, **body)
    assert script.request is not None
    given: Any = script.request.prompt
    return str(given["prompt"])


def test_a_prefill_is_continued_by_openais_and_anthropics_api(service: Service) -> None:
    opened = {"add_generation_prompt": False, "continue_final_message": True}
    begun = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for prefill in ("<", "", "Hello\n"):
        messages = [HI, {"role": "assistant", "content": prefill}]
        assert post(service, APPLY, messages=messages, **opened)["prompt"] == begun + prefill
    messages = [HI, {"role": "assistant", "content": "d"}]
    blocks = [HI, {"role": "assistant", "content": [{"type": "text", "text": "d"}]}]
    assert prompt_of(service, CHAT, messages=messages, **opened) == begun + "d"
    for talk in (messages, blocks):
        assert prompt_of(service, MESSAGES, messages=talk, max_tokens=5) == begun + "d"


def test_the_same_conversation_in_every_api(service: Service) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    openai = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "text", "text": "Now."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": "Rain.", "tool_calls": []},
        {"role": "user", "content": "Thanks."},
    ]
    use = {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "rain"}]}
    anthropic = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "text", "text": "Now."}]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks."},
    ]
    asked = [{"type": "input_text", "text": text} for text in ("Weather?", "Now.")]
    items = [
        {"role": "user", "content": asked},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Rain."}]},
        {"role": "user", "content": "Thanks."},
    ]
    for name in ("qwen 3: reasoning of the last turn alone, loop controls", "vision: parts alone"):
        with serving(chat_template=TEMPLATES[name]) as other:
            expected = other.tokenizer.apply_chat_template(openai, chat_template=TEMPLATES[name])
            assert "Thanks." in expected and "None" not in expected
            assert prompt_of(other, CHAT, messages=openai) == expected
            assert (
                prompt_of(other, MESSAGES, messages=anthropic, system="Be brief.", max_tokens=5) == expected
            )
            assert prompt_of(other, RESPONSES, input=items, instructions="Be brief.") == expected
            assert post(other, APPLY, messages=openai, tools=tools)["prompt"] == (
                other.tokenizer.apply_chat_template(openai, tools=tools, chat_template=TEMPLATES[name])
            )
    chosen = {"tools": tools, "tool_choice": "none"}
    counted = post(service, f"{CHAT}/input_tokens", messages=openai, **chosen, temperature=0)
    assert counted == post(service, "/chat/completions/input_tokens", messages=openai, **chosen)
    assert counted["input_tokens"] == post(service, "/tokenize", messages=openai, tools=tools)["count"]


def test_long_conversations_are_rendered_while_others_are_served(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    render = ChatTemplate.prompt

    def prompt(*args: Any) -> str:
        threads.append(threading.current_thread())
        return render(*args)

    monkeypatch.setattr(ChatTemplate, "prompt", prompt)
    parts = [{"type": "text", "text": "x"}] * 100
    for content, status in (
        ("x", 200),
        ("x" * 10_000, 400),
        (parts, 200),
    ):  # the context is shorter than the second
        post(service, APPLY, status, messages=[{"role": "user", "content": content}])
    assert [thread is threading.main_thread() for thread in threads] == [True, False, False]


def test_names_of_chat_templates(service: Service) -> None:
    assert prompt_of(service, CHAT, messages=[HI], chat_template="gemma").startswith(
        "<start_of_turn>user\nHi"
    )
    assert post(service, APPLY, messages=[HI], chat_template="default") == post(service, APPLY, messages=[HI])
    error = post(service, CHAT, 400, messages=[HI], chat_template="{{ 1 }}")["error"]
    assert error["param"] == "chat_template" and "--trust-request-chat-template" in error["message"]
    with serving(chat_template="llama3", chat_template_content_format="string") as other:
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        assert post(other, APPLY, messages=parts)["prompt"] == (
            "<|start_header_id|>user<|end_header_id|>\n\na\nb<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        for wrong in ("llama33", "{% if %}"):
            with pytest.raises(ParameterError, match="chat_template"):
                Service(other.engine, ServerConfig(chat_template=wrong), ["demo"], other.metrics)


def test_unsupported_conversation_content_is_refused(service: Service) -> None:
    image = {"type": "image", "source": {}}
    bad: list[tuple[str, dict[str, Any], str | None]] = [
        (CHAT, {"messages": [HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages.1.tool_calls.0.function.arguments"),
        (CHAT, {"messages": [{"role": "user", "content": [image]}]}, "messages.0.content"),
        (RESPONSES, {"input": [{"role": "user", "content": [image]}]}, "input.content"),
        (MESSAGES, {"messages": [{"role": "user", "content": [image]}], "max_tokens": 5}, None),
        (MESSAGES, {"messages": [HI], "system": [image], "max_tokens": 5}, None),
    ]  # fmt: skip
    for path, body, param in bad:
        answer = post(service, path, 400, **body)["error"]
        assert answer.get("param") == param, answer
