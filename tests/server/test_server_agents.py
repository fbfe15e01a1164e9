"""Requests of coding agents to ``/v1/responses`` and ``/v1/messages`` beyond plain conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import TAKES_APART, Script, ask, check, post, serving, stream

from vllmlite.sampling_params import SamplingParams
from vllmlite.server.anthropic import protocol as messages
from vllmlite.server.responses import protocol as responses
from vllmlite.server.service import Service

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TEMPLATE = "{{ messages[-1].content }};{{ reasoning_effort }};{{ enable_thinking }};{{ tone }}"
CALLING = ["<think>Hm.</think>", '<tool_call>{"name": "shell", "arguments": {"command": "ls"}}</tool_call>']
CODEX: dict[str, Any] = {
    "model": "demo", "instructions": "You are an agent.", "tool_choice": "auto", "parallel_tool_calls": False,
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files."}]}],
    "tools": [{"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": PARAMETERS}],
    "reasoning": {"effort": "medium", "summary": "auto"}, "store": False, "stream": False, "prompt_cache_key": "k",
    "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}, "max_tool_calls": 5,
}  # fmt: skip
CLAUDE: dict[str, Any] = {
    "model": "demo", "max_tokens": 100, "temperature": 1, "metadata": {"user_id": "u"},
    "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "List files."}]}],
    "tools": [{"name": "shell", "description": "Runs.", "input_schema": PARAMETERS, "strict": False,
               "eager_input_streaming": True, "cache_control": {"type": "ephemeral"}}],
    "thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(**TAKES_APART, chat_template=TEMPLATE) as service:
        yield service


@pytest.fixture
def script(service: Service, monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script(*CALLING)
    monkeypatch.setattr(service.engine, "submit", script)
    monkeypatch.setattr(service.engine.llm_engine.grammars, "compile", lambda structure: None)
    return script


def params_of(script: Script) -> SamplingParams:
    assert script.request is not None and isinstance(script.request.params, SamplingParams)
    return script.request.params


def prompt_of(script: Script) -> Any:
    assert script.request is not None
    given: Any = script.request.prompt
    return given["prompt"]


def test_codex_can_hold_a_conversation(service: Service, script: Script) -> None:
    answer = post(service, RESPONSES, **CODEX)
    check(responses.ResponseObject, answer)
    assert prompt_of(script) == "List files.;medium;True;"
    reasoning, call = answer["output"]
    assert (reasoning["type"], call["type"], call["name"]) == ("reasoning", "function_call", "shell")
    assert answer["reasoning"] == {"effort": "medium", "summary": None}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "a.py"}
    post(service, RESPONSES, **{**CODEX, "input": [*CODEX["input"], reasoning, call, result]})
    assert prompt_of(script) == "a.py;medium;True;"
    quiet = post(service, RESPONSES, **{**CODEX, "include_reasoning": False})
    assert [item["type"] for item in quiet["output"]] == ["function_call"]
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    post(service, RESPONSES, input=[refusal])
    assert prompt_of(script).startswith("No.;")


def test_responses_take_vllms_parameters(service: Service, script: Script) -> None:
    given = {
        "logit_bias": {"5": 1.5},
        "stop_token_ids": [7],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
    }
    more = {
        "skip_special_tokens": True,
        "reasoning": {"effort": "none"},
    }
    post(service, RESPONSES, input="x", **given, **more, chat_template_kwargs={"tone": "dry"})
    params = params_of(script)
    assert params.logit_bias == {5: 1.5} and params.stop_token_ids == [7] and params.ignore_eos
    assert params.include_stop_str_in_output and params.skip_special_tokens
    assert prompt_of(script) == "x;none;False;dry"
    post(service, RESPONSES, input="x", structured_outputs={"regex": "a"})
    structure = params_of(script).structured_outputs
    assert structure is not None and structure.regex == "a"
    both = {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}
    assert post(service, RESPONSES, 400, input="x", **both)["error"]["param"] == "text.format"


def test_input_is_counted(service: Service, script: Script) -> None:
    answer = post(service, RESPONSES + "/input_tokens", **CODEX)
    check(responses.InputTokens, answer)
    post(service, RESPONSES, **CODEX)
    assert script.request is not None
    given: Any = script.request.prompt
    assert answer["input_tokens"] == len(given["prompt_token_ids"])


def test_no_response_is_kept(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
            answer = await client.request(method, f"{RESPONSES}/resp_1{path}")
            assert answer.status_code == 404
            assert "the server stores no responses" in answer.json()["error"]["message"]

    ask(service, work)


def test_claude_code_can_hold_a_conversation(service: Service, script: Script) -> None:
    answer = post(service, MESSAGES, **CLAUDE)
    check(messages.AnthropicAnswer, answer)
    assert prompt_of(script) == "List files.;medium;True;"
    assert [block["type"] for block in answer["content"]] == ["thinking", "tool_use"]
    assert answer["context_management"] == {"applied_edits": []} and answer["stop_reason"] == "tool_use"
    *_, (name, last), _ = stream(service, MESSAGES, **CLAUDE)
    assert name == "message_delta" and last["context_management"] == {"applied_edits": []}
    assert "context_management" not in post(service, MESSAGES, **{**CLAUDE, "context_management": None})
    result = {"type": "tool_result", "tool_use_id": answer["content"][1]["id"], "content": "a.py"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    turns = [
        *CLAUDE["messages"],
        {"role": "assistant", "content": [hidden, *answer["content"]]},
        {"role": "user", "content": [result]},
    ]
    post(service, MESSAGES, **{**CLAUDE, "messages": turns})
    assert prompt_of(script) == "a.py;medium;True;"
    counted = {name: value for name, value in CLAUDE.items() if name not in ("max_tokens", "temperature")}
    told = "List files.;medium;True;"
    assert post(service, MESSAGES + "/count_tokens", **counted) == {
        "input_tokens": len(service.tokenizer.encode(told, False))
    }


def test_messages_accept_thinking_and_output_options(service: Service, script: Script) -> None:
    plain = {"messages": CLAUDE["messages"], "max_tokens": 5}
    for thinking, told in (
        (None, "List files.;;;"),
        ({"type": "enabled", "budget_tokens": 1024}, "List files.;;True;"),
        ({"type": "disabled"}, "List files.;;False;"),
    ):
        post(service, MESSAGES, **plain, thinking=thinking)
        assert prompt_of(script) == told
    post(service, MESSAGES, **plain, chat_template_kwargs={"tone": "dry"}, cache_salt="s")
    assert prompt_of(script) == "List files.;;;dry"
    form = {"type": "json_schema", "schema": PARAMETERS}
    for wish in ({"output_config": {"format": form}}, {"output_format": form}):
        post(service, MESSAGES, **plain, **wish)
        structure = params_of(script).structured_outputs
        assert structure is not None and json.dumps(structure.json) == json.dumps(PARAMETERS)
    bad: list[dict[str, Any]] = [
        {"thinking": {"type": "sometimes"}},
        {"tools": [{**CLAUDE["tools"][0], "allowed_callers": ["code_execution_20250825"]}]},
        {"tools": CLAUDE["tools"], "tool_choice": {"type": "any"}, "output_format": form},
    ]
    refused = post(service, MESSAGES, 400, **plain, thread={"type": "create"})["error"]
    assert refused["details"]["error_code"] == "thread_unsupported_request"
    for wish in bad:
        check(messages.AnthropicError, post(service, MESSAGES, 400, **plain, **wish))


def test_anthropics_tool_runner_goes_on_without_threads(service: Service, script: Script) -> None:
    anthropic = pytest.importorskip("anthropic", reason="needs Anthropic's client")
    if not hasattr(anthropic, "beta_async_tool"):
        pytest.skip("needs a newer client of Anthropic's")

    async def work(client: httpx.AsyncClient) -> None:
        ran: list[str] = []

        async def shell(command: str) -> str:
            """Run a shell command."""
            ran.append(command)
            return "a.py"

        async with anthropic.AsyncAnthropic(
            base_url=str(client.base_url), api_key="none", max_retries=0
        ) as api:
            runner = api.beta.messages.tool_runner(
                model="demo", max_tokens=50, messages=CLAUDE["messages"], tools=[anthropic.beta_async_tool(shell)],
                max_iterations=2,
            )  # fmt: skip
            assert [message.stop_reason async for message in runner] == ["tool_use", "tool_use"]
        assert ran and set(ran) == {"ls"}
        assert prompt_of(script) == "a.py;;;"

    ask(service, work)
