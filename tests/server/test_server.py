"""The server's endpoints, over a socket, compared with the engine's own results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from fastapi import Request
from served import ENGINE, ask, check, client_of, post, serving
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllmlite import SamplingParams, __version__
from vllmlite.sampling_params import BeamSearchParams
from vllmlite.server import operations_protocol as operations
from vllmlite.server.errors import as_api_error
from vllmlite.server.openai import chat_protocol as chat
from vllmlite.server.openai import completions_protocol as completions
from vllmlite.server.protocol import base
from vllmlite.server.service import Service

PROMPT = "The Debian Project is"
PROMPTS = [PROMPT, "The kernel", "A package", "To install"]
MESSAGES = [{"role": "user", "content": "What is dpkg?"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(trust_request_chat_template=True) as service:
        yield service


def get(service: Service, path: str) -> httpx.Response:
    return ask(service, lambda client: client.get(path))


async def events(client: httpx.AsyncClient, path: str, **body: Any) -> AsyncIterator[Any]:
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        ended = False
        async for line in answer.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ") and not ended
            if line == "data: [DONE]":
                ended = True
            else:
                yield json.loads(line.removeprefix("data: "))
        assert ended


def stream(service: Service, path: str, **body: Any) -> list[Any]:
    async def work(client: httpx.AsyncClient) -> list[Any]:
        return [event async for event in events(client, path, **body)]

    return ask(service, work)


def direct(service: Service, prompt: Any, **options: Any) -> Any:
    """The result of the engine without a server."""

    async def run() -> Any:
        async for output in service.engine.generate(prompt, SamplingParams(**options), "direct"):
            last = output
        return last

    return asyncio.run(run())


def test_a_completion_equals_the_engines_output(service: Service) -> None:
    answer = post(service, "/v1/completions", prompt=PROMPT, model="demo", **GREEDY)
    check(completions.Completion, answer)
    expected = direct(service, PROMPT, **GREEDY)
    (choice,) = answer["choices"]
    assert choice["text"] == expected.outputs[0].text
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("length", None, None)
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["model"] == "demo" and answer["id"].startswith("cmpl-")


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_give_the_results_of_each_alone(service: Service, as_ids: bool) -> None:
    prompts: list[Any] = [service.tokenizer.encode(p) for p in PROMPTS] if as_ids else list(PROMPTS)
    together = post(service, "/v1/completions", prompt=prompts, **GREEDY)
    alone = [post(service, "/v1/completions", prompt=p, **GREEDY)["choices"][0]["text"] for p in prompts]
    assert [choice["text"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    streamed = stream(service, "/v1/completions", prompt=prompts, **GREEDY)
    texts = [""] * len(prompts)
    for event in streamed:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == alone


def test_n_seeded_completions_stream_and_repeat(service: Service) -> None:
    body = {
        "prompt": PROMPT,
        "n": 3,
        "temperature": 3.0,
        "seed": 5,
        "max_tokens": 10,
        "top_k": 500,
        "min_p": 0.0001,
    }
    whole = post(service, "/v1/completions", **body)
    assert len({choice["text"] for choice in whole["choices"]}) == 3
    texts = ["", "", ""]
    for event in stream(service, "/v1/completions", **body):
        check(completions.Completion, event)
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert whole["usage"]["completion_tokens"] == 30


def test_echo_and_scoring(service: Service) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0}
    ids = service.tokenizer.encode(PROMPT)
    scored = post(service, "/v1/completions", max_tokens=0, **body)["choices"][0]
    assert scored["text"] == PROMPT
    columns = scored["logprobs"]
    assert "".join(columns["tokens"]) == PROMPT
    assert [
        PROMPT[at:].startswith(t) for at, t in zip(columns["text_offset"], columns["tokens"], strict=True)
    ]
    assert columns["token_logprobs"][0] is None
    expected = direct(service, PROMPT, max_tokens=1, prompt_logprobs=2)
    given = [e[i].logprob for e, i in zip(expected.prompt_logprobs[1:], ids[1:], strict=True)]
    assert columns["token_logprobs"][1:] == pytest.approx(given)
    longer = post(service, "/v1/completions", max_tokens=3, **body)["choices"][0]
    assert longer["text"].startswith(PROMPT) and len(longer["logprobs"]["tokens"]) == len(ids) + 3
    events = stream(service, "/v1/completions", prompt=PROMPT, echo=True, max_tokens=3, temperature=0)
    assert "".join(e["choices"][0]["text"] for e in events) == longer["text"]


def test_logprobs_of_named_ids(service: Service) -> None:
    ids, names = [3, 7], {"token_id:3", "token_id:7"}
    named = {"logprob_token_ids": ids, "return_tokens_as_token_ids": True, "max_tokens": 2}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    for top in (None, 2):
        found = post(service, "/v1/chat/completions", **chat, **named, top_logprobs=top)["choices"][0]
        for entry in found["logprobs"]["content"]:
            assert names <= {other["token"] for other in entry["top_logprobs"]}
            assert len(entry["top_logprobs"]) <= 2 + (top or 0)
    found = post(service, "/v1/completions", prompt="Hi", logprobs=0, **named)["choices"][0]
    for token, top in zip(found["logprobs"]["tokens"], found["logprobs"]["top_logprobs"], strict=True):
        assert top.keys() == {token, *names}
    error = post(service, "/v1/completions", 400, prompt="Hi", **named)["error"]
    assert error["param"] == "logprob_token_ids" and "logprobs" in error["message"]


def test_logprobs_of_both_endpoints(service: Service) -> None:
    columns = post(service, "/v1/completions", prompt=PROMPT, logprobs=3, **GREEDY)["choices"][0]["logprobs"]
    for chosen, top in zip(columns["token_logprobs"], columns["top_logprobs"], strict=True):
        assert chosen == max(top.values())
    ids = post(
        service, "/v1/completions", prompt=PROMPT, logprobs=0, return_tokens_as_token_ids=True, **GREEDY
    )
    assert all(t.startswith("token_id:") for t in ids["choices"][0]["logprobs"]["tokens"])
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    answer = post(service, "/v1/chat/completions", **body)
    check(chat.ChatCompletion, answer)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer["choices"][0]["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
    pieces = stream(service, "/v1/chat/completions", **body)
    streamed = [e for p in pieces for c in p["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert streamed == content
    plain = post(service, "/v1/chat/completions", messages=MESSAGES, prompt_logprobs=1, **GREEDY)
    assert (
        plain["prompt_logprobs"][0] is None
        and len(plain["prompt_logprobs"]) == plain["usage"]["prompt_tokens"]
    )


def test_a_streamed_chat_completion_equals_the_whole_one(service: Service) -> None:
    whole = post(service, "/v1/chat/completions", messages=MESSAGES, **GREEDY)
    pieces = stream(
        service, "/v1/chat/completions", messages=MESSAGES, stream_options={"include_usage": True}, **GREEDY
    )
    for piece in pieces:
        check(chat.ChatChunk, piece)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["delta"].get("content", "") for p in pieces for c in p["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert pieces[-2]["choices"][0]["finish_reason"] == "length"
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [pieces[-1]["usage"][c] for c in counts] == [whole["usage"][c] for c in counts]
    assert {p["id"] for p in pieces} == {pieces[0]["id"]}
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is dpkg?"}]}]
    same = post(
        service, "/v1/chat/completions", messages=parts, max_completion_tokens=12, **_without_max(GREEDY)
    )
    assert same["choices"][0]["message"] == whole["choices"][0]["message"]
    prompt = service.tokenizer.apply_chat_template(MESSAGES)
    assert direct(service, prompt, **GREEDY).outputs[0].text == text


def _without_max(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "max_tokens"}


def test_usage_in_every_chunk(service: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = stream(service, "/v1/completions", prompt=PROMPT, stream_options=options, **GREEDY)
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts) and counts[-1] == 12


def test_continuing_a_message_and_other_templates(service: Service) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The tool"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True, **GREEDY}
    rest = post(service, "/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    tokens = post(service, "/tokenize", **{k: v for k, v in body.items() if k not in GREEDY})["tokens"]
    assert service.tokenizer.decode(tokens, skip_special_tokens=False).endswith("The tool")
    echoed = post(service, "/v1/chat/completions", echo=True, **body)["choices"][0]["message"]["content"]
    assert echoed == "The tool" + rest
    template = "{% for m in messages %}{{ m.content }}{{ extra }}{% endfor %}"
    plain = post(
        service, "/v1/chat/completions", messages=[{"role": "user", "content": "Debian"}], chat_template=template,
        chat_template_kwargs={"extra": " is"}, **GREEDY,
    )  # fmt: skip
    assert plain["choices"][0]["message"]["content"] == direct(service, "Debian is", **GREEDY).outputs[0].text


def test_stop_strings_and_logit_bias_reach_the_engine(service: Service) -> None:
    text = post(service, "/v1/completions", prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    word = text.split()[2]
    stopped = post(service, "/v1/completions", prompt=PROMPT, stop=[word], **GREEDY)["choices"][0]
    assert stopped["text"] == text[: text.index(word)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", word)
    kept = post(
        service, "/v1/completions", prompt=PROMPT, stop=word, include_stop_str_in_output=True, **GREEDY
    )
    assert kept["choices"][0]["text"].endswith(word)
    first = service.tokenizer.encode(PROMPT + text)[len(service.tokenizer.encode(PROMPT))]
    biased = post(service, "/v1/completions", prompt=PROMPT, logit_bias={str(first): -100}, **GREEDY)
    assert not biased["choices"][0]["text"].startswith(service.tokenizer.token_text(first))
    ids = post(service, "/v1/completions", prompt=PROMPT, return_token_ids=True, **GREEDY)["choices"][0]
    assert ids["prompt_token_ids"] == service.tokenizer.encode(PROMPT) and len(ids["token_ids"]) == 12
    end = post(service, "/v1/completions", prompt=PROMPT, stop_token_ids=[ids["token_ids"][4]], **GREEDY)
    assert end["usage"]["completion_tokens"] == 5 and end["choices"][0]["stop_reason"] == ids["token_ids"][4]


def test_plain_generate(service: Service) -> None:
    text = direct(service, PROMPT, **GREEDY).outputs[0].text
    assert post(service, "/generate", prompt=PROMPT, **GREEDY) == {"text": [PROMPT + text]}

    paths = get(service, "/openapi.json").json()["paths"]
    documented = paths["/generate"]["post"]["responses"]

    async def lines(client: httpx.AsyncClient) -> list[Any]:
        async with client.stream(
            "POST", "/generate", json={"prompt": PROMPT, "stream": True, **GREEDY}
        ) as answer:
            assert answer.headers["content-type"].partition(";")[0] in documented["200"]["content"]
            return [json.loads(line) async for line in answer.aiter_lines()]

    found = ask(service, lines)
    assert found[-1] == {"text": [PROMPT + text]}
    texts = [line["text"][0] for line in found]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_tokens(service: Service) -> None:
    answer = post(service, "/tokenize", prompt=PROMPT, return_token_strs=True)
    check(operations.Tokenized, answer)
    assert answer["tokens"] == service.tokenizer.encode(PROMPT) and answer["max_model_len"] == 256
    assert "".join(answer["token_strs"]).replace("Ġ", " ") == PROMPT
    assert post(service, "/detokenize", tokens=answer["tokens"]) == {"prompt": PROMPT, "content": PROMPT}
    chat = post(service, "/tokenize", messages=MESSAGES)
    assert chat["tokens"] == service.tokenizer.encode(service.tokenizer.apply_chat_template(MESSAGES), False)


def test_models_and_operations(service: Service) -> None:
    models = get(service, "/v1/models").json()
    check(operations.ModelList, models)
    assert models["data"][0]["created"] == 0, "replicas must answer alike"
    assert [model["id"] for model in models["data"]] == ["demo"]
    assert get(service, "/v1/models/demo").json() == models["data"][0]
    assert get(service, "/version").json() == {"version": __version__}
    for path in ("/health", "/ping"):
        assert get(service, path).json() == {"status": "ok", "failed_steps": 0, "last_error": None}
    assert get(service, "/load").json() == {"server_load": 0}
    assert get(service, "/v1/models/other").status_code == 404


def test_the_prefix_cache_counts_hits_and_can_be_reset(service: Service) -> None:
    long = PROMPT + " a" * 40
    body = {"prompt": long, "cache_salt": "salt", **GREEDY}

    def cached() -> int:
        count = post(service, "/v1/completions", **body)["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert isinstance(count, int)
        return count

    assert [cached(), cached()] == [0, 32]
    assert ask(service, lambda client: client.post("/reset_prefix_cache")).status_code == 200
    assert cached() == 0


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "model", "served: demo"),
    (COMPLETIONS, {}, 400, "prompt", "required"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": [[1], "x", None]}, 400, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": [10**9]}, 400, "prompt_token_ids", "must be ids"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "text or token ids"),
    (COMPLETIONS, {"prompt": "x " * 400}, 400, "prompt", "maximum context length"),
    (COMPLETIONS, {"prompt": "x " * 400, "stream": True}, 400, "prompt", "maximum context length"),
    (COMPLETIONS, {"prompt": "x" * 1_000_000}, 400, "prompt", "maximum context length"),
    (COMPLETIONS, {"prompt": "\ud800"}, 400, "prompt", "surrogates"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "at least 0"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 400, "temperature", "valid number"),
    (COMPLETIONS, {"prompt": "x", "top_k": 10**20}, 400, "top_k", "2147483647"),
    (COMPLETIONS, {"prompt": "x", "best_of": 4}, 400, "best_of", "not ranked"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True, "stream": True}, 400, "stream", "no text before its end"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True, "top_p": 0.5}, 400, "top_p", "belongs to sampling"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True, "n": 3, "best_of": 2}, 400, "n", "number of beams, 2"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True, "logprobs": 1}, 400, "logprobs", "beam search"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True, "stop": "y"}, 400, "stop", "beam search"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True, "early_stopping": "soon"}, 400, "early_stopping", "never"),
    (COMPLETIONS, {"prompt": "x", "length_penalty": 2}, 400, "length_penalty", "needs use_beam_search"),
    (CHAT, {"messages": MESSAGES, "use_beam_search": True, "best_of": 500}, 400, "beam_width", "from 1 to 128"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "filled in"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 21}, 400, "logprobs", "max_logprobs"),
    (COMPLETIONS, {"prompt": "x", "n": 10**6}, 400, "n", "from 1 to 128"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
    (COMPLETIONS, {"prompt": "x", "stop": [1]}, 400, "stop.0", "string"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
    (COMPLETIONS, {"prompt": "x", "priority": 1}, 400, "priority", "scheduling_policy"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages.0.role", "required"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages.0.content", "only text"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "logprobs=true"),
    (CHAT, {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message", "add_generation"),
    (CHAT, {"messages": MESSAGES, "chat_template": "{% if %}"}, 400, "chat_template", "Jinja"),
    (CHAT, {"messages": MESSAGES, "modalities": ["audio"]}, 400, "modalities", "only text"),
    (CHAT, {"messages": MESSAGES, "functions": [{}]}, 400, "functions", "tools"),
    (COMPLETIONS, {"prompt": "x", "model": "m" * 10_000}, 404, "model", "mmm...: is not served; served: demo"),
    ("/tokenize", {"prompt": 1}, 400, "prompt", "string"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens", "from 0"),
]  # fmt: skip


def test_errors_of_bad_requests_name_the_problem(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for path, body, status, param, words in BAD:
            answer = await client.post(
                path, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert answer.status_code == status, (body, answer.text)
            check(base.ErrorAnswer, answer.json())
            error = answer.json()["error"]
            assert error["param"] == param, (body, error)
            assert words in error["message"], (body, error)
        for content in (b"", b"{", b"[1]", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b"\xff"):
            answer = await client.post(
                COMPLETIONS, content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400, (content[:20], answer.text)
            check(base.ErrorAnswer, answer.json())
        assert (await client.get("/nowhere")).json()["error"]["message"] == "GET /nowhere: Not Found"
        answer = await client.get(COMPLETIONS)
        assert answer.status_code == 405 and answer.headers["allow"] == "POST"

    ask(service, work)
    assert post(service, COMPLETIONS, prompt=PROMPT, **GREEDY)["choices"]


def test_bodies_nested_to_the_interpreters_limit(service: Service) -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    bodies = (
        ("/v1/responses", b'{"input": "x", "max_output_tokens": 1, "metadata": %b}'),
        (COMPLETIONS, b'{"max_tokens": 1, "prompt": %b}'),
        ("/v1/messages", b'{"max_tokens": 1, "messages": [{"role": "user", "content": "x", "z": %b}]}'),
    )

    async def work(client: httpx.AsyncClient) -> None:
        for path, body in bodies:
            for depth in (300, *range(900, 1000, 10), 5000):
                content = body % nested(depth)
                answer = await client.post(
                    path, content=content, headers={"content-type": "application/json"}
                )
                assert answer.status_code in (200, 400), (path, depth, answer.text)

    ask(service, work)
    assert as_api_error(RecursionError()).status == 400


def test_beam_search_returns_the_best_completions(service: Service) -> None:
    options = {"use_beam_search": True, "best_of": 4, "n": 2, "max_tokens": 10, "length_penalty": 0.5}
    params = BeamSearchParams(beam_width=4, max_tokens=10, length_penalty=0.5)

    async def run() -> Any:
        return [output async for output in service.engine.beam_search(PROMPT, "beams", params)]

    (found,) = asyncio.run(run())
    best = [sequence.text.removeprefix(PROMPT) for sequence in found.sequences][:2]
    assert len(found.sequences) == 4 and best[0] != best[1]
    answer = post(service, COMPLETIONS, prompt=PROMPT, **options)
    assert [choice["text"] for choice in answer["choices"]] == best
    assert answer["usage"]["completion_tokens"] >= 10
    assert post(service, "/generate", prompt=PROMPT, **options)["text"] == [PROMPT + text for text in best]
    choices = post(service, CHAT, messages=MESSAGES, **options)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]


def test_a_beam_search_may_find_fewer_completions_than_were_asked_for(service: Service) -> None:
    """Those that do not exist are not counted as aborted, nor as running."""
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)")
    aborted, completed = (
        service.metrics.finished["abort"],
        service.metrics.max_generation_tokens.counts.copy(),
    )
    structure = {"structured_outputs": {"regex": "[ab]"}, "use_beam_search": True}
    choices = post(service, COMPLETIONS, prompt=PROMPT, n=16, **structure)["choices"]
    assert {choice["text"] for choice in choices} == {"a", "b"} and len(choices) < 16
    assert service.metrics.finished["abort"] == aborted
    assert sum(service.metrics.max_generation_tokens.counts) == sum(completed) + 1


def test_parameters_that_request_the_default_are_accepted(service: Service) -> None:
    nothing = {"user": "me", "metadata": {"a": "b"}, "store": False, "suffix": None, "best_of": 1, "tools": None,
               "length_penalty": 1.0, "early_stopping": False,
               "response_format": {"type": "text"}, "use_beam_search": False, "logit_bias": {}}  # fmt: skip
    assert post(service, COMPLETIONS, prompt=PROMPT, **GREEDY, **nothing)["choices"]


def test_the_documentation_names_every_endpoint(service: Service) -> None:
    document = get(service, "/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/generate", "/health"} <= document["paths"].keys()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path != "/metrics":
                assert {"200", "400", "401", "413", "429", "500", "503"} <= operation["responses"].keys(), (
                    path
                )


class Marked:
    """ASGI middleware that adds a header to responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-marked", b"class")]
            await send(message)

        await self._app(scope, receive, marked)


