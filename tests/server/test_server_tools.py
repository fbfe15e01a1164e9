"""Tool calls and reasoning through the chat endpoint, whole and streamed, and what the prompt shows of tools."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from pydantic_core import from_json
from served import TAKES_APART, Script, ask, check, post, posted, serving, stream, streamed

from vllmlite.errors import ParameterError
from vllmlite.guided.json_schema import exact
from vllmlite.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingMarks
from vllmlite.server.config import ServerConfig
from vllmlite.server.openai import chat_protocol as chat
from vllmlite.server.parsers.reasoning import STYLES, ThinkStyle
from vllmlite.server.reading import after_reasoning
from vllmlite.server.service import Service
from vllmlite.server.tools import ToolUse

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather in Oslo?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
ADD = {"type": "function", "function": {"name": "add"}}
PIECES = ["<think>", "Hm", ".</thi", "nk>Let me see.\n<tool", '_call>{"name": "wea', 'ther", "argu', 'ments": {"ci',
          'ty": "Oslo"}', "}</tool_call>\n<tool_call>", '{"name": "add", "arguments": {}}</tool_call>']  # fmt: skip
EXPECTED = [("weather", {"city": "Oslo"}), ("add", {})]


def scripted(monkeypatch: pytest.MonkeyPatch, service: Service, *pieces: str, **end: str) -> Script:
    script = Script(*pieces, **end)
    monkeypatch.setattr(service.engine, "submit", script)
    return script


def test_calls_and_reasoning_are_parsed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, service, *PIECES)
    answer = post(service, CHAT, messages=MESSAGES, tools=[WEATHER, ADD])
    check(chat.ChatCompletion, answer)
    assert script.request is not None and isinstance(script.request.params, SamplingParams)
    assert not script.request.params.skip_special_tokens
    (choice,) = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "Hm.")
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
    assert found == EXPECTED and len({call["id"] for call in message["tool_calls"]}) == 2
    hidden = post(service, CHAT, messages=MESSAGES, tools=[WEATHER], include_reasoning=False)
    assert hidden["choices"][0]["message"]["reasoning_content"] is None


def test_calls_stream_the_name_and_then_argument_pieces(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, service, *PIECES)
    events = [data for _, data in stream(service, CHAT, messages=MESSAGES, tools=[WEATHER, ADD])]
    assert events.pop() == "[DONE]"
    for event in events:
        check(chat.ChatChunk, event)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    entries = [entry for delta in deltas for entry in delta.get("tool_calls", ())]
    assert all(len(delta["tool_calls"]) == 1 for delta in deltas if "tool_calls" in delta)
    arguments = ["", ""]
    for entry in entries:
        if "id" in entry:
            assert entry["type"] == "function" and arguments[entry["index"]] == ""
            assert entry["function"] == {"name": EXPECTED[entry["index"]][0], "arguments": ""}
        arguments[entry["index"]] += entry["function"]["arguments"]
    assert [json.loads(text) for text in arguments] == [arguments for _, arguments in EXPECTED]
    assert len(entries) > 4  # in pieces, not as a whole
    assert [event["choices"][0]["finish_reason"] for event in events[-2:]] == [None, "tool_calls"]


def test_single_no_and_truncated_calls(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, service, *PIECES)
    alone = post(service, CHAT, messages=MESSAGES, tools=[WEATHER, ADD], parallel_tool_calls=False)
    assert [c["function"]["name"] for c in alone["choices"][0]["message"]["tool_calls"]] == ["weather"]
    raw = post(service, CHAT, messages=MESSAGES, tools=[WEATHER], tool_choice="none")["choices"][0]
    assert "<tool_call>" in raw["message"]["content"] and raw["finish_reason"] == "stop"
    scripted(monkeypatch, service, *PIECES[3:8], finish_reason="length")
    cut = post(service, CHAT, messages=MESSAGES, tools=[WEATHER])["choices"][0]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'


def test_the_template_sees_tools_and_calls(service: Service) -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.role }}="
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{{ m.content }};{% endfor %}"
    )
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    body = {"messages": messages, "chat_template": template, "tools": [WEATHER]}
    tokens = post(service, "/tokenize", **body)["tokens"]
    seen = service.tokenizer.decode(tokens)
    assert seen == "weather;user=Weather in Oslo?;assistant=Oslo;tool=rain;"
    for arguments in ("{", "[1]", 5):
        call["function"] = {"name": "weather", "arguments": arguments}
        assert "arguments" in post(service, CHAT, 400, messages=messages)["error"]["param"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_tool_choices_are_refused_by_field(service: Service, body: dict[str, Any], param: str) -> None:
    assert post(service, CHAT, 400, messages=MESSAGES, **body)["error"]["param"] == param


def test_a_server_without_a_parser_says_so() -> None:
    with pytest.raises(ParameterError, match="tool_call_parser"):
        ServerConfig(enable_auto_tool_choice=True)
    with serving() as plain:
        error = post(plain, CHAT, 400, messages=MESSAGES, tools=[WEATHER])["error"]
        assert "--enable-auto-tool-choice" in error["message"]
        assert post(plain, CHAT, messages=MESSAGES, tools=[WEATHER], tool_choice="none", max_tokens=2)


def test_without_xgrammar_constrained_requests_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmlite.guided.grammars.find_spec", lambda name: None)
    wishes: list[dict[str, Any]] = [
        {"tools": [WEATHER], "tool_choice": NAMED},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
    ]
    with serving(**TAKES_APART) as lacking:
        for wish in wishes:
            error = post(lacking, CHAT, 400, messages=MESSAGES, **wish)["error"]
            assert "needs xgrammar" in error["message"] and "Debian: python3-xgrammar" in error["message"]
        for wish in ({}, {"response_format": {"type": "text"}}, {"tools": [WEATHER]}):
            assert post(lacking, CHAT, messages=MESSAGES, max_tokens=2, **wish)["choices"]


def test_forced_calls_follow_the_tools_schemas(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar)")
    body = {"messages": MESSAGES, "tools": [WEATHER], "temperature": 1.5, "seed": 3, "max_tokens": 150}
    for choice, reason in ((NAMED, "stop"), ("required", "tool_calls")):
        answer = post(service, CHAT, tool_choice=choice, parallel_tool_calls=False, **body)["choices"][0]
        assert answer["finish_reason"] == reason and answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
        events = stream(service, CHAT, tool_choice=choice, parallel_tool_calls=False, **body)
        deltas = [data["choices"][0]["delta"] for _, data in events[:-1]]
        pieces = [e["function"]["arguments"] for d in deltas for e in d.get("tool_calls", ())]
        assert "".join(pieces) == call["function"]["arguments"]
    script = scripted(monkeypatch, service, '[{"name": "add", "parameters": {}}]')
    post(service, CHAT, messages=MESSAGES, tools=[WEATHER, ADD], tool_choice="required")
    structure: StructuredOutputsParams = script.request.params.structured_outputs  # type: ignore[assignment, union-attr]
    names = [each["properties"]["name"]["const"] for each in structure.json["items"]["anyOf"]]  # type: ignore[index]
    assert names == ["weather", "add"] and "maxItems" not in structure.json  # type: ignore[operator]


CUT_CALLS: list[tuple[Any, str, list[tuple[str, str]]]] = [
    (NAMED, "{", []),
    (NAMED, '{"ci', [("weather", '{"ci')]),
    ("required", "[", []),
    ("required", '[{"name": "wea', []),
    ("required", '[{"name": "weather", "parameters": {', []),
    ("required", '[{"name": "weather", "parameters": {"city": "Os', [("weather", '{"city": "Os')]),
    (
        "required",
        '[{"name": "weather", "parameters": {"city": "Oslo"}}, {"na',
        [("weather", '{"city": "Oslo"}')],
    ),
    ("auto", '<tool_call>{"name": "weather", "argu', []),
    ("auto", '<tool_call>{"name": "weather", "arguments": {"city": "Os', [("weather", '{"city": "Os')]),
]


def test_a_call_cut_by_the_token_limit_is_marked_in_every_api(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No API shows the beginning of a call as content, or a call whose arguments have not begun."""
    monkeypatch.setattr(service, "_compile", lambda structure: asyncio.sleep(0))

    async def work(client: httpx.AsyncClient) -> None:
        for choice, text, calls in CUT_CALLS:
            pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
            scripted(monkeypatch, service, *pieces, finish_reason="length")
            await chat_tells(client, choice, calls)
            await responses_tell(client, choice, calls)
            await messages_tell(client, choice, calls)

    ask(service, work)


