"""Cache tiers on real models: the text is the same, bit for bit, whatever was evicted, preempted, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.engine.tiers import Tiers
from vllmlite.errors import ParameterError

DRAW = Random(0)
PROMPTS = [[DRAW.randrange(1, 300) for _ in range(length)] for length in (40, 33, 21)]
OPTIONS: dict[str, Any] = {
    "num_gpu_blocks_override": 13,
    "max_model_len": 96,
    "block_size": 8,
    "max_num_seqs": 4,
    "dtype": "float32",
    "skip_tokenizer_init": True,
}
ENGINES: dict[str, dict[str, Any]] = {
    "host": {"swap_space": 0.01},
    "little host": {"swap_space": 0.0005},
    "swap": {"swap_space": 0.01, "preemption_mode": "swap"},
    "two steps": {"swap_space": 0.01, "async_scheduling": True, "max_num_batched_tokens": 24},
    "ngram": {"swap_space": 0.01, "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
}


def tiers(llm: LLM) -> Tiers:
    found = llm.llm_engine.engine.scheduler.tiers
    assert found is not None
    return found


def answers(llm: LLM) -> list[Any]:
    """Ids and log-probabilities of each prompt, three times, in a pool that holds little more than one of them."""
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True, repetition_penalty=1.1)
    outputs = [output for wish in (greedy, seeded, greedy) for output in llm.generate(PROMPTS, wish)]
    return [(output.outputs[0].token_ids, str(output.outputs[0].logprobs)) for output in outputs]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path)
    return path


class Expected:
    """The answers of a backend without tiers, by backend and dtype of the cache."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._found: dict[tuple[str, str], list[Any]] = {}

    def check(self, backend: str, kv_dtype: str = "auto", **options: Any) -> None:
        """Check those of an engine with tiers, which must save, load and preempt."""
        plain = {**OPTIONS, "model": str(self.model), "backend": backend, "kv_cache_dtype": kv_dtype}
        key = backend, kv_dtype
        if key not in self._found:
            self._found[key] = answers(LLM(**plain))
        llm = LLM(**plain, **options)
        tiers(llm).cost.host_seconds = 0.0  # copying always pays
        found, expected = answers(llm), self._found[key]
        if backend != "cpu":  # whose log-probabilities may differ in their last bits
            found, expected = [ids for ids, _ in found], [ids for ids, _ in expected]
        assert found == expected
        scheduler = llm.llm_engine.engine.scheduler
        scheduler.check_integrity()
        assert scheduler.num_preemptions > 0
        assert tiers(llm).counts.loaded > 5 and tiers(llm).counts.saved > 5


@pytest.fixture(scope="module")
def plain(model: Path) -> Expected:
    return Expected(model)


@needs_native_cpu
@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[] if how == "two steps" else pytest.mark.slow) for how in ENGINES]
)
def test_the_text_is_the_same_with_a_host_tier(plain: Expected, how: str) -> None:
    plain.check("cpu", **ENGINES[how])


@needs_native_cpu
@pytest.mark.parametrize(
    "kv_dtype",
    ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bfloat16", "fp8", "fp8_per_token_head"))],
)
def test_the_text_is_the_same_with_every_cache_dtype(plain: Expected, kv_dtype: str) -> None:
    plain.check("cpu", kv_dtype, swap_space=0.01)


@pytest.mark.slow
@needs_native_cpu
@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Qwen3Moe"])
def test_the_text_is_the_same_with_sliding_windows_and_experts(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    Expected(tmp_path).check("cpu", swap_space=0.01)


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("how", ["host", pytest.param("two steps", marks=pytest.mark.slow)])
def test_the_text_is_the_same_on_other_backends(plain: Expected, backend: str, how: str) -> None:
    if backend == "cuda":
        pytest.importorskip("vllmlite._cuda", reason="vllmlite._cuda is not built")
    plain.check(backend, **ENGINES[how])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"swap_space": 1.0, "enable_prefix_caching": False}, "swap_space"),
        ({"swap_space": 1.0, "kv_offloading_size": 2.0}, "kv_offloading_size"),
        ({"preemption_mode": "swap"}, "preemption_mode"),
        ({"swap_space": -1.0}, "swap_space"),
        ({"swap_space": 1e-6}, "swap_space"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        LLM(**options)
    assert caught.value.field == field
