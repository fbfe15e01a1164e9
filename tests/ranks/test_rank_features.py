"""Requests of every kind get the same answers from several ranks as from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.beam_params import BeamSearchParams
from vllmlite.sampling_params import StructuredOutputsParams

pytestmark = needs_native_cpu
PROMPTS = ["The Debian project is", "A package", "The sea is the only place and the"]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
Answers = Callable[[LLM], Any]


def generated(**params: Any) -> Answers:
    def answers(llm: LLM) -> Any:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=10, **params), use_tqdm=False)
        return [
            [(each.text, each.finish_reason, each.stop_reason) for each in one.outputs] for one in outputs
        ]

    return answers


def structured(**kind: Any) -> Answers:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    return generated(temperature=1, seed=3, structured_outputs=StructuredOutputsParams(**kind))


def logprobs(llm: LLM) -> Any:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    rows = []
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        rows += [each.logprob for entry in entries if entry for _, each in sorted(entry.items())]
    return rows


def embeddings(llm: LLM) -> Any:
    outputs = llm.embed(PROMPTS, use_tqdm=False)
    return [value for each in outputs for value in each.outputs.embedding]


def beams(llm: LLM) -> Any:
    outputs = llm.beam_search(
        [{"prompt": each} for each in PROMPTS], BeamSearchParams(beam_width=3, max_tokens=6)
    )
    return [[sequence.tokens for sequence in output.sequences] for output in outputs]


KINDS: dict[str, Callable[[], Answers]] = {
    "several": lambda: generated(temperature=1, seed=4, n=3),
    "narrow": lambda: generated(temperature=1, seed=2, top_k=5, top_p=0.9, min_p=0.05),
    "bias": lambda: generated(temperature=0, logit_bias={50: 5.0, 60: -100.0}),
    "bad words": lambda: generated(temperature=0, bad_words=["the", "sea"]),
    "allowed": lambda: generated(temperature=1, seed=2, allowed_token_ids=list(range(40, 90))),
    "penalties": lambda: generated(temperature=0.5, seed=1, repetition_penalty=1.3, presence_penalty=0.5),
    "stop": lambda: generated(temperature=0, stop=["e"], min_tokens=4),
    "choice": lambda: structured(choice=["yes", "no"]),
    "regex": lambda: structured(regex="[a-z]{3} [0-9]+x"),
    "json": lambda: structured(json=SCHEMA),
    "logprobs": lambda: logprobs,
    "embeddings": lambda: embeddings,
    "beams": lambda: beams,
}


def engine(**ranks: int) -> Iterator[LLM]:
    options: dict[str, Any] = dict(ranks)
    llm = LLM(
        backend="cpu", dtype="float32", threads=1, seed=1, max_model_len=64, max_num_seqs=6,
        max_num_batched_tokens=12, block_size=8, num_gpu_blocks_override=12, enforce_eager=True, **options,
    )  # fmt: skip
    yield llm
    llm.llm_engine.close()


@pytest.fixture(scope="module")
def expected() -> Iterator[Callable[[str], Any]]:
    """The answers of one rank, which has each kind of requests once."""
    for llm in engine():
        yield cache(lambda kind: KINDS[kind]()(llm))  # noqa: B023


@pytest.fixture(
    scope="module",
    params=[
        {"tensor_parallel_size": 2},
        pytest.param({"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline"],
)
def parallel(request: pytest.FixtureRequest) -> Iterator[LLM]:
    yield from engine(**request.param)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("choice", "regex", "json"))) for kind in KINDS],
)
def test_answers_are_those_of_one_rank(kind: str, expected: Callable[[str], Any], parallel: LLM) -> None:
    """In a small cache, so that prompts are chunked and requests preempted."""
    wanted, found = expected(kind), KINDS[kind]()(parallel)
    if kind in ("logprobs", "embeddings"):
        wanted = pytest.approx(wanted, abs=1e-3)
    assert found == wanted