async def chat_tells(client: httpx.AsyncClient, choice: Any, calls: list[tuple[str, str]]) -> None:
    body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice}
    found = (await posted(client, CHAT, **body))["choices"][0]
    told = [call["function"] for call in found["message"].get("tool_calls") or ()]
    assert [(function["name"], function["arguments"]) for function in told] == calls
    assert not found["message"]["content"] and found["finish_reason"] == "length"
    chunks = [data["choices"][0] for _, data in (await streamed(client, CHAT, **body))[:-1]]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == ""
    entries = [e["function"] for chunk in chunks for e in chunk["delta"].get("tool_calls") or ()]
    assert [entry["name"] for entry in entries if "name" in entry] == [name for name, _ in calls]
    assert "".join(entry["arguments"] for entry in entries) == "".join(text for _, text in calls)
    assert chunks[-1]["finish_reason"] == "length"


async def responses_tell(client: httpx.AsyncClient, choice: Any, calls: list[tuple[str, str]]) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    picked = {"type": "function", "name": "weather"} if choice == NAMED else choice
    found = await posted(client, "/v1/responses", input="Weather?", tools=[tool], tool_choice=picked)
    assert found["status"] == "incomplete"
    assert found["incomplete_details"]["reason"] == "max_output_tokens"
    assert [(item["name"], item["arguments"]) for item in found["output"]] == calls
    assert [item["status"] for item in found["output"]] == ["incomplete"] * len(calls)


