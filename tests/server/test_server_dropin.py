"""What clients of vLLM send that those of OpenAI do not, and what they read of the responses."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import Script, ask, check, post, serving, stream

from vllmlite.errors import ParameterError
from vllmlite.outputs import RequestOutput
from vllmlite.sampling_params import SamplingParams
from vllmlite.server.config import ServerConfig
from vllmlite.server.openai import chat_protocol as chat
from vllmlite.server.service import Service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "What is dpkg?"}]
SHORT = {"temperature": 0, "max_tokens": 2}
VARIABLES = (
    "{{ messages[0].content }};{{ reasoning_effort }};{{ enable_thinking }};{{ documents }};{{ tone }}"
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(
        reasoning_parser="qwen3",
        trust_request_chat_template=True,
        default_chat_template_kwargs={"tone": "dry"},
    ) as service:
        yield service


def prompt_of(service: Service, **body: Any) -> str:
    """The prompt that a conversation is rendered to."""
    return service.tokenizer.decode(post(service, "/tokenize", messages=MESSAGES, **body)["tokens"], False)


def test_fields_without_effect_are_accepted(service: Service) -> None:
    unused = {
        "model": "", "top_logprobs": 0, "logprobs": False, "session_id": "s", "thinking_token_budget": None,
        "truncation_side": "left", "repetition_detection": None, "watermarking": False, "ec_transfer_params": None,
        "stream_interval": 1, "guided_decoding_backend": None, "structured_outputs": {"disable_any_whitespace": False},
    }  # fmt: skip
    assert post(service, CHAT, messages=MESSAGES, **SHORT, **unused)["model"] == "demo"
    assert post(service, COMPLETIONS, model="", prompt="x", **SHORT)["choices"]
    assert post(service, "/tokenize", prompt="x", return_token_strs=None)["token_strs"] is None
    for field, value in (("thinking_token_budget", 5), ("guided_json", {})):
        assert post(service, CHAT, 400, messages=MESSAGES, **{field: value})["error"]["param"] == field


def test_null_means_absent_and_integers_may_be_written_as_floats(service: Service) -> None:
    plain = post(service, CHAT, messages=MESSAGES, **SHORT)["choices"]
    nulls = dict.fromkeys(("add_generation_prompt", "echo", "include_reasoning", "priority", "stop", "tools"))
    assert post(service, CHAT, messages=MESSAGES, **nulls, temperature=0, max_tokens=2.0)["choices"] == plain
    assert (
        post(service, "/completion", prompt="x", n_predict=2.0, n_probs=None, stream=None)["tokens_predicted"]
        == 2
    )
    for value, words in ((2.5, "valid integer"), (1e300, "at most"), ("2", "valid integer")):
        assert (
            words
            in post(service, CHAT, 400, messages=MESSAGES, top_logprobs=value, logprobs=True)["error"][
                "message"
            ]
        )
    assert post(service, CHAT, 400, messages=None)["error"]["param"] == "messages"


def test_vllms_variables_reach_the_template(service: Service) -> None:
    template = {"chat_template": VARIABLES}
    assert prompt_of(service, **template) == "What is dpkg?;;;;dry"
    told = prompt_of(service, **template, reasoning_effort="low", documents=[{"text": "a"}])
    assert told == "What is dpkg?;low;True;[{'text': 'a'}];dry"
    assert prompt_of(service, **template, reasoning_effort="none") == "What is dpkg?;none;False;;dry"
    own = {"enable_thinking": True, "tone": "wet"}
    told = prompt_of(service, **template, reasoning_effort="none", chat_template_kwargs=own)
    assert told == "What is dpkg?;none;True;;wet"
    clashing = {"source": 1, "variables": 2, "namespace": 3, "loop": 4}
    assert prompt_of(service, **template, chat_template_kwargs=clashing) == "What is dpkg?;;;;dry"
    tokens = {
        "chat_template": "{{ bos_token }} {{ eos_token }}",
        "chat_template_kwargs": {"bos_token": "begin"},
    }
    assert prompt_of(service, **tokens) == f"begin {service.tokenizer.special_text('eos_token')}"
    for name in ("messages", "tools"):
        answer = post(service, CHAT, 400, messages=MESSAGES, chat_template_kwargs={name: []})
        assert answer["error"]["param"] == "chat_template_kwargs"
        with pytest.raises(ParameterError, match="default_chat_template_kwargs"):
            ServerConfig(default_chat_template_kwargs={name: []})
    bad = post(service, CHAT, 400, messages=MESSAGES, chat_template="{{ 1 // 0 }}")
    assert bad["error"]["param"] == "messages"
    assert (
        "the chat template does not render documents"
        in post(service, CHAT, 400, messages=MESSAGES, documents=[{"text": "a"}])["error"]["message"]
    )


def test_json_objects_of_a_schema(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    script = Script("{}")
    monkeypatch.setattr(service.engine, "submit", script)
    monkeypatch.setattr(service.engine.llm_engine.grammars, "compile", lambda structure: None)
    post(service, CHAT, messages=MESSAGES, response_format={"type": "json_object", "schema": schema})
    assert script.request is not None and isinstance(script.request.params, SamplingParams)
    structure = script.request.params.structured_outputs
    assert structure is not None and structure.json == schema and structure.json_object is None


def test_reasoning_has_both_names_and_is_counted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine, "submit", Script("<think>Hm", ", well.</think>", "Yes."))
    whole = post(service, CHAT, messages=MESSAGES)
    check(chat.ChatCompletion, whole)
    message = whole["choices"][0]["message"]
    assert (
        message["reasoning"] == message["reasoning_content"] == "Hm, well." and message["content"] == "Yes."
    )
    count = len(service.tokenizer.encode("Hm, well.", False))
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    events = [
        data for _, data in stream(service, CHAT, messages=MESSAGES, stream_options={"include_usage": True})
    ]
    deltas = [choice["delta"] for event in events[:-1] for choice in event["choices"]]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "Hm, well."
    assert events[-2]["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}


def test_a_stream_of_token_ids_begins_with_the_prompts(service: Service) -> None:
    body = {"messages": MESSAGES, "return_token_ids": True, **SHORT}
    whole = post(service, CHAT, **body)
    for options in ({}, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}):
        first, *later = (data for _, data in stream(service, CHAT, **body, **options))
        check(chat.ChatChunk, first)
        assert first["prompt_token_ids"] == whole["prompt_token_ids"]
        assert [event for event in later if "prompt_token_ids" in event] == []
        choices = [choice for event in later if event != "[DONE]" for choice in event["choices"]]
        found = [token for choice in choices for token in choice.get("token_ids", ())]
        assert found == whole["choices"][0]["token_ids"]


def test_clients_may_choose_request_ids(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for path, body, begins in (
            (CHAT, {"messages": MESSAGES, **SHORT}, "chatcmpl-"),
            (COMPLETIONS, {"prompt": "x", **SHORT}, "cmpl-"),
            ("/v1/embeddings", {"input": "x"}, "embd-"),
            ("/v1/responses", {"input": "x", "max_output_tokens": 2}, "resp_"),
            ("/v1/messages", {"messages": MESSAGES, "max_tokens": 2}, "msg_"),
        ):
            answer = await client.post(path, json=body, headers={"x-request-id": "mine"})
            assert answer.json()["id"] == f"{begins}mine"
            answer = await client.post(path, json=body)
            assert answer.json()["id"].startswith(begins) and len(answer.json()["id"]) == len(begins) + 32
        body = {"prompt": "x", "request_id": "given", **SHORT}
        answer = await client.post(COMPLETIONS, json=body, headers={"x-request-id": "m" * 5000})
        assert answer.json()["id"] == "cmpl-given"
        answer = await client.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": "m" * 5000})
        assert answer.json()["id"] == "cmpl-" + "m" * 256

    ask(service, work)


def test_errors_for_bodies_that_are_not_json_name_the_cause(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for kind, content, words in (
            (
                "application/json",
                b'{"prompt": "x"',
                "the body is not JSON: Expecting ',' delimiter at character 14",
            ),
            ("text/plain", b'{"prompt": "x"}', "content-type must be application/json, not text/plain"),
        ):
            answer = await client.post(COMPLETIONS, content=content, headers={"content-type": kind})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == words and answer.json()["error"]["param"] is None
        for coding in ("gzip", "br"):
            headers = {"content-type": "application/json", "content-encoding": coding}
            answer = await client.post(COMPLETIONS, content=gzip.compress(b"{}"), headers=headers)
            assert answer.status_code == 400 and f"content-encoding {coding}" in answer.text
        for path in ("/health", "/ping"):
            assert (await client.head(path)).status_code == 200
        headers = {"content-type": "application/json; charset=utf-8"}
        answer = await client.post(COMPLETIONS, content=b'{"prompt": "x", "max_tokens": 1}', headers=headers)
        assert answer.status_code == 200

    ask(service, work)


class Held(Script):
    """A Script that sends one piece each time it is released."""

    def __init__(self, *pieces: str) -> None:
        super().__init__(*pieces)
        self.permits = asyncio.Semaphore(0)

    async def take(self) -> list[RequestOutput]:
        await self.permits.acquire()
        return await super().take()


def test_comments_keep_a_slow_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(sse_keep_alive_interval=0.01) as service:

        async def work(client: httpx.AsyncClient) -> None:
            for path, body in (
                (CHAT, {"messages": MESSAGES}),
                ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
            ):
                held = Held("Yes", ".")
                monkeypatch.setattr(service.engine, "submit", held)
                blocks, comments = "", 0
                async with client.stream("POST", path, json={**body, "stream": True}) as answer:
                    async for line in answer.aiter_lines():
                        comments += line == ": keep-alive"
                        blocks += line + "\n"
                        if line == ": keep-alive" and comments % 2 == 0:
                            held.permits.release()
                assert blocks.startswith(": keep-alive\n\n: keep-alive\n\n") and comments >= 6
                events = [
                    block for block in blocks.removesuffix("\n\n").split("\n\n") if block != ": keep-alive"
                ]
                assert "Yes" in blocks and all("data: " in event for event in events)
            held = Held("Yes", ".")
            monkeypatch.setattr(service.engine, "submit", held)
            async with client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as lines:
                await asyncio.sleep(0.05)
                for _ in range(3):
                    held.permits.release()
                assert b": keep-alive" not in await lines.aread()
            async with client.stream("POST", CHAT, json={"messages": MESSAGES, "stream": True}) as leaving:
                assert await anext(leaving.aiter_lines()) == ": keep-alive"
            while service.admission.num_unfinished:
                await asyncio.sleep(0.01)

        ask(service, work)
    assert service.metrics.finished["abort"] == 1
