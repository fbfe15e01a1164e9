"""What clients of vLLM read of responses besides the text: null fields, usage, log-probabilities, load, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import ENGINE, ask, check, client_of, post, serving, stream

from vllmlite.outputs import EngineStats
from vllmlite.server.anthropic import protocol as messages
from vllmlite.server.metrics import Metrics
from vllmlite.server.openai import chat_protocol as chat
from vllmlite.server.openai import completions_protocol as completions
from vllmlite.server.service import Service

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
TALK = [{"role": "user", "content": "What is dpkg?"}]
PROMPT = "The Debian Project is"
GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TALK, **GREEDY},
    COMPLETIONS: {"prompt": PROMPT, **GREEDY},
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(replace(ENGINE, max_logprobs=-1)) as service:
        yield service


def get(service: Service, path: str, status: int = 200) -> httpx.Response:
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        answer = await client.get(path)
        assert answer.status_code == status, answer.text
        return answer

    return ask(service, work)


def metrics_of(service: Service) -> dict[str, float]:
    """Every metric sample, by its name and those of its labels that differ."""
    found = {}
    for line in get(service, "/metrics").text.splitlines():
        if line.startswith("vllm"):
            name, _, value = line.rpartition(" ")
            found[name.replace('engine="0",', "").replace('model_name="demo"', "")] = float(value)
    return found


def test_fields_that_vllm_sends_as_null_are_present(service: Service) -> None:
    answer = post(service, CHAT, **BODIES[CHAT])
    check(chat.ChatCompletion, answer)
    for name in (
        "system_fingerprint",
        "service_tier",
        "prompt_logprobs",
        "prompt_token_ids",
        "kv_transfer_params",
    ):
        assert answer[name] is None
    (choice,) = answer["choices"]
    assert choice["token_ids"] is None and choice["stop_reason"] is None
    assert all(choice["message"][name] is None for name in ("reasoning", "reasoning_content", "refusal"))
    answer = post(service, COMPLETIONS, **BODIES[COMPLETIONS])
    check(completions.Completion, answer)
    assert all(answer[name] is None for name in ("system_fingerprint", "service_tier", "kv_transfer_params"))
    (choice,) = answer["choices"]
    assert all(choice[name] is None for name in ("prompt_logprobs", "prompt_token_ids", "token_ids"))
    told = post(service, CHAT, **BODIES[CHAT], return_token_ids=True, prompt_logprobs=0)
    assert len(told["prompt_token_ids"]) == len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
    assert len(told["choices"][0]["token_ids"]) == 4
    again = [*TALK, told["choices"][0]["message"], {"role": "user", "content": "And apt?"}]
    assert post(service, CHAT, messages=again, **GREEDY)["choices"]


def test_openais_client_reads_fields_of_vllms(service: Service) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client")

    async def work(client: httpx.AsyncClient) -> None:
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none") as api:
            answer = await api.chat.completions.create(model="demo", messages=TALK, max_tokens=2)
            assert answer.choices[0].message.reasoning is None and answer.prompt_logprobs is None
            answer = await api.completions.create(model="demo", prompt=PROMPT, max_tokens=2)
            assert answer.choices[0].prompt_logprobs is None and answer.kv_transfer_params is None

    ask(service, work)


def usages(service: Service, path: str, forced: bool = False, **options: Any) -> list[Any]:
    """The usage of each chunk of a stream, ``absent`` for a chunk without one."""
    body = {**BODIES[path], **({"stream_options": options} if options else {})}
    config, service.config = service.config, replace(service.config, enable_force_include_usage=forced)
    try:
        events = [data for _, data in stream(service, path, **body)]
    finally:
        service.config = config
    assert events.pop() == "[DONE]"
    return [event.get("usage", "absent") for event in events]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_in_streams(service: Service, path: str) -> None:
    opening = 1 if path == CHAT else 0  # a chunk with the role
    for options in ({}, {"include_usage": False}, {"include_usage": False, "continuous_usage_stats": True}):
        assert set(usages(service, path, **options)) == {"absent"}
    ended = usages(service, path, include_usage=True)
    assert set(map(json.dumps, ended[:-1])) == {"null"} and ended[-1]["completion_tokens"] == 4
    every = usages(service, path, include_usage=True, continuous_usage_stats=True)
    for found in (
        every,
        usages(service, path, forced=True),
        usages(service, path, forced=True, include_usage=False),
    ):
        counts = [usage["completion_tokens"] for usage in found]
        assert counts[:opening] == [0] * opening and counts[-2:] == [4, 4]
        assert counts == sorted(counts) and counts[opening] > 0
        for usage in found:
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert usage["prompt_tokens"] == ended[-1]["prompt_tokens"]


def test_anthropics_usage_counts_cached_tokens(service: Service) -> None:
    post(service, "/tokenize", prompt="x")
    body = {"messages": [{"role": "user", "content": "cache " * 40}], "max_tokens": 3, "temperature": 0}
    size = service.engine.llm_engine.config.block_size
    first = post(service, MESSAGES, **body)
    check(messages.AnthropicAnswer, first)
    second = post(service, MESSAGES, **body)["usage"]
    created = first["usage"]["cache_creation_input_tokens"]
    assert created > 0 and created % size == 0 and first["usage"]["cache_read_input_tokens"] == 0
    assert second["cache_read_input_tokens"] == created and second["cache_creation_input_tokens"] == 0
    assert second["input_tokens"] == first["usage"]["input_tokens"]
    (start, *_) = [data for _, data in stream(service, MESSAGES, **body)]
    assert start["type"] == "message_start" and start["message"]["usage"]["output_tokens"] == 0


def test_a_scored_prompt_has_no_completion(service: Service) -> None:
    body = {"prompt": PROMPT, "echo": True, "max_tokens": 0, "return_token_ids": True}
    answer = post(service, COMPLETIONS, **body, logprobs=1)
    count = answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == count
    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (PROMPT, [], "length")
    assert len(choice["logprobs"]["tokens"]) == count
    events = [
        data for _, data in stream(service, COMPLETIONS, **body, stream_options={"include_usage": True})
    ]
    assert events[-2]["usage"]["completion_tokens"] == 0
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]][-1] == "length"


def test_greedy_completions_are_all_the_same(service: Service) -> None:
    for path, field in ((CHAT, "message"), (COMPLETIONS, "text")):
        answer = post(service, path, **BODIES[path], n=2)
        first, second = (choice[field] for choice in answer["choices"])
        assert first == second == post(service, path, **BODIES[path])["choices"][0][field]
        assert answer["usage"]["completion_tokens"] == 8


def test_log_probabilities_of_the_whole_vocabulary(service: Service) -> None:
    size = service.engine.llm_engine.engine_core.bounds.vocab_size
    body = {**BODIES[CHAT], "max_tokens": 1, "logprobs": True, "top_logprobs": -1}
    (entry,) = post(service, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert len(entry["top_logprobs"]) == size and entry["top_logprobs"][0]["token"] == entry["token"]
    body = {**BODIES[COMPLETIONS], "max_tokens": 1, "logprobs": -1}
    (likeliest,) = post(service, COMPLETIONS, **body)["choices"][0]["logprobs"]["top_logprobs"]
    assert len(likeliest) == size
    error = post(service, CHAT, 400, **BODIES[CHAT], logprobs=True, top_logprobs=-2)["error"]
    assert error["param"] == "top_logprobs"


def test_token_strings_are_the_vocabularys(service: Service) -> None:
    answer = post(service, "/tokenize", prompt="dpkg is é", return_token_strs=True)
    assert answer["token_strs"] == [service.tokenizer.token_string(token) for token in answer["tokens"]]
    assert any(string.startswith("Ġ") for string in answer["token_strs"])


def test_openais_endpoints_go_without_v1_too(service: Service) -> None:
    for path, body in (
        ("/responses", {"input": "What is dpkg?", "max_output_tokens": 3, "temperature": 0}),
        ("/embeddings", {"input": PROMPT}),
        ("/chat/completions", BODIES[CHAT]),
    ):
        assert post(service, path, **body).keys() == post(service, "/v1" + path, **body).keys()


def test_models_are_listed_with_a_slash_too(service: Service) -> None:
    assert get(service, "/v1/models/").json() == get(service, "/v1/models").json()
    assert get(service, "/v1/models/demo").json()["id"] == "demo"


def test_an_idle_server_has_no_load(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async def load() -> Any:
            return (await client.get("/load")).json()["server_load"]

        assert await load() == 0
        body = {**BODIES[CHAT], "max_tokens": 200, "stream": True}
        async with client.stream("POST", CHAT, json=body) as answer:
            await anext(answer.aiter_bytes())
            assert await load() == 1
        while await load():
            await asyncio.sleep(0.01)

    ask(service, work)


def test_metrics_of_drafts_have_vllms_names() -> None:
    pytest.importorskip("prometheus_client")
    stats = EngineStats(
        num_drafts=4, num_draft_tokens=12, num_accepted_tokens=5, num_accepted_tokens_per_pos=(3, 2, 0)
    )
    text = Metrics("m", 64, lambda: stats).exposition("")[0].decode()
    labels = 'engine="0",model_name="m"'
    for line in (
        f"vllm:spec_decode_num_drafts_total{{{labels}}} 4.0",
        f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} 12.0",
        f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} 5.0",
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}} 2.0',
    ):
        assert line in text


def test_metrics_of_cache_tiers() -> None:
    pytest.importorskip("prometheus_client")
    stats = EngineStats(external_prefix_cache_queries=64, external_prefix_cache_hits=48, tier_blocks_read=3)
    text = Metrics("m", 64, lambda: stats).exposition("")[0].decode()
    labels = 'engine="0",model_name="m"'
    for line in (
        f"vllm:external_prefix_cache_queries_total{{{labels}}} 64.0",
        f"vllm:external_prefix_cache_hits_total{{{labels}}} 48.0",
        'vllmlite:tier_blocks_total{engine="0",event="read",model_name="m"} 3.0',
    ):
        assert line in text


def test_metrics_of_requests() -> None:
    with serving(ENGINE, max_queue=0) as service:
        body = {**BODIES[COMPLETIONS], "prompt": [PROMPT, "A package"], "n": 2}
        usage = post(service, COMPLETIONS, **body)["usage"]
        post(service, "/v1/embeddings", input="x y z")
        found = metrics_of(service)
        vector_tokens = found["vllm:prompt_tokens_total{}"] - 2 * usage["prompt_tokens"]
        steps_tokens = found["vllm:iteration_tokens_total_sum{}"]
        assert vector_tokens > 0
        assert steps_tokens == 2 * usage["prompt_tokens"] + vector_tokens + usage["completion_tokens"]
        assert found["vllm:request_max_num_generation_tokens_count{}"] == 2
        assert found["vllm:request_max_num_generation_tokens_sum{}"] == 8
        assert found["vllm:request_num_preemptions_sum{}"] == 0
        assert found["vllm:request_num_preemptions_count{}"] == found["vllm:request_prompt_tokens_count{}"]
        assert found['vllm:num_requests_waiting_by_reason{reason="capacity"}'.replace("{", "{,")] == 0
        service.admission.num_unfinished, kept = service.admission.capacity, service.admission.num_unfinished
        post(service, COMPLETIONS, 429, **BODIES[COMPLETIONS])
        service.admission.num_unfinished = kept
        assert metrics_of(service)['vllm:admission_rejections_total{,reason="queue_full"}'] == 1


def test_proxies_that_keep_the_root_path(service: Service) -> None:
    config, service.config = service.config, replace(service.config, root_path="/llm")

    async def work() -> None:
        async with client_of(service) as client:
            for path in ("/v1/models", "/llm/v1/models", "/llm/v1/models/demo"):
                assert (await client.get(path)).status_code == 200, path
            assert (await client.get("/llmv1/models")).status_code == 404
            for prefix in ("", "/llm"):
                answer = await client.post(prefix + MESSAGES, json={})
                assert answer.status_code == 400 and answer.json()["type"] == "error"
            document = (await client.get("/llm/openapi.json")).json()
            assert "/v1/models" in document["paths"]

    try:
        asyncio.run(work())
    finally:
        service.config = config


def test_streams_to_http10_clients_end_with_the_connection(service: Service) -> None:
    body = json.dumps({**BODIES[COMPLETIONS], "stream": True}).encode()
    head = b"POST /v1/completions HTTP/%b\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    async def ask_raw(port: int, version: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head % (version, len(body)) + body)
        answer = b""
        while not answer.endswith((b"data: [DONE]\n\n", b"0\r\n\r\n")):
            answer += await asyncio.wait_for(reader.read(1 << 16), 30)
        if version == b"1.0":
            assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        return answer.partition(b"\r\n\r\n")[::2]

    async def work(client: httpx.AsyncClient) -> None:
        assert client.base_url.port is not None
        headers, text = await ask_raw(client.base_url.port, b"1.0")
        assert b"chunked" not in headers.lower() and b"connection: close" in headers.lower()
        events = text.decode().removesuffix("\n\n").split("\n\n")
        assert events[-1] == "data: [DONE]" and all(event.startswith("data: ") for event in events)
        headers, text = await ask_raw(client.base_url.port, b"1.1")
        assert b"transfer-encoding: chunked" in headers.lower() and text.endswith(b"0\r\n\r\n")

    ask(service, work)
