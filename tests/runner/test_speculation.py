"""Speculative decoding on real models: whatever is asked for and however it is scheduled, the text is the same, bit for
bit, as without drafts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams, StructuredOutputsParams
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.select import BackendRequest, select_backend
from vllmlite.engine.drafts import DraftPolicy, StepCost
from vllmlite.errors import BackendError
from vllmlite.outputs import RequestOutput
from vllmlite.runner.propose.ngram import Lookup, NgramProposer
from vllmlite.runner.runner import ModelRunner

DRAFTS = 4
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
CODE = "def add(a, b):\n    return a + b\n\n" * 4 + "def sub(a, b):\n    return"
TEXTS = [CODE, "The Debian Project is", "one two three one two three one two", CODE[:90]]

ENGINES: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 24},
    "preempted": {"num_gpu_blocks_override": 17, "max_model_len": 128},
    "two steps": {"async_scheduling": True},
    "uncached": {"enable_prefix_caching": False},
}
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.95, "top_k": 40},
    "penalties": {
        "temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2
    },
    "logprobs": {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    "n": {"temperature": 1.0, "seed": 11, "n": 3},
    "min_tokens": {"temperature": 1.5, "seed": 5, "min_tokens": 20, "ignore_eos": False},
    "bans": {"temperature": 0, "bad_words": ["return a", " Debian"], "logit_bias": {10: 2.0}},
    "stop": {"temperature": 0, "stop": ["b\n", "three"], "logprobs": 0},
    "thinking": {"temperature": 0, "thinking_token_budget": 5},
    "regex": {
        "temperature": 0, "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(regex="( [a-z]{1,5}){4,20}\\."),
    },
}  # fmt: skip


class Knowing:
    """A proposer that knows the text, of which it gets each id wrong with some probability."""

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._texts = texts
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self._slots: dict[int, list[int]] = {}

    def admit(self, slot: int, token_ids: list[int]) -> None:
        self._slots[slot] = list(token_ids)

    def launch(self, slots: Sequence[int]) -> list[list[int]]:
        return [self._slots[slot] for slot in slots]

    def collect(
        self, handle: list[list[int]], token_ids: Sequence[list[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        drafts = []
        for known, ids, count in zip(handle, token_ids, wanted, strict=True):
            known += ids
            text = next((text for text in self._texts if text[: len(known)] == known), [])
            right = text[len(known) : len(known) + self._draw.randint(0, count)]
            drafts.append(
                [i if self._draw.random() < 0.8 else self._draw.randrange(self._vocab_size) for i in right]
            )
        return drafts


def make(speculates: bool, **options: Any) -> LLM:
    llm = LLM(
        seed=1,
        speculative_config=NGRAM if speculates else None,
        **{"device": "cpu", "max_model_len": 512, "block_size": 8, "dtype": "float32", **options},
    )
    if speculates:
        scheduler = llm.llm_engine.engine.scheduler
        free = StepCost([(1, 1.0), (2, 1.0)])  # the machine's times decide nothing
        scheduler.drafting = DraftPolicy(DRAFTS, overlapped=scheduler.drafting.overlapped, cost=free)
    return llm


@cache
def built_in(speculates: bool, engine: str) -> LLM:
    marks = {"reasoning_start_str": " a", "reasoning_end_str": " b"}
    return make(speculates, reasoning_config=marks, **ENGINES[engine])


def seen(outputs: Sequence[RequestOutput]) -> list[Any]:
    return [
        [
            output.prompt_logprobs,
            *(
                (
                    c.token_ids,
                    c.text,
                    c.finish_reason,
                    c.stop_reason,
                    c.logprobs,
                    c.cumulative_logprob,
                    c.text_offsets,
                )
                for c in output.outputs
            ),
        ]
        for output in outputs
    ]


def num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


def check_same(plain: LLM, speculating: LLM, prompts: Sequence[Any], params: SamplingParams) -> None:
    """Compare without drafts, with n-grams, and with drafts that are mostly right."""
    want = plain.generate(prompts, params, use_tqdm=False)
    engine = speculating.llm_engine.engine
    runner = cast(ModelRunner, engine.runner)
    before = engine.current_stats().num_draft_tokens
    ngram = runner.proposer
    texts = [o.prompt_token_ids + list(c.token_ids) for o in want for c in o.outputs]
    try:
        for proposer in (ngram, Knowing(texts, runner.model.vocab_size)):
            runner.proposer = proposer
            got = speculating.generate(prompts, params, use_tqdm=False)
            assert seen(got) == seen(want)
            engine.scheduler.check_integrity()
            assert engine.scheduler.pool.num_used == 0
    finally:
        runner.proposer = ngram
    assert engine.current_stats().num_draft_tokens > before


@needs_native_cpu
@pytest.mark.parametrize(
    ("engine", "wish"),
    [
        pytest.param(engine, wish, marks=[] if engine == "batched" else [pytest.mark.slow])
        for engine in ENGINES
        for wish in WISHES
    ],
)
def test_the_text_is_the_same_with_and_without_drafts(engine: str, wish: str) -> None:
    if wish == "regex" and find_spec("xgrammar") is None:
        pytest.skip("needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)")
    params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **WISHES[wish]})
    plain, speculating = built_in(False, engine), built_in(True, engine)
    check_same(plain, speculating, TEXTS, params)
    assert (speculating.llm_engine.stats().num_preemptions > 0) == (engine == "preempted")


@pytest.mark.parametrize(
    "options", [{"dtype": "float32"}, {"dtype": "bfloat16", "batch_invariant": True}], ids=str
)
@pytest.mark.parametrize("two_steps", [False, True])
def test_cuda_says_the_same(options: dict[str, Any], two_steps: bool) -> None:
    """With captured steps of several tokens a row, and a step in flight."""
    try:
        CudaBackend()
    except BackendError as error:
        pytest.skip(str(error))
    options = {
        "device": "cuda",
        "backend": "cuda",
        "block_size": 16,
        "async_scheduling": two_steps,
        "kv_cache_memory_bytes": 1 << 30,
        **options,
    }
    plain, speculating = make(False, **options), make(True, **options)
    for wish in ("greedy", "seeded", "penalties", "logprobs", "n", "min_tokens", "bans", "stop"):
        params = SamplingParams(**{"max_tokens": 64, "ignore_eos": True, **WISHES[wish]})
        check_same(plain, speculating, TEXTS, params)
        check_same(plain, speculating, TEXTS[:1], params)
    graphs = cast(ModelRunner, speculating.llm_engine.engine.runner).graphs
    assert any(key.query_len > 1 for key in graphs)


@needs_native_cpu
def test_the_smallest_engine_starts_and_makes_drafts() -> None:
    llm = make(True, max_num_seqs=1, max_model_len=6, num_gpu_blocks_override=1)
    (output,) = llm.generate([{"prompt_token_ids": [5]}], SamplingParams(temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5


@needs_native_cpu
def test_drafts_save_steps() -> None:
    plain, speculating = built_in(False, "batched"), built_in(True, "batched")
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    steps = []
    for llm in (plain, speculating):
        before = llm.llm_engine.stats().num_steps
        llm.generate([CODE], params, use_tqdm=False)
        steps.append(llm.llm_engine.stats().num_steps - before)
    assert steps[0] == 64
    assert steps[1] < 40


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 24}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(
            family, dtype, marks=[] if (family, dtype) == ("gemma2", "bfloat16") else [pytest.mark.slow]
        )
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
    ],
)
def test_random_models_say_the_same(family: str, dtype: str, backend: str, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"backend": backend, "device": backend}
    if backend == "cuda":
        chosen |= {"batch_invariant": True, "block_size": 16}
    try:
        select_backend(BackendRequest(backend=backend))
    except BackendError as error:
        pytest.skip(str(error))
    name, changes = FAMILIES[family]
    write_checkpoint(tmp_path, name, **changes | {"eos_token_id": None})
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": np.tile(rng.integers(3, 307, 9), 4)[: 7 * n].tolist()} for n in (1, 3, 5)]
    options = {"model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 128, "dtype": dtype}
    options |= {"num_gpu_blocks_override": 16, "max_num_batched_tokens": 16, **chosen}
    plain, speculating = (make(on, **options) for on in (False, True))
    for wish in ("greedy", "seeded", "penalties", "logprobs", "n"):
        params = SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False, **WISHES[wish])
        check_same(plain, speculating, prompts, params)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_ngram_that_occurred_before_is_found_at_its_first_place(seed: int) -> None:
    """Against a search of all places, as ids come one by one and several at a time."""
    draw = random.Random(seed)
    shortest = draw.randint(1, 3)
    longest = shortest + draw.randint(0, 3)
    lookup = Lookup([draw.randrange(4) for _ in range(draw.randint(1, 30))], shortest, longest)
    for _ in range(60):
        count = draw.randint(1, 6)
        ids = lookup.token_ids
        want: list[int] = []
        for length in range(longest, shortest - 1, -1):
            places = [
                at for at in range(length, len(ids)) if ids[at - length : at] == ids[len(ids) - length :]
            ]
            if places and length <= len(ids):
                want = ids[places[0] : places[0] + count]
                break
        assert lookup.propose(count) == want
        lookup.token_ids += [draw.randrange(4) for _ in range(draw.randint(1, 5))]


def test_a_step_that_was_launched_before_a_slot_changed_hands_keeps_its_sequence() -> None:
    proposer = NgramProposer(1, 1, 1)
    proposer.admit(0, [1, 2, 1])
    step = proposer.launch([0])
    proposer.admit(0, [5, 6, 5])
    assert proposer.collect(step, [[2]], [2]) == [[1, 2]]
    assert proposer.collect(proposer.launch([0]), [[6]], [1]) == [[5]]


def test_a_sequence_that_wants_no_drafts_is_not_indexed() -> None:
    proposer = NgramProposer(1, 1, 1)
    proposer.admit(0, [1] * 1000)
    (lookup,) = proposer.launch([0])
    assert proposer.collect([lookup], [[1]], [0]) == [[]]
    assert not lookup._num_indexed
