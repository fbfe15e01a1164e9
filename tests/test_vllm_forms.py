"""Calls in vLLM's forms have the same effect as in vLLM, or raise an error that names the argument."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vllmlite
from vllmlite import (
    LLM,
    AsyncEngineArgs,
    AsyncLLMEngine,
    EngineArgs,
    LLMEngine,
    PoolingParams,
    SamplingParams,
    TokensPrompt,
)
from vllmlite.errors import ParameterError

Params: Any = SamplingParams
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
IDS = [70, 71, 72]
MESSAGES = [{"role": "user", "content": "Hello"}]
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "device": "cpu"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**OPTIONS)


@pytest.fixture(scope="module")
def want(llm: LLM) -> list[int]:
    return llm.generate({"prompt_token_ids": IDS}, GREEDY)[0].outputs[0].token_ids


FORMS: dict[str, Callable[[Any], Any]] = {
    "ids": lambda llm: llm.generate(IDS, GREEDY),
    "a tuple of ids": lambda llm: llm.generate(tuple(IDS), GREEDY),
    "numpy ids": lambda llm: llm.generate(np.array(IDS), GREEDY),
    "a list of numpy ids": lambda llm: llm.generate([np.int64(i) for i in IDS], GREEDY),
    "rows of numpy ids": lambda llm: llm.generate(np.array([IDS]), GREEDY),
    "a list of arrays": lambda llm: llm.generate([np.array(IDS, np.int32)], GREEDY),
    "a generator of prompts": lambda llm: llm.generate((ids for ids in [IDS]), GREEDY),
    "a tuple of prompts": lambda llm: llm.generate((IDS,), GREEDY),
    "TokensPrompt": lambda llm: llm.generate(TokensPrompt(prompt_token_ids=IDS), GREEDY),
    "numpy ids in a mapping": lambda llm: llm.generate({"prompt_token_ids": np.array(IDS)}, GREEDY),
    "null fields": lambda llm: llm.generate(
        {"prompt_token_ids": IDS, "multi_modal_data": None, "mm_processor_kwargs": {}}, GREEDY
    ),
    "parameters as a dict": lambda llm: llm.generate(
        IDS, {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "top_p": None, "best_of": None}
    ),
    "parameters of numpy": lambda llm: llm.generate(
        IDS,
        Params(
            temperature=np.float32(0), max_tokens=np.int64(4), ignore_eos=True, stop_token_ids=np.array([2])
        ),
    ),
    "a generator of parameters": lambda llm: llm.generate([IDS], (p for p in [GREEDY])),
    "all of generate's arguments": lambda llm: llm.generate(
        prompts=[IDS], sampling_params=[GREEDY], use_tqdm=False, lora_request=None, priority=None,
        tokenization_kwargs=None,
    ),
    "a list of ids of an own bar": lambda llm: llm.generate(IDS, GREEDY, use_tqdm=Bar),
}  # fmt: skip


class Bar:
    """A progress bar supplied by the caller."""

    def __init__(self, **_options: Any) -> None: ...

    def update(self, _count: int) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("form", FORMS)
def test_generate_accepts_every_form_of_prompt(llm: LLM, want: list[int], form: str) -> None:
    (output,) = FORMS[form](llm)
    assert output.outputs[0].token_ids == want


def test_tensors_are_accepted_as_prompts(llm: Any, want: list[int]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for prompt in (torch.tensor(IDS), torch.tensor([IDS]), {"prompt_token_ids": torch.tensor(IDS)}):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == want


def test_chat_takes_vllms_arguments_by_position(llm: Any) -> None:
    want = llm.chat(MESSAGES, GREEDY)[0]
    found = [
        *llm.chat(MESSAGES, GREEDY, False),
        *llm.chat(MESSAGES, GREEDY, False, None, None, "auto", True, False, None, None),
        *llm.chat(tuple(MESSAGES), GREEDY, chat_template_content_format="string"),
        *llm.chat([MESSAGES], [GREEDY], chat_template_content_format="auto", mm_processor_kwargs=None),
        *llm.chat((m for m in MESSAGES), GREEDY, use_tqdm=False),
    ]
    assert [output.outputs[0].text for output in found] == [want.outputs[0].text] * 5
    with pytest.raises(ParameterError, match="chat_template_content_format"):
        llm.chat(MESSAGES, GREEDY, chat_template_content_format="html")


ADAPTER: Any = object()
REFUSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora": ("lora_request", lambda llm: llm.generate("x", GREEDY, lora_request=ADAPTER)),
    "chat with lora": ("lora_request", lambda llm: llm.chat(MESSAGES, GREEDY, False, ADAPTER)),
    "embed with lora": ("lora_request", lambda llm: llm.embed("x", lora_request=ADAPTER)),
    "an image": (
        "multi_modal_data",
        lambda llm: llm.generate({"prompt": "x", "multi_modal_data": {"image": 1}}),
    ),
    "embeddings": ("prompt_embeds", lambda llm: llm.generate({"prompt_embeds": [[0.5]]})),
    "embeddings of numpy": (
        "prompt_embeds",
        lambda llm: llm.generate({"prompt_embeds": np.zeros((2, 3)), "prompt": "x"}),
    ),
    "an id that is too large": ("prompt_token_ids", lambda llm: llm.generate([10**30], GREEDY)),
    "an id below 0": ("prompt_token_ids", lambda llm: llm.generate([1, -1], GREEDY)),
    "a number for priorities": ("priority", lambda llm: llm.generate("x", GREEDY, priority=5)),
    "names of parameters that are none": ("sampling_params", lambda llm: llm.generate("x", {1: 2})),
    "template variables that are arguments": (
        "chat_template_kwargs",
        lambda llm: llm.chat(MESSAGES, GREEDY, chat_template_kwargs={"messages": []}),
    ),
    "a list of template variables": (
        "chat_template_kwargs",
        lambda llm: llm.chat(MESSAGES, GREEDY, chat_template_kwargs=[1]),
    ),
    "a text as tools": ("tools", lambda llm: llm.chat(MESSAGES, GREEDY, tools="search")),
    "a template that fills the memory": (
        "messages",
        lambda llm: llm.chat(MESSAGES, GREEDY, chat_template="{{ messages[0].role * 10 ** 14 }}"),
    ),
    "an unknown argument": ("nonsense", lambda llm: llm.generate("x", GREEDY, nonsense=1)),
    "an unknown parameter": ("best_of", lambda llm: llm.generate("x", {"best_of": 3})),
    "no prompt": ("prompts", lambda llm: llm.generate(None)),
    "a number": ("prompts", lambda llm: llm.generate(7)),
    "bytes": ("prompts", lambda llm: llm.generate(b"x")),
    "floats": ("prompt_token_ids", lambda llm: llm.generate([[0.5]])),
    "truth values": ("prompt_token_ids", lambda llm: llm.generate([[True]])),
    "None among prompts": ("prompt", lambda llm: llm.generate([None])),
    "a number for parameters": ("sampling_params", lambda llm: llm.generate("x", 0.5)),
    "pooling parameters": ("sampling_params", lambda llm: llm.generate("x", PoolingParams())),
    "texts for parameters": ("sampling_params", lambda llm: llm.generate(["x"], ["y"])),
    "too few parameters": ("sampling_params", lambda llm: llm.generate(["x", "y"], [GREEDY])),
    "sampling to embed": ("pooling_params", lambda llm: llm.embed("x", pooling_params=GREEDY)),
    "a text as messages": ("messages", lambda llm: llm.chat("hello")),
    "one message": ("messages", lambda llm: llm.chat(MESSAGES[0])),
    "no messages": ("messages", lambda llm: llm.chat([])),
    "None as messages": ("messages", lambda llm: llm.chat(None)),
    "a float of tokens": ("max_tokens", lambda _: Params(max_tokens=1.5)),
    "stop of numbers": ("stop", lambda _: Params(stop=7)),
    "an id for ids": ("stop_token_ids", lambda _: Params(stop_token_ids=7)),
    "text for ids": ("allowed_token_ids", lambda _: Params(allowed_token_ids="7")),
    "too many stops": ("stop", lambda _: Params(stop=[f"s{i}" for i in range(1025)])),
    "a stop that is too long": ("stop", lambda _: Params(stop="s" * 40_000)),
    "words that are too long": ("bad_words", lambda _: Params(bad_words=["w" * 20_000] * 2)),
    "a number for words": ("bad_words", lambda _: Params(bad_words=7)),
    "a list of biases": ("logit_bias", lambda _: Params(logit_bias=[1])),
    "a number of biases": ("logit_bias", lambda _: Params(logit_bias=1)),
    "a tensor of NaN": ("temperature", lambda _: Params(temperature=np.float32("nan"))),
}


@pytest.mark.parametrize("form", REFUSED)
def test_unsupported_arguments_are_refused_by_name(llm: LLM, want: list[int], form: str) -> None:
    field, call = REFUSED[form]
    with pytest.raises(ParameterError) as error:
        call(llm)
    assert error.value.field == field
    assert llm.generate(IDS, GREEDY)[0].outputs[0].token_ids == want


def test_reset(llm: LLM) -> None:
    assert llm.reset_prefix_cache() is True
    assert llm.reset_prefix_cache(reset_running_requests=False) is True


def test_add_request_takes_vllms_arguments_by_position(want: list[int]) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(**OPTIONS), usage_context=None)
    engine.add_request(
        "x", TokensPrompt(prompt_token_ids=IDS), GREEDY, None, None, None, {"traceparent": "0"}, 0, "FGH"
    )
    with pytest.raises(ParameterError, match="lora_request"):
        engine.add_request("y", "x", GREEDY, None, ADAPTER)
    assert engine.get_num_unfinished_requests() == 1
    outputs = [output for _ in range(8) for output in engine.step()]
    assert (outputs[-1].prompt, outputs[-1].outputs[0].token_ids) == ("FGH", want)
    assert engine.get_num_unfinished_requests() == 0


def test_the_async_engine_has_its_older_names(want: list[int]) -> None:
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**OPTIONS), usage_context=None)

    async def run() -> list[int]:
        ids: list[int] = []
        prompt: Any = np.array(IDS)
        async for output in engine.generate(prompt, GREEDY, "x", lora_request=None, trace_headers=None):
            ids = output.outputs[0].token_ids
        with pytest.raises(ParameterError, match="lora_request"):
            async for _ in engine.generate("x", GREEDY, "y", lora_request=ADAPTER):
                pass
        assert await engine.reset_prefix_cache() is True
        await engine.abort(["x", "y"])
        return ids

    try:
        assert asyncio.run(run()) == want
    finally:
        engine.shutdown()


def test_every_public_name_exists() -> None:
    for name in vllmlite.__all__:
        assert getattr(vllmlite, name) is not None
