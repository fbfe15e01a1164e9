"""Fields that are common to all endpoints: those that change the text are honoured or refused, the others are ignored
and logged."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from served import TAKES_APART, Script, post, serving, stream

from vllmlite.sampling_params import SamplingParams
from vllmlite.server import log_once as notes
from vllmlite.server.anthropic.protocol import MessagesRequest
from vllmlite.server.llamacpp.protocol import LlamaCompletionRequest
from vllmlite.server.openai.chat_protocol import ChatCompletionRequest
from vllmlite.server.openai.completions_protocol import CompletionRequest
from vllmlite.server.protocol import fields
from vllmlite.server.protocol.base import Request
from vllmlite.server.responses.protocol import ResponsesRequest
from vllmlite.server.service import Service

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
)  # fmt: skip
TALK = [{"role": "user", "content": "What is dpkg?"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TALK, "max_tokens": 3},
    "/chat/completions": {"messages": TALK, "max_tokens": 3},
    COMPLETIONS: {"prompt": "dpkg is", "max_tokens": 3},
    RESPONSES: {"input": "What is dpkg?", "max_output_tokens": 3},
    MESSAGES: {"messages": TALK, "max_tokens": 3},
    "/completion": {"prompt": "dpkg is", "n_predict": 3},
}
CLASSES: dict[type[Request], dict[str, Any]] = {
    ChatCompletionRequest: BODIES[CHAT],
    CompletionRequest: BODIES[COMPLETIONS],
    ResponsesRequest: BODIES[RESPONSES],
    MessagesRequest: BODIES[MESSAGES],
    LlamaCompletionRequest: BODIES["/completion"],
}
WITHOUT_EFFECT: dict[str, Any] = {
    "keep_alive": "5m", "chat_id": "c1", "usage": {"include": True}, "return_progress": True, "provider": {"a": 1},
    "client_metadata": {"a": "b"}, "cache_prompt": True, "n_cache_reuse": 256, "speculative.n_max": 4, "prediction": {},
    "kv_transfer_params": {"do_remote_decode": True}, "stream_interval": 3, "mm_processor_kwargs": {"a": 1},
    "n_keep": 5, "title": "a conversation", "id": 7, "transforms": ["middle-out"], "session_params": {},
}  # fmt: skip
TEMPLATE = "{{ messages[-1].content }};{{ reasoning_effort }};{{ enable_thinking }};{{ thinking }};{{ tools | tojson }}"
FUNCTION = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(**TAKES_APART) as service:
        yield service


@pytest.fixture(scope="module")
def showing() -> Iterator[Service]:
    """A service whose prompts show the variables that the chat template receives."""
    with serving(**TAKES_APART, chat_template=TEMPLATE) as service:
        yield service


@pytest.fixture(autouse=True)
def fresh_notes(service: Service, showing: Service) -> None:
    service.notes, showing.notes = notes.Notes(), notes.Notes()


@pytest.fixture
def script(showing: Service, monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script("<think>Hm.</think>Yes.")
    monkeypatch.setattr(showing.engine, "submit", script)
    monkeypatch.setattr(showing.engine.llm_engine.grammars, "compile", lambda structure: None)
    return script


def params_of(script: Script) -> SamplingParams:
    assert script.request is not None and isinstance(script.request.params, SamplingParams)
    return script.request.params


def prompt_of(script: Script) -> str:
    assert script.request is not None
    given: Any = script.request.prompt
    return str(given["prompt"])


def text_of(answer: Any) -> Any:
    """The generated text in a response of any API."""
    for name in ("choices", "output", "content"):
        if name in answer:
            return json.dumps(answer[name]).replace(answer.get("id", "-"), "")
    return answer


@pytest.mark.parametrize("path", BODIES)
def test_fields_without_effect_are_ignored_and_logged_once(
    service: Service, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = {**BODIES[path], "temperature": 0}
    with caplog.at_level(logging.WARNING, notes.logger.name):
        for _ in range(2):
            answer = post(service, path, **body, **WITHOUT_EFFECT)
    plain = post(service, path, **body)
    if path == RESPONSES:
        assert answer["output"][0]["content"] == plain["output"][0]["content"]
    else:
        assert text_of(answer) == text_of(plain)
    lines = [record.getMessage() for record in caplog.records if record.name == notes.logger.name]
    assert len(lines) == len(set(lines)) and all(line.startswith(path) for line in lines)
    for name in ("keep_alive", "chat_id", "usage", "provider"):
        assert sum(f"'{name}' is ignored" in line for line in lines) == 1, name


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (COMPLETIONS, {"temprature": 1}, "temprature"),
        (COMPLETIONS, {"keep_alive": 5}, "keep_alive"),
        (CHAT, {"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        (CHAT, {"response_format": {"type": "text", "strict": True}}, "response_format.strict"),
        (RESPONSES, {"text": {"format": {"type": "text", "a": 1}}}, "text.format.a"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools.type=web_search"),
        (RESPONSES, {"include": ["web_search_call.results"]}, "include=web_search_call.results"),
        (MESSAGES, {"tool_choice": {"type": "none", "a": 1}}, "tool_choice.a"),
        ("/completion", {"keep_alive": 5}, "keep_alive"),
    ],
)
def test_strict_servers_refuse_what_others_ignore(
    service: Service, path: str, body: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = stream(service, path, **BODIES[path], **body) if "stream" in body else None
    assert streamed or post(service, path, **BODIES[path], **body)
    monkeypatch.setattr(service, "config", replace(service.config, strict_requests=True))
    error = post(service, path, 400, **BODIES[path], **body)["error"]
    assert error["message"].startswith(place)
    if place == "temprature":
        assert "did you mean temperature?" in error["message"]
    if path not in (MESSAGES,):
        assert error["param"] == place
    assert post(service, COMPLETIONS, **BODIES[COMPLETIONS], user="u", metadata={}, suffix="")


def test_hints_are_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    post(service, COMPLETIONS, **BODIES[COMPLETIONS], temprature=1)
    assert "'temprature' is ignored: no such parameter; did you mean temperature?" in caplog.text


def test_clients_cannot_fill_the_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    post(
        service, COMPLETIONS, **BODIES[COMPLETIONS], **{f"field\n{i}": i for i in range(2 * notes.MAX_NOTES)}
    )
    post(service, COMPLETIONS, **BODIES[COMPLETIONS], another=1)
    lines = [record.getMessage() for record in caplog.records if record.name == notes.logger.name]
    assert len(lines) == notes.MAX_NOTES + 1 and "further ones are suppressed" in lines[-1]
    assert not any("\n" in line for line in lines)
    (unknown,) = CompletionRequest.model_validate({"prompt": "x", "\ud800" * 99: 1}).unknown_fields()
    assert unknown.place == "\\ud800" * 80


@pytest.mark.parametrize("kind", CLASSES)
def test_known_fields_that_change_the_text_are_supported_or_refused(kind: type[Request]) -> None:
    """Checks the whole table, on every endpoint that generates text."""
    names = {field.alias or name for name, field in kind.model_fields.items()}
    value = object()
    for name in fields.TEXT_CHANGING:
        kind.model_validate({name: None, **CLASSES[kind]})  # asks for nothing
        if name in names or fields.synonym(name, names):
            continue
        with pytest.raises(ValueError, match=f"{name}=.*{re.escape(fields.TEXT_CHANGING[name].reason)}"):
            kind.model_validate({**CLASSES[kind], name: value})


def test_neutral_values_equal_the_documented_table(service: Service) -> None:
    neutral = {name: absent.neutral[-1] for name, absent in fields.TEXT_CHANGING.items()}
    for kind, body in CLASSES.items():
        names = {field.alias or name for name, field in kind.model_fields.items()}
        kind.model_validate({**body, **{n: v for n, v in neutral.items() if n not in names}})


@pytest.mark.parametrize(
    ("path", "body", "name", "expected"),
    [
        (CHAT, {"repeat_penalty": 1.2}, "repetition_penalty", 1.2),
        (COMPLETIONS, {"repeat_penalty": 1.2}, "repetition_penalty", 1.2),
        (RESPONSES, {"repeat_penalty": 1.2}, "repetition_penalty", 1.2),
        ("/completion", {"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        (CHAT, {"n_predict": 7, "max_tokens": None}, "max_tokens", 7),
        (CHAT, {"n_predict": 3}, "max_tokens", 3),
        (CHAT, {"max_tokens": -1}, "max_tokens", None),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens", None),
        (COMPLETIONS, {"n_predict": 7, "max_tokens": None}, "max_tokens", 7),
        ("/completion", {"n_predict": None, "max_tokens": 7}, "max_tokens", 7),
        (RESPONSES, {"max_output_tokens": None, "max_tokens": 7}, "max_tokens", 7),
        (CHAT, {"random_seed": 5}, "seed", 5),
        (CHAT, {"stop_sequences": ["a"]}, "stop", ["a"]),
        (MESSAGES, {"stop": ["a"]}, "stop", ["a"]),
        (COMPLETIONS, {"ban_eos_token": True}, "ignore_eos", True),
    ],
)
def test_field_names_of_other_apis_are_accepted(
    showing: Service, script: Script, path: str, body: dict[str, Any], name: str, expected: Any
) -> None:
    post(showing, path, **{**BODIES[path], **body})
    assert getattr(params_of(script), name) == expected


def test_two_names_of_one_field_must_agree(showing: Service, script: Script) -> None:
    post(showing, CHAT, messages=TALK, repeat_penalty=1.2, repetition_penalty=1.2)
    error = post(showing, CHAT, 400, messages=TALK, repetition_penalty=1.5, repeat_penalty=1.2)["error"]
    assert error["param"] == "repeat_penalty" and "is a synonym of repetition_penalty" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_openais_endpoints_accept_llamacpps_grammar_fields(
    showing: Service, script: Script, path: str
) -> None:
    post(showing, path, **BODIES[path], grammar='root ::= "a"')
    structure = params_of(script).structured_outputs
    assert structure is not None and structure.grammar == 'root ::= "a"'
    post(showing, path, **BODIES[path], json_schema={"type": "integer"})
    structure = params_of(script).structured_outputs
    assert structure is not None and structure.json == {"type": "integer"}
    form = {"type": "json_schema", "schema": {"type": "string"}}
    post(showing, path, **BODIES[path], response_format=form, grammar="")
    structure = params_of(script).structured_outputs
    assert structure is not None and structure.json == {"type": "string"}
    both = post(showing, path, 400, **BODIES[path], grammar='root ::= "a"', response_format=form)
    assert both["error"]["param"] == "grammar"
    typo = post(showing, path, 400, **BODIES[path], structured_outputs={"regexp": "a"})["error"]
    assert "did you mean regex?" in typo["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, ";;;"),
        ({"enable_thinking": False}, ";;False;False"),
        ({"thinking": {"type": "disabled"}}, ";;False;False"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, ";;True;True"),
        ({"thinking": True}, ";;True;True"),
        ({"think": "high"}, ";high;True;True"),
        ({"reasoning": {"effort": "low"}}, ";low;True;True"),
        ({"reasoning": {"enabled": False}}, ";;False;False"),
        ({"reasoning_effort": "none"}, ";none;False;False"),
        ({"reasoning_effort": "low", "enable_thinking": False}, ";low;False;False"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, ";;False;True"),
    ],
)
def test_thinking_options_reach_the_template(
    showing: Service, script: Script, body: dict[str, Any], told: str
) -> None:
    post(showing, CHAT, messages=TALK, **body)
    assert prompt_of(script) == f"What is dpkg?{told};null"


def test_every_api_can_set_thinking_options(showing: Service, script: Script) -> None:
    for path, body in (
        (RESPONSES, {"enable_thinking": False}),
        (RESPONSES, {"thinking": {"type": "disabled"}}),
        (RESPONSES, {"think": False}),
        (MESSAGES, {"enable_thinking": False}),
        (MESSAGES, {"thinking": {"type": "disabled"}}),
    ):
        post(showing, path, **BODIES[path], **body)
        assert prompt_of(script) == "What is dpkg?;;False;False;null", (path, body)


def test_thinking_options_that_the_template_ignores_are_logged(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"messages": TALK, "chat_template": "chatml"}
    plain = post(service, "/apply-template", **body)
    assert "these fields of requests are ignored" not in caplog.text
    for _ in range(2):
        assert post(service, "/apply-template", **body, enable_thinking=False) == plain
    assert caplog.text.count("uses none of enable_thinking, thinking") == 1


def test_budgets_of_reasoning_are_honoured(showing: Service, script: Script) -> None:
    for body in (
        {"thinking_token_budget": 9},
        {"thinking_budget": 9},
        {"thinking": {"type": "enabled", "budget_tokens": 9}},
        {"reasoning": {"max_tokens": 9}},
    ):
        post(showing, CHAT, messages=TALK, **body)
        expected = 9 if showing.knows_reasoning or len(body.keys() & {"thinking", "reasoning"}) == 0 else None
        assert params_of(script).thinking_token_budget == expected, body
    both = {"thinking_token_budget": 9, "thinking": {"type": "enabled", "budget_tokens": 8}}
    assert "contradicts" in post(showing, CHAT, 400, messages=TALK, **both)["error"]["message"]


def test_contradicting_thinking_options_are_refused(showing: Service) -> None:
    body = {"enable_thinking": True, "thinking": {"type": "disabled"}}
    error = post(showing, CHAT, 400, messages=TALK, **body)["error"]
    assert error["param"] == "thinking" and "contradicts enable_thinking=True" in error["message"]


def test_reasoning_is_shown_as_asked(showing: Service, script: Script) -> None:
    def message(**body: Any) -> Any:
        return post(showing, CHAT, messages=TALK, **body)["choices"][0]["message"]

    for form in ("auto", "deepseek", "parsed"):
        apart = message(reasoning_format=form)
        assert (apart["reasoning"], apart["content"]) == ("Hm.", "Yes.")
    for form in ("none", "raw"):
        whole = message(reasoning_format=form)
        assert whole["content"] == "<think>Hm.</think>Yes." and not whole.get("reasoning")
    for hidden in ({"reasoning_format": "hidden"}, {"reasoning": {"exclude": True}}):
        without = message(**hidden)
        assert without["content"] == "Yes." and not without.get("reasoning")
    assert (
        post(showing, CHAT, 400, messages=TALK, reasoning_format="xml")["error"]["param"]
        == "reasoning_format"
    )


OTHERS = [
    {"type": "web_search"},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
    {"type": "mcp", "server_label": "a", "name": None},
    {"type": "local_shell"},
    {"type": "namespace", "name": "n", "tools": []},
]


def test_tools_that_cannot_be_called_are_left_out(
    showing: Service, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {"type": "function", "function": FUNCTION}

    def shown() -> Any:
        return json.loads(prompt_of(script).rpartition(";")[2])

    for path, tools in (
        (CHAT, [*OTHERS[:3], expected, {"type": "custom", "custom": {"name": "a"}}]),
        (RESPONSES, [*OTHERS, {"type": "function", **FUNCTION}]),
        (
            MESSAGES,
            [
                {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
                {"type": "bash_20250124", "name": "bash"},
                {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object"}},
            ],
        ),
    ):
        answer = post(showing, path, **BODIES[path], tools=tools)
        assert shown() == [expected], path
        if path == RESPONSES:
            assert [tool["name"] for tool in answer["tools"]] == ["weather"]
    for kind in ("web_search", "custom", "mcp", "local_shell", "namespace", "bash_20250124"):
        assert f"'tools.type={kind}' is ignored: tools of this type cannot be called here" in caplog.text
    body = {**BODIES[RESPONSES], "tools": OTHERS}
    assert post(showing, RESPONSES, **body)["tools"] == [] and shown() is None
    assert post(showing, RESPONSES, 400, **body, tool_choice="required")["error"]["param"] == "tool_choice"
    broken = post(showing, CHAT, 400, **BODIES[CHAT], tools=[{"type": "function", "function": {}}])
    assert broken["error"]["param"] == "tools.0.function.name"


def test_every_field_of_a_function_reaches_the_template(showing: Service, script: Script) -> None:
    function = {**FUNCTION, "return": {"type": "string"}, "strict": True}
    post(showing, CHAT, **BODIES[CHAT], tools=[{"type": "function", "function": function}])
    assert json.loads(prompt_of(script).rpartition(";")[2])[0]["function"] == function
    post(showing, RESPONSES, **BODIES[RESPONSES], tools=[{"type": "function", **function}])
    assert json.loads(prompt_of(script).rpartition(";")[2])[0]["function"] == function


def test_fields_that_would_change_an_embedding_are_refused(service: Service) -> None:
    body = {"input": "dpkg"}
    assert post(service, "/v1/embeddings", **body, input_type="", keep_alive=5)
    for name, value in (("input_type", "query"), ("prompt_name", "query"), ("truncate", "END")):
        assert post(service, "/v1/embeddings", 400, **body, **{name: value})["error"]["param"] == name


def test_any_models_name_will_do_for_llama_servers_own_routes(service: Service) -> None:
    for path in ("/completion", "/chat/completions"):
        assert post(service, path, **BODIES[path], model="another")["model"] == "demo"
    assert post(service, "/embedding", content="x", model="another")
    assert post(service, "/apply-template", messages=TALK, model="another")["prompt"]
    assert post(service, "/tokenize", content="x", model="another")["tokens"]
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        post(service, path, 404, **BODIES[path], model="another")
    assert post(service, "/tokenize", 404, prompt="x", model="another")["error"]["code"] == "model_not_found"
