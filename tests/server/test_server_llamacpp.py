"""Requests of llama.cpp's clients, such as editors, and what they read of the responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import Script, ask, check, post, serving, stream

from vllmlite.errors import VllmliteError
from vllmlite.outputs import RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.server.llamacpp import line_limits
from vllmlite.server.llamacpp import protocol as llamacpp
from vllmlite.server.llamacpp.line_limits import LineLimits
from vllmlite.server.service import Service

PROMPT = "The Debian Project is"
MESSAGES = [{"role": "user", "content": "What is dpkg?"}]
GREEDY = {"prompt": PROMPT, "temperature": 0, "n_predict": 6, "ignore_eos": True}
FILL_IN = {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3, "<file_sep>": 4}
TIMINGS = [
    f"timings/{name}"
    for of in ("prompt", "predicted")
    for name in (f"{of}_n", f"{of}_ms", f"{of}_per_token_ms", f"{of}_per_second")
]
EDITOR: dict[str, Any] = {
    "id_slot": 0, "input_prefix": "def f(x):\n", "input_suffix": "\n", "prompt": "    if",
    "input_extra": [{"text": "y = 1\n", "time": 12.5, "filename": "b.py"}], "n_predict": 64, "n_indent": 4, "top_k": 40,
    "top_p": 0.9, "stream": False, "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "stop": [],
    "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "lora": [],
    "response_fields": ["content", *TIMINGS, "truncated", "tokens_cached"],
}  # fmt: skip
"""A request of llama.vim's and llama.vscode's."""


class Failing(Script):
    """An engine whose request fails after its text."""

    async def take(self) -> list[RequestOutput]:
        if len(self._outputs) == 0:
            raise VllmliteError("it broke")
        output = self._outputs.pop(0)
        output.outputs[0].finish_reason = None
        return [output]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def params_of(script: Script) -> SamplingParams:
    assert script.request is not None and isinstance(script.request.params, SamplingParams)
    return script.request.params


def test_infill_completes_the_middle_of_a_text(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.tokenizer, "token_id", FILL_IN.get)
    script = Script(" x:\n        re", "turn y\n", "  else", ":\n    return", " 5")
    monkeypatch.setattr(service.engine, "submit", script)
    answer = post(service, "/infill", **EDITOR)
    assert answer.keys() == {*EDITOR["response_fields"]}
    assert answer["content"] == " x:\n        return y\n  " and answer["truncated"] is False
    params = params_of(script)
    assert (params.top_k, params.top_p, params.temperature, params.min_p) == (40, 0.9, 1.0, 0.0)
    whole = post(service, "/infill", **{**EDITOR, "response_fields": None})
    assert (whole["stop_type"], whole["has_new_line"]) == ("limit", True)
    assert whole["generation_settings"]["samplers"] == ["top_k", "top_p"]
    pieces = [data for _, data in stream(service, "/infill", **{**EDITOR, "response_fields": None})]
    assert "".join(piece["content"] for piece in pieces) == answer["content"]
    assert pieces[-1]["content"] == "" and pieces[-1]["stop"] and not any(p["stop"] for p in pieces[:-1])
    assert service.admission.num_unfinished == 0
    warming = {"n_predict": 0, "samplers": [], "t_max_predict_ms": 1, "response_fields": [""]}
    assert post(service, "/infill", **{**EDITOR, **warming}) == {}
    assert params_of(script).max_tokens == 1
    assert post(service, "/infill", **{**EDITOR, **warming, "response_fields": []})["content"] == ""


def test_line_limits_end_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(line_limits, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def kept(limits: LineLimits, text: str) -> str:
        """The text that is kept, which must be the same for one piece as for pieces of one character."""
        found = ""
        for piece in text:
            more, ended = limits.add(piece)
            found += more
            if ended:
                break
        return found

    for text, expected in (
        ("a\n    b\n      c\n  d", "a\n    b\n      c\n  "), ("a\n\n    b", "a\n"),
        ("a\n\t\t\t\tb\nc", "a\n\t\t\t\tb\n"), ("  a", "  a"), ("a\n    ", "a\n    "),
    ):  # fmt: skip
        whole = LineLimits(4, 0)
        assert whole.add(text)[0] == kept(LineLimits(4, 0), text) == expected
        assert whole.has_line == ("\n" in text)
    assert LineLimits(0, 0).add("a\nb\n") == ("a\nb\n", False)
    timed = LineLimits(0, 1.5)
    assert timed.add("a") == ("a", False)
    now[0] += 2
    assert timed.add("b") == ("b", False)  # not within a first line
    assert timed.add("\n") == ("\n", True)


def test_samplers_that_are_not_listed_are_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script("x")
    monkeypatch.setattr(service.engine, "submit", script)
    given = {"temperature": 0.5, "min_p": 0.1, "top_k": 7, "top_p": 0.5, "repeat_penalty": 1.5, "prompt": "x"}
    post(service, "/completion", **given)
    params = params_of(script)
    assert (params.temperature, params.min_p, params.top_k, params.repetition_penalty) == (0.5, 0.1, 7, 1.5)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    post(service, "/completion", **given, samplers=["min_p", "temperature", "dry"])
    params = params_of(script)
    assert (params.temperature, params.min_p, params.top_k, params.top_p) == (0.5, 0.1, 0, 1.0)
    assert params.repetition_penalty == 1.0
    chat = {"messages": MESSAGES, "min_p": 0.1, "top_k": 7, "id_slot": 0, "cache_prompt": True}
    post(service, "/chat/completions", **chat, samplers=["min_p"])
    assert (params_of(script).min_p, params_of(script).top_k, params_of(script).temperature) == (0.1, 0, 1.0)
    for path, body in (("/completion", given), ("/v1/chat/completions", chat)):
        assert post(service, path, 400, **body, samplers=["nothing"])["error"]["param"] == "samplers"
        assert post(service, path, 400, **body, mirostat=2)["error"]["param"] == "mirostat"


def test_pieces_and_probabilities_carry_ids(service: Service) -> None:
    whole = post(service, "/completion", **GREEDY, return_tokens=True, n_probs=2)
    pieces = [data for _, data in stream(service, "/completion", **GREEDY, n_probs=2)]
    for piece in (whole, *pieces):
        check(llamacpp.LlamaAnswer, piece)
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert (pieces[-1]["content"], pieces[-1]["tokens"]) == ("", [])
    counts = [len(piece["tokens"]) for piece in pieces[:-1]]
    assert [piece["tokens_predicted"] for piece in pieces[:-1]] == list(accumulate(counts))
    assert sum(counts) == 6
    told = [entry for piece in pieces[:-1] for entry in piece["completion_probabilities"]]
    assert told == whole["completion_probabilities"] and "completion_probabilities" not in pieces[-1]
    for entry in told:
        assert entry["id"] == entry["top_logprobs"][0]["id"] != entry["top_logprobs"][1]["id"]
    assert post(service, "/completion", **GREEDY)["tokens"] == []
    assert post(service, "/completion", **{**GREEDY, "n_predict": 0})["content"] == ""
    limited = post(service, "/completion", **GREEDY, return_tokens=True, t_max_predict_ms=60000, n_probs=2)
    for name in ("content", "tokens", "completion_probabilities", "stop_type", "tokens_predicted"):
        assert limited[name] == whole[name]
    chosen = ["content", "timings/predicted_n", "timings/none", "none", "content/x"]
    last = [data for _, data in stream(service, "/completion", **GREEDY, response_fields=chosen)][-1]
    assert last == {"content": "", "timings/predicted_n": 6}


def test_texts_that_cannot_fit_are_not_tokenised(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.tokenizer, "token_id", FILL_IN.get)
    long = "a" * (service.max_model_len * service.tokenizer.max_token_length)

    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("a text is tokenised")

    monkeypatch.setattr(service.tokenizer, "encode", encode)
    for body in (
        {"input_prefix": long, "input_suffix": "b"},
        {"input_prefix": "", "input_suffix": "", "input_extra": [{"filename": "x", "text": long}]},
    ):
        assert post(service, "/infill", 400, **body)["error"]["type"] == "exceed_context_size_error"


def test_huge_numbers_are_refused(service: Service) -> None:
    for field, value in (("logit_bias", [[1, 10**400]]), ("t_max_predict_ms", 10**400)):
        assert post(service, "/completion", 400, prompt="x", **{field: value})["error"]["param"] == field


def test_biases_that_would_take_long_are_refused(service: Service) -> None:
    for bias in ([["x", 1]] * 301, {"x" * 5000: 1}):
        error = post(service, "/completion", 400, prompt="x", logit_bias=bias)["error"]
        assert error["param"] == "logit_bias" and "at most" in error["message"]


def test_a_failed_stream_ends_in_the_form_of_its_api(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for path in ("/completion", "/generate"):
            monkeypatch.setattr(service.engine, "submit", Failing("Yes"))
            text = (await client.post(path, json={"prompt": "x", "stream": True})).text
            last = text.splitlines() if path == "/generate" else text.removesuffix("\n\n").split("\n\n")
            told = json.loads(last[-1].removeprefix("data: " if path == "/completion" else ""))
            assert told["error"]["message"] == "it broke"

    ask(service, work)
    assert service.admission.num_unfinished == 0


def test_tokens_templates_vectors_and_names(service: Service) -> None:
    ids = service.tokenizer.encode(PROMPT, False)
    assert post(service, "/tokenize", content=PROMPT) == {"tokens": ids}
    pieces = post(service, "/tokenize", content=PROMPT, with_pieces=True, parse_special=True)["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert "".join(piece["piece"] for piece in pieces) == PROMPT
    assert post(service, "/tokenize", 400, content=5)["error"]["param"] == "content"
    assert post(service, "/detokenize", tokens=ids)["content"] == PROMPT
    expected = service.tokenizer.apply_chat_template(MESSAGES)
    assert post(service, "/apply-template", messages=MESSAGES) == {"prompt": expected}
    vectors = post(service, "/embedding", content=[PROMPT, "x"])
    check(list[llamacpp.LlamaEmbedding], vectors)
    plain = post(service, "/v1/embeddings", input=[PROMPT, "x"])["data"]
    assert [entry["embedding"][0] for entry in vectors] == [entry["embedding"] for entry in plain]

    async def work(client: httpx.AsyncClient) -> None:
        for path, other in (("/models", "/v1/models"), ("/v1/health", "/health")):
            assert (await client.get(path)).json() == (await client.get(other)).json()

    ask(service, work)


def test_several_prompts_are_answered_with_a_list(service: Service) -> None:
    ids = service.tokenizer.encode(PROMPT)
    one = post(service, "/completion", **GREEDY)
    other = post(service, "/completion", **{**GREEDY, "prompt": "A package"})
    for form in (PROMPT, ids, [PROMPT], [ids], {"prompt_string": PROMPT}, [{"prompt_string": PROMPT}]):
        answer = post(service, "/completion", **{**GREEDY, "prompt": form})
        check(llamacpp.LlamaAnswer, answer)
        assert answer["content"] == one["content"], form
    head, tail = service.tokenizer.decode(ids[:2], skip_special_tokens=False), ids[2:]
    mixed = [head, *tail]
    assert post(service, "/completion", **{**GREEDY, "prompt": mixed})["content"] == one["content"]
    several = [PROMPT, ids, mixed, {"prompt_string": "A package"}]
    answers = post(service, "/completion", **{**GREEDY, "prompt": several})
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert [answer["content"] for answer in answers] == [*[one["content"]] * 3, other["content"]]
    for answer in answers:
        check(llamacpp.LlamaAnswer, answer)
        assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == 6
        assert answer["tokens_evaluated"] in (one["tokens_evaluated"], other["tokens_evaluated"])
    pieces = [data for _, data in stream(service, "/completion", **{**GREEDY, "prompt": several})]
    for index, answer in enumerate(answers):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["content"] for piece in mine) == answer["content"]
        assert [piece["stop"] for piece in mine] == [False] * (len(mine) - 1) + [True]
    vectors = post(service, "/embedding", content=[PROMPT, mixed])
    assert vectors[0]["embedding"][0] == pytest.approx(vectors[1]["embedding"][0], abs=1e-5)
    malformed: list[Any] = [[], [[]], [None], {}, {"prompt_string": 5}, [True], [["a", "b"]], [PROMPT, 1.5]]
    for wrong in malformed:
        assert post(service, "/completion", 400, prompt=wrong)["error"]["param"].startswith("prompt"), wrong
    image = {"prompt_string": "x", "multimodal_data": ["aGk="]}
    assert "only text" in post(service, "/completion", 400, prompt=image)["error"]["message"]
    assert service.admission.num_unfinished == 0


def test_speeds_count_the_time_between_tokens(service: Service) -> None:
    timings = post(service, "/completion", **GREEDY)["timings"]
    assert timings["predicted_n"] == 6
    assert timings["predicted_per_token_ms"] == pytest.approx(timings["predicted_ms"] / 5)
    assert timings["predicted_per_second"] == pytest.approx(5000 / timings["predicted_ms"])
    single = post(service, "/completion", **{**GREEDY, "n_predict": 1})["timings"]
    assert (single["predicted_n"], single["predicted_per_second"], single["predicted_per_token_ms"]) == (
        1,
        0,
        0,
    )
    none = post(service, "/completion", **{**GREEDY, "n_predict": 0})
    assert none["tokens_predicted"] == none["timings"]["predicted_n"] == 0
