"""Speculative decoding on real models: whatever is asked for and however it is scheduled, the text is the same, bit for
bit, as without drafts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pytest
from checkpoints import write_checkpoint
from drafting import KnownText, let_drafts_pay
from eagle_heads import Shape
from medusa_heads import write_medusa
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams, StructuredOutputsParams
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.select import BackendRequest, select_backend
from vllmlite.engine.drafts import Acceptance, DraftPolicy
from vllmlite.engine.schedule import Schedule
from vllmlite.errors import BackendError, ParameterError
from vllmlite.hub import BUILT_IN
from vllmlite.outputs import RequestOutput
from vllmlite.runner.propose.draft_model import ModelProposer
from vllmlite.runner.runner import Launched, ModelRunner

DRAFTS = 4
HEADS = TemporaryDirectory()
write_medusa(Path(HEADS.name) / "medusa", Shape(6144, 256, 8), "vllm")
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3},
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 100},
    "draft model": {"method": "draft_model", "model": str(BUILT_IN), "quantization": "int4"},
    "itself": {"method": "draft_model", "model": str(BUILT_IN)},
    "eagle3": {"method": "eagle3"},
    "medusa": {"method": "medusa", "model": str(Path(HEADS.name) / "medusa")},
}
"""Sources of drafts for the built-in model: those of the model itself are always right, those of random
heads never."""
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


class Knowing(KnownText):
    """A proposer that knows the text, of which it gets each id wrong with some probability."""

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int) -> None:
        super().__init__()
        self._texts = texts
        self._vocab_size = vocab_size
        self._draw = random.Random(0)

    def drafts(self, known: Sequence[int], count: int) -> list[int]:
        text = next((text for text in self._texts if text[: len(known)] == known), [])
        right = text[len(known) : len(known) + self._draw.randint(0, count)]
        return [i if self._draw.random() < 0.8 else self._draw.randrange(self._vocab_size) for i in right]


class Pausing(DraftPolicy):
    """A policy that asks for a number of drafts that ``draw`` returns."""

    def __init__(self, most: int, *, fills_cache: bool, overlapped: bool, draw: Callable[[], int]) -> None:
        super().__init__(most, overlapped=overlapped, fills_cache=fills_cache)
        self.draw = draw

    def wanted(self, acceptance: Acceptance, rows: int) -> int:
        return self.draw()


def make(drafts: dict[str, Any] | None, **options: Any) -> LLM:
    llm = LLM(
        seed=1,
        speculative_config=drafts and {**drafts, "num_speculative_tokens": DRAFTS},
        **{"device": "cpu", "max_model_len": 512, "block_size": 8, "dtype": "float32", **options},
    )
    if drafts is not None:
        let_drafts_pay(llm)
    return llm


@cache
def built_in(method: str | None, engine: str) -> LLM:
    marks = {"reasoning_start_str": " a", "reasoning_end_str": " b"}
    return make(METHODS[method] if method else None, reasoning_config=marks, **ENGINES[engine])


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
    """Compare without drafts, with those of the engine's proposer, and with drafts that are mostly right."""
    want = plain.generate(prompts, params, use_tqdm=False)
    engine = speculating.llm_engine.engine
    runner = cast(ModelRunner, engine.runner)
    before = engine.current_stats().num_draft_tokens
    proposed = runner.proposer
    texts = [o.prompt_token_ids + list(c.token_ids) for o in want for c in o.outputs]
    try:
        for proposer in (proposed, Knowing(texts, runner.model.vocab_size)):
            runner.proposer = proposer
            got = speculating.generate(prompts, params, use_tqdm=False)
            assert seen(got) == seen(want)
            engine.scheduler.check_integrity()
            assert engine.scheduler.pool.num_used == 0
    finally:
        runner.proposer = proposed
    assert engine.current_stats().num_draft_tokens > before


FAST = {
    *(("ngram", "batched", wish) for wish in WISHES),
    ("suffix", "batched", "penalties"),
    ("draft model", "batched", "penalties"),
    ("eagle3", "batched", "seeded"),
}
"""The part of the matrix that is not slow."""


def is_tested(method: str, engine: str, wish: str) -> bool:
    """Whether a combination is tested: all of n-grams and draft models; of each other method a fifth, in which every
    engine and every wish occur."""
    if method in ("ngram", "draft model") or (method, engine, wish) in FAST:
        return True
    place = [*METHODS].index(method) + [*ENGINES].index(engine) + [*WISHES].index(wish)
    return place % len(ENGINES) == 0


@needs_native_cpu
@pytest.mark.parametrize(
    ("method", "engine", "wish"),
    [
        pytest.param(*combination, marks=[] if combination in FAST else [pytest.mark.slow])
        for combination in product(METHODS, ENGINES, WISHES)
        if is_tested(*combination)
    ],
)
def test_the_text_is_the_same_with_and_without_drafts(method: str, engine: str, wish: str) -> None:
    if wish == "regex" and find_spec("xgrammar") is None:
        pytest.skip("needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)")
    params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **WISHES[wish]})
    plain, speculating = built_in(None, engine), built_in(method, engine)
    check_same(plain, speculating, TEXTS, params)
    assert (speculating.llm_engine.stats().num_preemptions > 0) == (engine == "preempted")


@needs_native_cpu
@pytest.mark.parametrize("method", [pytest.param("draft model", marks=pytest.mark.slow), "eagle3"])
def test_greedy_text_is_the_same_with_drafts_that_are_drawn(method: str) -> None:
    """Rejection sampling accepts a draft of a greedy request if and only if it is the most likely id."""
    llm = make(METHODS[method] | {"draft_sample_method": "probabilistic"})
    for wish in ("logprobs", "stop", "bans"):
        params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **WISHES[wish]})
        check_same(built_in(None, "batched"), llm, TEXTS, params)