async def messages_tell(client: httpx.AsyncClient, choice: Any, calls: list[tuple[str, str]]) -> None:
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
    picked = {"type": "any" if choice == "required" else choice}
    if choice == NAMED:
        picked = {"type": "tool", "name": "weather"}
    body = {"messages": MESSAGES, "tools": [tool], "tool_choice": picked, "max_tokens": 5}
    found = await posted(client, "/v1/messages", **body)
    assert found["stop_reason"] == "max_tokens"
    inputs = [from_json(arguments, allow_partial=True) for _, arguments in calls]
    assert [block["input"] for block in found["content"]] == inputs
    deltas = [data.get("delta", {}) for _, data in await streamed(client, "/v1/messages", **body)]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == "".join(text for _, text in calls)


def test_every_api_can_limit_the_reasoning(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, service, "Yes.")
    monkeypatch.setattr(service, "knows_reasoning", True)
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": MESSAGES, "thinking_token_budget": 2000},
        "/v1/responses": {"input": "Weather?", "thinking_token_budget": 2000},
        "/v1/messages": {
            "messages": MESSAGES,
            "max_tokens": 9,
            "thinking": {"type": "enabled", "budget_tokens": 2000},
        },
    }
    for path, body in bodies.items():
        post(service, path, **body)
        assert script.request is not None and isinstance(script.request.params, SamplingParams)
        assert script.request.params.thinking_token_budget == 2000
    monkeypatch.undo()
    error = post(service, CHAT, 400, messages=MESSAGES, thinking_token_budget=5)["error"]
    assert error["param"] == "thinking_token_budget" and "--reasoning-parser" in error["message"]


def test_a_batch_of_conversations_equals_single_answers(service: Service) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("Hi", "What is dpkg?", "Hi")]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logprobs": True, "return_token_ids": True}

    async def work(client: httpx.AsyncClient) -> None:
        found = await posted(client, f"{CHAT}/batch", messages=talks, **options)
        check(chat.ChatCompletion, found)
        alone = [await posted(client, CHAT, messages=talk, **options) for talk in talks]
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
        for choice, one in zip(found["choices"], alone, strict=True):
            expected = one["choices"][0]
            assert choice["message"] == expected["message"] and choice["token_ids"] == expected["token_ids"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert found["usage"][name] == sum(one["usage"][name] for one in alone)
        for name, value in (("stream", True), ("n", 2), ("tools", [WEATHER]), ("prompt_logprobs", 1)):
            error = await posted(client, f"{CHAT}/batch", 400, messages=talks, **{name: value})
            assert error["error"]["param"] == name
        wrongs: list[Any] = [[], [[]], talks[0]]
        for wrong in wrongs:
            await posted(client, f"{CHAT}/batch", 400, messages=wrong)

    ask(service, work)


def test_a_truncated_forced_call_is_no_call(service: Service) -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar)")
    for choice in (NAMED, "required"):
        body = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "max_completion_tokens": 1}
        found = post(service, CHAT, **body)["choices"][0]
        assert found["finish_reason"] == "length"
        assert not found["message"]["content"] and "tool_calls" not in found["message"]


