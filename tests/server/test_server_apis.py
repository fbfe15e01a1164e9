"""Embeddings, OpenAI's responses, Anthropic's messages and llama.cpp's endpoints, with their own clients if those are
installed."""

from __future__ import annotations

import base64
import json
import re
import struct
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import Script, ask, check, post, serving, stream

from vllmlite import LLM, PoolingParams, SamplingParams
from vllmlite.server.anthropic import protocol as messages
from vllmlite.server.llamacpp import protocol as llamacpp
from vllmlite.server.openai import embeddings_protocol as embeddings
from vllmlite.server.responses import protocol as responses
from vllmlite.server.service import Service

PROMPT = "The Debian Project is"
QUESTION = "What is dpkg?"
CHAT = [{"role": "user", "content": QUESTION}]
FUNCTION = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
THINKING = [
    "<think>Hm",
    ".</think>",
    'Yes.<tool_call>{"name": "weather", ',
    '"arguments": {"city": ',
    '"Oslo"}}',
    "</tool_call>",
]


def chat_text(service: Service, **options: Any) -> str:
    """The text that the chat endpoint answers."""
    answer = post(service, "/v1/chat/completions", messages=CHAT, temperature=0, **options)
    text = answer["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def test_embeddings_equal_the_engines(service: Service) -> None:
    texts = [PROMPT, "A package"]
    answer = post(service, "/v1/embeddings", input=texts, model="demo")
    check(embeddings.Embeddings, answer)
    llm = LLM(dtype="float32", max_model_len=256, device="cpu", num_gpu_blocks_override=64)
    expected = [out.outputs.embedding for out in llm.embed(texts, use_tqdm=False)]
    for entry, vector in zip(answer["data"], expected, strict=True):
        assert entry["embedding"] == pytest.approx(vector, abs=1e-5)
    tokens = [service.tokenizer.encode(text) for text in texts]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    for form in (tokens, [tokens[0]], tokens[0], texts[0]):
        alone = post(service, "/v1/embeddings", input=form)["data"][0]["embedding"]
        assert alone == pytest.approx(expected[0], abs=1e-5)
    assert post(service, "/v1/embeddings", input=texts[0], encoding_format=None)["data"] == answer["data"][:1]
    packed = post(service, "/v1/embeddings", input=texts[0], encoding_format="base64", dimensions=16)
    raw = base64.b64decode(packed["data"][0]["embedding"])
    (short,) = llm.embed(texts[0], pooling_params=PoolingParams(dimensions=16), use_tqdm=False)
    assert struct.unpack("<16f", raw) == pytest.approx(short.outputs.embedding, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": PROMPT, "dimensions": 10**6}, "dimensions"),
        ({"input": PROMPT, "encoding_format": "hex"}, "encoding_format"),
        ({"input": [[10**9]]}, "input"),
        ({"input": "x " * 400}, "input"),
    ],
)
def test_bad_embedding_requests(service: Service, body: dict[str, Any], param: str) -> None:
    assert post(service, "/v1/embeddings", 400, **body)["error"]["param"] == param
    assert service.admission.num_unfinished == 0


