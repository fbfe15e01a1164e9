"""The error for a prompt that is too long has each API's own form, by which clients know that they must shorten a
conversation.

litellm, langchain-openai and Claude Code look for these texts and fields; they are not installed here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import ENGINE, ask, check, post, serving

from vllmlite.errors import ContextLengthError
from vllmlite.server.anthropic.protocol import AnthropicError
from vllmlite.server.llamacpp.protocol import LlamaError
from vllmlite.server.protocol.base import ErrorAnswer
from vllmlite.server.service import Service

CONTEXT = ENGINE.max_model_len or 0
LONG = "word " * 400
HUGE = "x" * 10**6
"""Refused for its characters, before it is tokenised."""
TALK = [{"role": "user", "content": LONG}]
LITELLM = "this model's maximum context length is"
CLAUDE_CODE = re.compile(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)", re.IGNORECASE)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "messages", TALK),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": HUGE}]),
        ("/v1/completions", "prompt", LONG),
        ("/v1/completions", "prompt", [1] * CONTEXT),
        ("/v1/completions", "prompt", ["short", LONG]),
        ("/v1/responses", "input", LONG),
        ("/v1/embeddings", "input", LONG),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_context_errors_have_openais_form(
    service: Service, path: str, field: str, value: Any, streamed: bool
) -> None:
    if streamed and path == "/v1/embeddings":
        return
    answer = post(service, path, 400, **{field: value}, **({"stream": True} if streamed else {}))
    check(ErrorAnswer, answer)
    error = answer["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "context_length_exceeded",
        field,
    )
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]
    assert LITELLM in error["message"].lower()
    assert re.search(r"has (at least )?\d+ input tokens", error["message"])
    assert service.admission.num_unfinished == 0


@pytest.mark.parametrize("content", [LONG, HUGE])
def test_context_errors_have_anthropics_form(service: Service, content: str) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5}
    answer = post(service, "/v1/messages", 400, **body)
    check(AnthropicError, answer)
    assert answer["error"]["type"] == "invalid_request_error"
    found = CLAUDE_CODE.search(answer["error"]["message"])
    assert found is not None and int(found[1]) > int(found[2]) == CONTEXT - 1
    if content == LONG:
        counted = post(service, "/v1/messages/count_tokens", messages=body["messages"])["input_tokens"]
        assert answer["error"]["message"] == f"prompt is too long: {counted} tokens > {CONTEXT - 1} maximum"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", {"prompt": LONG}),
        ("/completion", {"prompt": LONG, "stream": True}),
        ("/completion", {"prompt": HUGE}),
        ("/embedding", {"content": LONG}),
        ("/chat/completions", {"messages": TALK}),
    ],
)
def test_context_errors_have_llamacpps_form(service: Service, path: str, body: dict[str, Any]) -> None:
    answer = post(service, path, 400, **body)
    check(LlamaError, answer)
    error = answer["error"]
    assert (error["type"], error["code"]) == ("exceed_context_size_error", 400)
    assert error["n_prompt_tokens"] > error["n_ctx"] == CONTEXT
    assert "exceeds the available context size" in error["message"]


def test_a_prompt_of_the_maximum_length_is_answered(service: Service) -> None:
    fits = post(service, "/v1/completions", prompt=[1] * (CONTEXT - 1), temperature=0)
    assert fits["usage"]["completion_tokens"] == 1
    error = post(service, "/v1/completions", 400, prompt=[1] * CONTEXT)["error"]
    assert f"has {CONTEXT} input tokens, and at most {CONTEXT - 1} fit" in error["message"]


def test_other_errors_of_llamacpps_routes_have_its_form(service: Service) -> None:
    for path, status, kind in (
        ("/completion", 400, "invalid_request_error"),
        ("/infill", 501, "not_supported_error"),
    ):
        body = {"input_prefix": "a", "input_suffix": "b"} if path == "/infill" else {"prompt": 5}
        answer = post(service, path, status, **body)
        check(LlamaError, answer)
        assert (answer["error"]["code"], answer["error"]["type"]) == (status, kind)


def test_openais_client_sees_the_code(service: Service) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client")

    async def work(client: httpx.AsyncClient) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{client.base_url}/v1", api_key="none", max_retries=0
        ) as ours:
            with pytest.raises(openai.BadRequestError) as caught:
                await ours.chat.completions.create(model="demo", messages=TALK, stream=True)
            assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
            assert "context_length_exceeded" in str(caught.value)  # langchain-openai's test
            with pytest.raises(openai.BadRequestError) as caught:
                await ours.responses.create(model="demo", input=LONG)
            assert caught.value.code == "context_length_exceeded" and caught.value.param == "input"

    ask(service, work)


def test_the_error_crosses_processes_and_keeps_its_numbers() -> None:
    error = ContextLengthError("prompt", 300, 255, 256, exact=False).renamed("messages")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(copy, ContextLengthError) and isinstance(copy, ValueError)
        assert (copy.field, copy.num_tokens, copy.max_prompt_tokens, copy.max_model_len, copy.exact) == (
            "messages", 300, 255, 256, False,
        )  # fmt: skip
        assert "at least 300 tokens" in str(copy) and "maximum context length is 256 tokens" in str(copy)