def test_reasoning_precedes_the_constrained_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar)")
    monkeypatch.setitem(STYLES, "qwen3", ThinkStyle("[", "]", implied=True))
    (closing,) = service.tokenizer.encode("]", False)
    (opening,) = service.tokenizer.encode("[", False)
    never = {str(token): -100 for token in (opening, *service.engine.llm_engine.engine_core.bounds.eos_ids)}
    bias = {str(closing): 6.0, **never}
    body = {"messages": MESSAGES, "temperature": 1.0, "seed": 5, "max_tokens": 200, "logit_bias": bias}
    number = {"structured_outputs": {"regex": "[0-9]{3}"}}
    named = {"tools": [WEATHER], "tool_choice": NAMED}
    required = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    for structure in (number, named, required):
        choice = post(service, CHAT, **body, **structure)["choices"][0]
        message = choice["message"]
        assert choice["finish_reason"] in ("stop", "tool_calls") and message["reasoning_content"]
        if structure is number:
            assert re.fullmatch("[0-9]{3}", message["content"])
        else:
            (call,) = message["tool_calls"]
            assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
            assert message["content"] is None
    deltas = [data["choices"][0]["delta"] for _, data in stream(service, CHAT, **body, **number)[:-1]]
    assert re.fullmatch("[0-9]{3}", "".join(delta.get("content") or "" for delta in deltas))
    monkeypatch.setitem(STYLES, "qwen3", ThinkStyle("[", "]", implied=False))
    body["logit_bias"] = never
    plain = post(service, CHAT, **body, **number)["choices"][0]["message"]
    assert re.fullmatch("[0-9]{3}", plain["content"]) and plain["reasoning_content"] is None


@pytest.mark.parametrize(
    ("parser", "prompt", "marks"),
    [
        ("qwen3", "x", ThinkingMarks(8, 7)),
        ("qwen3", "x<think>\n", ThinkingMarks(8, None)),
        ("qwen3", "x<think>\n\n</think>\n\n", None),
        ("deepseek_r1", "x", ThinkingMarks(8, None)),
        ("mistral", "x", None),
        (None, "x", None),
    ],
)
def test_reasoning_markers_depend_on_the_parser_and_the_prompt(
    parser: str | None, prompt: str, marks: ThinkingMarks | None
) -> None:
    class Marked:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return {"<think>": [7], "</think>": [8]}.get(text, [1, 2])

    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    config = ServerConfig(reasoning_parser=parser)
    found = after_reasoning(config, Marked(), params, prompt).structured_outputs  # type: ignore[arg-type]
    assert found is not None and found.after == marks and found.regex == "a"


def test_a_tool_property_may_be_named_like_a_schema_keyword() -> None:
    names = ("default", "enum", "const", "examples", "properties", "$ref")
    parameters = {
        "$defs": {"const": {"enum": [{"$ref": "#/kept"}]}},
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/const"} for name in names},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    structure = ToolUse.of([tool], "required", True, ServerConfig()).structure()
    assert structure is not None and isinstance(structure.json, dict)
    place = "#/items/anyOf/0/properties/parameters"
    found = structure.json["items"]["anyOf"][0]["properties"]["parameters"]
    assert found["properties"] == {name: {"$ref": f"{place}/$defs/const"} for name in names}
    assert found["$defs"] == parameters["$defs"]
    assert len(exact(structure.json)["$defs"]) == 1


def test_references_of_a_tools_schema_stay_its_own() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {
        "$defs": {"city": {"enum": ["Oslo"]}}, "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
    }}}  # fmt: skip
    use = ToolUse.of([ADD, tool], "required", True, ServerConfig())
    structure = use.structure()
    assert structure is not None and isinstance(structure.json, dict)
    definitions = exact(structure.json)["$defs"]
    assert list(definitions.values()) == [{"enum": ["Oslo"]}]