@pytest.mark.parametrize(
    "options", [{"dtype": "float32"}, {"dtype": "bfloat16", "batch_invariant": True}], ids=str
)
@pytest.mark.parametrize("two_steps", [False, True])
@pytest.mark.parametrize("method", ["ngram", "suffix", "draft model"])
def test_cuda_says_the_same(options: dict[str, Any], two_steps: bool, method: str) -> None:
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
    plain, speculating = make(None, **options), make(METHODS[method], **options)
    for wish in ("greedy", "seeded", "penalties", "logprobs", "n", "min_tokens", "bans", "stop"):
        params = SamplingParams(**{"max_tokens": 64, "ignore_eos": True, **WISHES[wish]})
        check_same(plain, speculating, TEXTS, params)
        check_same(plain, speculating, TEXTS[:1], params)
    graphs = cast(ModelRunner, speculating.llm_engine.engine.runner).graphs
    assert any(key.query_len > 1 for key in graphs)


@needs_native_cpu
@pytest.mark.parametrize(
    "drafts",
    [METHODS["ngram"], METHODS["eagle3"], METHODS["itself"] | {"max_model_len": 4}],
    ids=["ngram", "eagle3", "itself"],
)
def test_the_smallest_engine_starts_and_makes_drafts(drafts: dict[str, Any]) -> None:
    """Also with a draft model for shorter sequences than the engine's."""
    llm = make(drafts, max_num_seqs=1, max_model_len=6, num_gpu_blocks_override=1)
    (output,) = llm.generate([{"prompt_token_ids": [5]}], SamplingParams(temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5


@needs_native_cpu
def test_drafts_save_steps() -> None:
    plain, speculating = built_in(None, "batched"), built_in("ngram", "batched")
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    steps = []
    for llm in (plain, speculating):
        before = llm.llm_engine.stats().num_steps
        llm.generate([CODE], params, use_tqdm=False)
        steps.append(llm.llm_engine.stats().num_steps - before)
    assert steps[0] == 64
    assert steps[1] < 40


@needs_native_cpu
@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=[] if name == "preempted" else [pytest.mark.slow]) for name in ENGINES],
)
def test_every_draft_of_the_model_itself_is_accepted(engine: str) -> None:
    """However sequences are scheduled, the draft model's cache holds what it would hold after one pass over the text:
    after prefix hits, preemption, rejected drafts and pauses, where it has to catch up."""
    plain, llm = built_in(None, engine), built_in("itself", engine)
    proposer = cast(ModelProposer, cast(ModelRunner, llm.llm_engine.engine.runner).proposer)
    drafting = llm.llm_engine.engine.scheduler.drafting
    prompts = [TEXTS[0], *TEXTS[2:], CODE + " a"]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    want = seen(plain.generate(prompts, params, use_tqdm=False))
    draw = random.Random(1)
    for pauses, budget in ((False, 2048), (True, 9)):
        before = replace(llm.llm_engine.stats())
        most = (lambda: draw.choice([0, 0, DRAFTS])) if pauses else (lambda: DRAFTS)
        drafting_now = Pausing(DRAFTS, fills_cache=True, overlapped=drafting.overlapped, draw=most)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.llm_engine.engine.scheduler, "drafting", drafting_now)
            patch.setattr(proposer, "_budget", budget)
            assert seen(llm.generate(prompts, params, use_tqdm=False)) == want
        stats = llm.llm_engine.stats()
        assert stats.num_draft_tokens > before.num_draft_tokens
        assert (
            stats.num_accepted_tokens - before.num_accepted_tokens
            == stats.num_draft_tokens - before.num_draft_tokens
        )


@needs_native_cpu
@pytest.mark.slow
def test_a_draft_model_rereads_no_prefix_that_it_knows() -> None:
    llm = make(METHODS["itself"])
    proposer = cast(ModelProposer, cast(ModelRunner, llm.llm_engine.engine.runner).proposer)
    params = SamplingParams(temperature=0, max_tokens=2 + DRAFTS, ignore_eos=True)
    counts = []
    launch = proposer.runner.launch

    def count(schedule: Schedule) -> Launched:
        counts.append(schedule.num_tokens)
        return launch(schedule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposer.runner, "launch", count)
        for _ in range(2):
            counts.clear()
            (output,) = llm.generate([CODE], params, use_tqdm=False)
    prompt = output.prompt_token_ids
    assert prompt is not None
    assert counts[0] == len(prompt) + 1 - len(prompt) // 8 * 8


@needs_native_cpu
def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for file in BUILT_IN.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ParameterError, match="must have the model's vocabulary: token") as error:
        make({"model": str(tmp_path)})
    assert error.value.field == "speculative_config.model"


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
    ("family", "dtype", "method"),
    [
        pytest.param(
            family,
            dtype,
            method,
            marks=[] if (family, dtype, method) == ("gemma2", "bfloat16", "ngram") else [pytest.mark.slow],
        )
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
        for method in ("ngram", "draft model")
    ],
)
def test_random_models_say_the_same(
    family: str, dtype: str, method: str, backend: str, tmp_path: Path
) -> None:
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
    drafts = METHODS[method]
    if method == "draft model":
        write_checkpoint(tmp_path / "draft", seed=1, num_hidden_layers=1, max_position_embeddings=64)
        drafts = {"model": str(tmp_path / "draft")}
    plain, speculating = make(None, **options), make(drafts, **options)
    for wish in ("greedy", "seeded", "penalties", "logprobs", "n"):
        params = SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False, **WISHES[wish])
        check_same(plain, speculating, prompts, params)