async def marks(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """The same as a middleware function in FastAPI's form."""
    answer = await call_next(request)
    answer.headers["x-marked-too"] = "function"
    return answer


def test_middleware_template_and_role() -> None:
    config: dict[str, Any] = {
        "middleware": (f"{__name__}.Marked", f"{__name__}.marks"),
        "response_role": "helper",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    with serving(**config) as other:

        async def run() -> None:
            async with client_of(other) as client:
                for stream in (False, True):
                    body = {"messages": MESSAGES, "max_tokens": 2, "stream": stream}
                    answer = await client.post(CHAT, json=body)
                    assert answer.headers["x-marked"] == "class"
                    assert answer.headers["x-marked-too"] == "function"
                    assert '"role":"helper"' in answer.text
                tokens = await client.post("/tokenize", json={"messages": MESSAGES})
                text = other.tokenizer.decode(tokens.json()["tokens"])
                assert text == "".join(message["content"] for message in MESSAGES)

        asyncio.run(run())


def test_options_of_the_server(service: Service) -> None:
    assert ENGINE.max_model_len == service.max_model_len
    config: dict[str, Any] = {
        "max_body_size": 2048,
        "enable_request_id_headers": True,
        "allowed_origins": ("https://a.example",),
    }
    with serving(root_path="/llm", return_tokens_as_token_ids=True, **config) as other:

        async def work(client: httpx.AsyncClient) -> None:
            assert (await client.get("/v1/models")).status_code == 401
            for headers in (
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic sesame"},
                {"x-api-key": "é"},
            ):
                encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
                assert (await client.get("/v1/models", headers=encoded)).status_code == 401
            assert (await client.get("/health")).status_code == 200
            for headers in ({"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
            key = {"authorization": "Bearer sesame", "origin": "https://a.example"}
            answer = await client.get("/v1/models", headers={**key, "x-request-id": "mine"})
            assert answer.headers["x-request-id"] == "mine"
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            preflight = {"origin": "https://b.example", "access-control-request-method": "POST"}
            assert (await client.options("/v1/models", headers=preflight)).status_code == 400
            answer = await client.post(COMPLETIONS, headers=key, json={"prompt": "x" * 4000})
            assert answer.status_code == 413 and "max-body-size" in answer.json()["error"]["message"]

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(100):
                    yield b"x" * 1000

            answer = await client.post(COMPLETIONS, headers=key, content=chunks())
            assert answer.status_code == 413
            body = {"messages": MESSAGES, "chat_template": "{{ 1 }}"}
            answer = await client.post(CHAT, headers=key, json=body)
            assert answer.status_code == 400 and "--trust-request-chat-template" in answer.text
            answer = await client.post(COMPLETIONS, headers=key, json={"prompt": "x", "logprobs": 1})
            assert answer.json()["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")

        async def run() -> None:
            async with client_of(other, ("sesame", "other")) as client:
                await work(client)

        asyncio.run(run())
