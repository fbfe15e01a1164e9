"""truncate_prompt_tokens and truncation_side, on every path by which a prompt arrives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import ENGINE, post, serving
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors

from vllmlite import LLM, SamplingParams
from vllmlite.errors import ParameterError
from vllmlite.pooling_params import PoolingParams
from vllmlite.server.service import Service
from vllmlite.tokenizers.tokenizer import LONG_TEXT, Tokenizer
from vllmlite.tokenizers.truncation import Truncation


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


@pytest.fixture(scope="module")
def too_long(service: Service) -> str:
    """A text that is refused for its number of characters alone unless it is truncated."""
    words = [f"word{n} " for n in range(service.max_model_len * service.tokenizer.max_token_length // 5)]
    return "".join(words)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", range(1, 12))
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (1, 1), (0, 2)])
def test_tokens_added_by_a_tokenizer_are_kept(side: str, keep: int, before: int, after: int) -> None:
    ids = list(range(9))
    found = Truncation(keep, side).of(ids, before, after)
    assert len(found) == min(keep, len(ids)) and found == sorted(found)
    if keep > before + after:
        assert found[:before] == ids[:before] and found[len(found) - after :] == ids[9 - after :]
        text = found[before : len(found) - after]
        whole = ids[before : 9 - after]
        assert text == (whole[-len(text) :] if side == "left" else whole[: len(text)])
    else:
        assert found == (ids[-keep:] if side == "left" else ids[:keep])


def test_added_bos_and_eos_survive_truncation(tmp_path: Path) -> None:
    words = ["<s>", "</s>", *"abcdef"]
    inner = FastTokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)

    def kept(*arguments: Any) -> str:
        return " ".join(words[token] for token in tokenizer.encode("a b c d e f", *arguments))

    assert kept() == "<s> a b c d e f </s>"
    assert kept(True, Truncation(4, "left")) == "<s> e f </s>"
    assert kept(True, Truncation(4, "right")) == "<s> a b </s>"
    assert kept(True, Truncation(2, "left")) == "f </s>"
    assert kept(False, Truncation(4, "left")) == "c d e f"
    assert kept(False, Truncation(4, "right")) == "a b c d"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("truncate_prompt_tokens", value) for value in (0, -2, 1.5, True)),
        *(("truncation_side", value) for value in ("middle", 5)),
    ],
)
@pytest.mark.parametrize("kind", [SamplingParams, PoolingParams])
def test_other_values_are_refused(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=field):
        kind(**{field: value})


def test_the_engine_truncates_texts_and_ids() -> None:
    llm = LLM(dtype="float32", max_model_len=64, device="cpu", num_gpu_blocks_override=64)
    tokenizer = llm.get_tokenizer()
    text = "one two three four five six seven eight nine ten " * 20
    ids = tokenizer.encode(text)
    for side, kept in (("left", ids[-5:]), ("right", ids[:5]), (None, ids[-5:])):
        params = SamplingParams(temperature=0, max_tokens=1, truncate_prompt_tokens=5, truncation_side=side)
        prompts: list[Any] = [text, ids, {"prompt": text, "prompt_token_ids": ids}]
        for output in llm.generate(prompts, params, use_tqdm=False):
            assert output.prompt_token_ids == kept
    (output,) = llm.generate(
        text,
        SamplingParams(max_tokens=10, truncate_prompt_tokens=-1, truncation_side="right"),
        use_tqdm=False,
    )
    assert output.prompt_token_ids == ids[:54]
    with pytest.raises(ParameterError, match="max_tokens=64: leaves no room"):
        llm.generate(text, SamplingParams(max_tokens=64, truncate_prompt_tokens=-1), use_tqdm=False)
    (one,) = llm.generate(
        ids, SamplingParams(max_tokens=1, truncate_prompt_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    assert one.prompt_logprobs == [None]
    (embedded,) = llm.embed(
        text, pooling_params=PoolingParams(truncate_prompt_tokens=-1, truncation_side="right"), use_tqdm=False
    )
    assert embedded.prompt_token_ids == ids[:64]
    (answer,) = llm.chat(
        [{"role": "user", "content": text}],
        SamplingParams(max_tokens=1, truncate_prompt_tokens=3),
        use_tqdm=False,
    )
    assert tokenizer.decode(answer.prompt_token_ids, False).endswith("assistant\n")
    assert len(answer.prompt_token_ids) == 3


def test_prompts_of_too_many_characters_are_truncated(service: Service, too_long: str) -> None:
    cut = {"truncate_prompt_tokens": 7, "truncation_side": "right"}
    ids = service.tokenizer.encode(too_long, truncation=Truncation(7, "right"))
    shown = {"return_token_ids": True, "max_tokens": 1}
    assert post(service, "/tokenize", prompt=too_long, **cut)["tokens"] == ids
    done = post(service, "/v1/completions", prompt=[too_long, "x"], **cut, **shown)
    assert done["choices"][0]["prompt_token_ids"] == ids
    assert post(service, "/v1/embeddings", input=too_long, **cut)["usage"]["prompt_tokens"] == 7
    post(service, "/generate", prompt=too_long, **cut, max_tokens=1)
    messages = [{"role": "user", "content": too_long}]
    whole = service.tokenizer.encode(service.tokenizer.apply_chat_template(messages), False)
    talk = post(service, "/v1/chat/completions", messages=messages, truncate_prompt_tokens=7, **shown)
    assert talk["prompt_token_ids"] == whole[-7:]
    assert post(service, "/tokenize", messages=messages, **cut)["tokens"] == whole[:7]


def test_truncation_keeps_as_many_tokens_as_fit(service: Service, too_long: str) -> None:
    most = ENGINE.max_model_len
    assert most is not None
    assert post(service, "/tokenize", prompt=too_long, truncate_prompt_tokens=-1)["count"] == most
    done = post(service, "/v1/completions", prompt=too_long, truncate_prompt_tokens=-1, max_tokens=6)
    assert done["usage"]["prompt_tokens"] == most - 6


def test_long_prompts_are_refused_without_truncation(service: Service, too_long: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": too_long},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": too_long}]},
        "/v1/embeddings": {"input": too_long},
        "/tokenize": {"prompt": too_long},
    }
    for path, body in bodies.items():
        assert "maximum context length" in post(service, path, 400, **body)["error"]["message"]
    wrong = post(
        service, "/v1/completions", 400, prompt="x", truncate_prompt_tokens=3, truncation_side="middle"
    )
    assert wrong["error"]["param"] == "truncation_side"


def test_long_texts_get_the_ids_of_the_plain_tokenizer() -> None:
    tokenizer = Tokenizer(Path(__file__).resolve().parents[2] / "vllmlite" / "data" / "demo")
    text = "dpkg \u00e4\u6771 <|im_end|>\n  x1234 " * (LONG_TEXT // 20)
    assert len(text) > LONG_TEXT
    assert tokenizer.encode(text) == tokenizer._fast.encode(text).ids
    with pytest.raises(ParameterError, match="surrogate"):
        tokenizer.encode("\ud800" * (LONG_TEXT + 1))