def test_a_response_equals_the_chat_completion(service: Service) -> None:
    text = chat_text(service, max_tokens=12)
    body = {"input": QUESTION, "max_output_tokens": 12, "temperature": 0}
    answer = post(service, "/v1/responses", **body)
    check(responses.ResponseObject, answer)
    assert answer["output"][0]["content"][0]["text"] == text
    assert answer["status"] == "incomplete" and answer["incomplete_details"]["reason"] == "max_output_tokens"
    assert answer["usage"]["output_tokens"] == 12
    parts = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    assert (
        post(service, "/v1/responses", **{**body, "input": parts})["output"][0]["content"][0]["text"] == text
    )
    told = post(service, "/v1/responses", **body, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = told["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == text and len(entries[0]["top_logprobs"]) == 2


def test_responses_stream_the_documented_events(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine, "submit", Script(*THINKING))
    body = {"input": QUESTION, "tools": [{"type": "function", **FUNCTION}]}
    events = stream(service, "/v1/responses", **body)
    assert all(name == data["type"] for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name.removeprefix("response.") for name, _ in events]
    assert list(dict.fromkeys(names)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    final = events[-1][1]["response"]
    check(responses.ResponseObject, final)
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    assert final["output"] == done
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert done[0]["content"][0]["text"] == "Hm." and done[1]["content"][0]["text"] == "Yes."
    assert done[2]["name"] == "weather" and json.loads(done[2]["arguments"]) == {"city": "Oslo"}
    pieces = [data["delta"] for name, data in events if name == "response.function_call_arguments.delta"]
    assert "".join(pieces) == done[2]["arguments"] and len(pieces) > 1
    whole = post(service, "/v1/responses", **body)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_errors_name_fields_as_the_api_does(service: Service) -> None:
    for path, body, param in (
        ("/v1/responses", {"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ("/v1/responses", {"input": "x " * 400}, "input"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 400}]}, "messages"),
        ("/v1/chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("/completion", {"prompt": "x", "repeat_penalty": -1}, "repeat_penalty"),
        ("/completion", {"prompt": "x", "n_probs": 10**6}, "n_probs"),
        ("/embedding", {"content": ""}, "content"),
    ):
        assert post(service, path, 400, **body)["error"]["param"] == param
    stops = post(service, "/v1/messages", 400, messages=CHAT, max_tokens=1, stop_sequences=[""])
    assert stops["error"]["message"].startswith("stop_sequences")


def test_a_stream_of_a_response_has_every_logprob(service: Service) -> None:
    # Bytes of half a character have no text of their own, and the end has none either.
    body = {
        "input": "What is dpkg?", "temperature": 0, "max_output_tokens": 6, "top_logprobs": 1,
        "include": ["message.output_text.logprobs"],
        "logit_bias": {str(service.tokenizer.token_id("Ã")): 100},
    }  # fmt: skip
    whole = post(service, "/v1/responses", **body)
    (expected,) = whole["output"][0]["content"]
    assert len(expected["logprobs"]) == whole["usage"]["output_tokens"] == 6
    streamed = stream(service, "/v1/responses", **body)
    (content,) = streamed[-1][1]["response"]["output"][0]["content"]
    assert content == expected
    (done,) = (data for name, data in streamed if name == "response.output_text.done")
    assert done["logprobs"] == expected["logprobs"]


def test_input_items_become_messages(service: Service) -> None:
    from vllmlite.server.responses.items import as_messages

    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Oslo"}'}
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]
    found = as_messages(items, "Speak English.")
    assert [message["role"] for message in found] == ["system", "developer", "user", "assistant", "tool"]
    assert found[3]["content"] == [{"type": "text", "text": "Let me see."}]
    assert found[3]["reasoning_content"] == "Hm"
    assert found[3]["tool_calls"][0]["function"]["name"] == "weather" and found[4]["content"] == "rain"
    bad: list[tuple[dict[str, Any], str]] = [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.content"),
        ({"input": [{"role": 5, "content": "x"}]}, "input.role"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "include": [5]}, "include.0"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
    ]
    for body, param in bad:
        assert post(service, "/v1/responses", 400, **body)["error"]["param"] == param, body


def test_openais_client_reads_responses_and_embeddings(service: Service) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client (Debian: python3-openai)")
    text = chat_text(service, max_tokens=8)

    async def work(client: httpx.AsyncClient) -> None:
        url = str(client.base_url).rstrip("/") + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
            options = {"model": "demo", "max_output_tokens": 8, "temperature": 0}
            answer = await api.responses.create(input=QUESTION, **options)
            assert answer.output_text == text and answer.usage.output_tokens == 8
            async with api.responses.stream(input=QUESTION, **options) as events:
                deltas = [event.delta async for event in events if event.type == "response.output_text.delta"]
            assert "".join(deltas) == text
            found = await api.embeddings.create(model="demo", input=[PROMPT], dimensions=4)  # as base64
            assert len(found.data[0].embedding) == 4

    ask(service, work)


def test_a_message_equals_the_chat_completion(service: Service) -> None:
    text = chat_text(service, max_tokens=12)
    body = {"model": "demo", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    answer = post(service, "/v1/messages", **body)
    check(messages.AnthropicAnswer, answer)
    assert answer["content"] == [{"type": "text", "text": text}] and answer["stop_reason"] == "max_tokens"
    assert answer["usage"]["output_tokens"] == 12
    word = text.split()[2]
    stopped = post(service, "/v1/messages", **body, stop_sequences=[word])
    assert stopped["content"][0]["text"] == text[: text.index(word)]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", word)
    count = post(service, "/v1/messages/count_tokens", messages=CHAT, system="Be brief.")["input_tokens"]
    full = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert count == post(service, "/tokenize", messages=full)["count"]
    begun = [*CHAT, {"role": "assistant", "content": "The tool"}]
    rest = post(service, "/v1/messages", **{**body, "messages": begun})["content"][0]["text"]
    assert rest == chat_text_of(service, begun)


def chat_text_of(service: Service, talk: list[dict[str, str]]) -> str:
    options = {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "temperature": 0,
        "max_tokens": 12,
    }
    answer = post(service, "/v1/chat/completions", messages=talk, **options)
    text = answer["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def test_messages_stream_blocks(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine, "submit", Script(*THINKING))
    tool = {"name": "weather", "input_schema": FUNCTION["parameters"]}
    body = {"messages": CHAT, "max_tokens": 50, "tools": [tool]}
    events = stream(service, "/v1/messages", **body)
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
    starts = [data["content_block"]["type"] for name, data in events if name == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"] and names.count("content_block_stop") == 3
    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("text", "") for delta in deltas) == "Yes."
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == {"city": "Oslo"}
    assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    whole = post(service, "/v1/messages", **body)
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][2]["input"] == {"city": "Oslo"} and whole["stop_reason"] == "tool_use"


def test_tools_that_may_not_be_called_are_hidden_where_that_is_wanted() -> None:
    schema = {"type": "object", "properties": {}}
    function = {"name": "secret", "parameters": schema}
    template = "{{ messages[0].content }} {{ tools }}"
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": CHAT, "max_tokens": 1, "tools": [{"type": "function", "function": function}],
            "tool_choice": "none",
        },
        "/v1/responses": {
            "input": "Hi", "max_output_tokens": 1, "tools": [{"type": "function", **function}], "tool_choice": "none",
        },
        "/v1/messages": {
            "messages": CHAT, "max_tokens": 1, "tools": [{"name": "secret", "input_schema": schema}],
            "tool_choice": {"type": "none"},
        },
    }  # fmt: skip
    for hides in (False, True):
        with serving(chat_template=template, exclude_tools_when_tool_choice_none=hides) as service:
            for path, body in bodies.items():
                script = Script("x")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(service.engine, "submit", script)
                    post(service, path, **body)
                assert script.request is not None
                prompt: Any = script.request.prompt
                assert ("secret" in prompt["prompt"]) is not hides
            counted = post(service, "/v1/responses/input_tokens", **bodies["/v1/responses"])
            assert (counted["input_tokens"] < 10) is hides


def test_content_blocks_become_messages(service: Service) -> None:
    from vllmlite.server.anthropic.blocks import as_messages

    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "rain"}]},
    ]
    found = as_messages(
        [messages.AnthropicMessage.model_validate(turn) for turn in turns],
        [{"type": "text", "text": "Be brief."}],
    )
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool"]
    thought, said = found[2]["content"]
    assert thought["thinking"] == "Hm" and said["text"] == "Let me see." and found[3]["content"] == "rain"
    assert json.loads(found[2]["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
    bad: list[dict[str, Any]] = [
        {"messages": CHAT},
        {"messages": [], "max_tokens": 5},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 5},
        {"messages": CHAT, "max_tokens": 5, "thinking": {"type": "enabled", "budget_tokens": 5}},
        {"messages": CHAT, "max_tokens": 5, "tool_choice": {"type": "tool", "name": "x"}},
    ]
    for body in bad:
        error = post(service, "/v1/messages", 400, **body)
        check(messages.AnthropicError, error)
        assert error["error"]["type"] == "invalid_request_error"
    assert (
        post(service, "/v1/messages", 404, model="x", messages=CHAT, max_tokens=5)["error"]["type"]
        == "not_found_error"
    )


def test_anthropics_client_runs_unmodified(service: Service) -> None:
    anthropic = pytest.importorskip("anthropic", reason="needs Anthropic's client")
    text = chat_text(service, max_tokens=8)

    async def work(client: httpx.AsyncClient) -> None:
        async with anthropic.AsyncAnthropic(
            base_url=str(client.base_url), api_key="none", max_retries=0
        ) as api:
            greedy = {"temperature": 0}  # which newer clients do not name
            options = {"model": "demo", "max_tokens": 8, "messages": CHAT, "extra_body": greedy}
            answer = await api.messages.create(**options)
            assert answer.content[0].text == text and answer.stop_reason == "max_tokens"
            async with api.messages.stream(**options) as events:
                assert "".join([piece async for piece in events.text_stream]) == text
                assert (await events.get_final_message()).usage.output_tokens == 8
            with pytest.raises(anthropic.BadRequestError, match="temperature"):
                await api.messages.create(**{**options, "extra_body": {"temperature": -1}})

    ask(service, work)


def test_llamacpps_completion(service: Service) -> None:
    body = {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    whole = post(service, "/completion", **body)
    check(llamacpp.LlamaAnswer, whole)
    plain = post(service, "/v1/completions", prompt=PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
    assert whole["content"] == plain["choices"][0]["text"] and whole["stop_type"] == "limit"
    assert whole["tokens_predicted"] == len(whole["tokens"]) == 12 and whole["prompt"] == PROMPT
    assert service.tokenizer.decode(whole["tokens"]) == whole["content"]
    pieces = [data for _, data in stream(service, "/completion", **body)]
    for piece in pieces:
        check(llamacpp.LlamaAnswer, piece)
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    word = whole["content"].split()[2]
    stopped = post(service, "/completion", **body, stop=[word])
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    told = post(service, "/completion", **body, n_probs=2)["completion_probabilities"]
    assert [entry["id"] for entry in told] == whole["tokens"] and len(told[0]["top_logprobs"]) == 2
    begin = service.tokenizer.decode(whole["tokens"][:1])
    assert service.tokenizer.encode(begin, False) == whole["tokens"][:1]
    for bias in (
        [[whole["tokens"][0], False]],
        {str(whole["tokens"][0]): -100},
        [[begin, -100]],
        {begin: False},
    ):
        assert post(service, "/completion", **body, logit_bias=bias)["tokens"][0] != whole["tokens"][0]
    for field, value in (
        ("mirostat", 2),
        ("logit_bias", [[None, 1]]),
        ("logit_bias", {"x": None}),
        ("logit_bias", [[5, 10**400]]),
        ("n_predict", -2),
        ("prompt", ["a", None]),
    ):
        assert post(service, "/completion", 400, **{**body, field: value})["error"]["param"] == field
    assert post(service, "/completion", **body, mirostat=0, cache_prompt=True, samplers=[])["content"]


def test_llamacpps_grammars(service: Service) -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)")
    body = {"prompt": PROMPT, "n_predict": 60, "temperature": 1, "seed": 1}
    answer = post(service, "/completion", **body, grammar='root ::= [a-c]{,3} end # .\nend ::= | "."')
    assert re.fullmatch("[a-c]{0,3}[.]?", answer["content"]) and answer["stop_type"] == "eos"
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"],
    }
    found = json.loads(post(service, "/completion", **body, json_schema=schema)["content"])
    assert found.keys() == {"n"} and 0 <= found["n"] <= 9
    bad_ones: list[dict[str, Any]] = [
        {"grammar": "root ::= none"},
        {"json_schema": {"not": {}}},
        {"grammar": "x", "json_schema": schema},
    ]
    for bad in bad_ones:
        assert post(service, "/completion", 400, **body, **bad)["error"]["message"]


def test_llamacpps_props_and_infill(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    props = ask(service, lambda client: client.get("/props")).json()
    check(llamacpp.LlamaProps, props)
    assert props["default_generation_settings"]["n_ctx"] == 256 and "im_start" in props["chat_template"]
    body = {"input_prefix": "def f(", "input_suffix": "return x", "prompt": "x", "n_predict": 4}
    assert "fill-in tokens" in post(service, "/infill", 501, **body)["error"]["message"]
    ids = {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3, "<file_sep>": 4}
    monkeypatch.setattr(service.tokenizer, "token_id", ids.get)
    script = Script("x)")
    monkeypatch.setattr(service.engine, "submit", script)
    encode = service.tokenizer.encode

    def prompt() -> list[int]:
        assert script.request is not None
        given: Any = script.request.prompt
        return list(given["prompt_token_ids"])

    assert post(service, "/infill", **body)["content"] == "x)"
    expected = [1, *encode("def f(", False), 2, *encode("return x", False), 3, *encode("x", False)]
    assert prompt() == expected
    post(service, "/infill", **body, input_extra=[{"filename": "a.py", "text": "y"}])
    extra = [4, *encode("a.py\ny", False), 4, *encode("filename\n", False)]
    assert prompt() == extra + expected
    assert isinstance(script.request.params if script.request else None, SamplingParams)
