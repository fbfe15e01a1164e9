"""Cache tiers on real models: the text is the same, bit for bit, whatever was evicted, preempted, saved and loaded."""

from __future__ import annotations

import gc
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.beam_params import BeamSearchParams
from vllmlite.engine.tiers import Copies, Tiers
from vllmlite.errors import ParameterError
from vllmlite.runner.kv_transfer import start_copies

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
    scored = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True, prompt_logprobs=1)
    wishes = greedy, seeded, scored, greedy
    outputs = [output for wish in wishes for output in llm.generate(PROMPTS, wish)]
    found: list[Any] = [(each.outputs[0].token_ids, str(each.outputs[0].logprobs)) for each in outputs]
    found += [(str(each.prompt_logprobs), "") for each in outputs]
    for beams in llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], BeamSearchParams(beam_width=2, max_tokens=9)
    ):
        found += [(each.tokens, str(each.cum_logprob)) for each in beams.sequences]
    return found


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

    def check(self, backend: str, kv_dtype: str = "auto", **options: Any) -> Tiers:
        """Check those of an engine with tiers, which must save, load and preempt."""
        plain = {**OPTIONS, "model": str(self.model), "backend": backend, "kv_cache_dtype": kv_dtype}
        key = backend, kv_dtype
        if key not in self._found:
            self._found[key] = answers(LLM(**plain))
        llm = LLM(**plain, **options)
        tiers(llm).cost.host_seconds = 0.0  # copying always pays
        found, expected = answers(llm), self._found[key]
        if backend != "cpu":  # whose log-probabilities may differ in their last bits
            found, expected = (
                [ids for ids, _ in each if isinstance(ids, list)] for each in (found, expected)
            )
        assert found and found == expected
        scheduler = llm.llm_engine.engine.scheduler
        scheduler.check_integrity()
        assert scheduler.num_preemptions > 0
        assert tiers(llm).counts.loaded > 5 and tiers(llm).counts.saved > 5
        return tiers(llm)


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
@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16", "fp8", "fp8_per_token_head"])
def test_the_text_is_the_same_with_every_cache_dtype(plain: Expected, kv_dtype: str) -> None:
    plain.check("cpu", kv_dtype, swap_space=0.01)


@pytest.mark.slow
@needs_native_cpu
@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Qwen3Moe"])
def test_the_text_is_the_same_with_sliding_windows_and_experts(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    Expected(tmp_path).check("cpu", swap_space=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("how", ["host", "two steps"])
def test_the_text_is_the_same_on_other_backends(plain: Expected, backend: str, how: str) -> None:
    if backend == "cuda":
        pytest.importorskip("vllmlite._cuda", reason="vllmlite._cuda is not built")
    plain.check(backend, **ENGINES[how])


@needs_native_cpu
@pytest.mark.parametrize("damage", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_text_is_the_same_from_disk_after_a_restart(
    plain: Expected, tmp_path: Path, damage: bool
) -> None:
    options: dict[str, Any] = {"kv_disk_path": str(tmp_path / "kv"), "kv_disk_size": 1 << 20}
    plain.check("cpu", **options)
    gc.collect()  # ends the first engine
    file = tmp_path / "kv" / "blocks"
    if damage:
        whole = bytearray(file.read_bytes())
        for at in range(40_000, len(whole), 7000):
            whole[at] ^= 4
        file.write_bytes(whole)
    tier = plain.check("cpu", **options)
    assert tier.counts.read + tier.counts.failed > 5
    assert damage == (tier.counts.failed > 0)


@needs_native_cpu
def test_prompts_with_a_salt_leave_nothing_on_disk(model: Path, tmp_path: Path) -> None:
    llm = LLM(model=str(model), backend="cpu", kv_disk_path=str(tmp_path), kv_disk_size=1 << 20, **OPTIONS)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    llm.generate({"prompt_token_ids": PROMPTS[0], "cache_salt": "s"}, params)
    assert tiers(llm).counts.saved > 0
    assert not tiers(llm).counts.written and not tiers(llm)._writing
    llm.generate({"prompt_token_ids": PROMPTS[0]}, params)
    assert tiers(llm).counts.written or tiers(llm)._writing


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"swap_space": 1.0, "enable_prefix_caching": False}, "swap_space"),
        ({"swap_space": 1.0, "kv_offloading_size": 2.0}, "kv_offloading_size"),
        ({"preemption_mode": "swap"}, "preemption_mode"),
        (
            {"swap_space": 1.0, "speculative_config": {"method": "eagle", "model": "x"}},
            "swap_space",
        ),
        ({"swap_space": -1.0}, "swap_space"),
        ({"swap_space": 1e-6}, "swap_space"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        LLM(**options)
    assert caught.value.field == field


def test_loads_wait_for_saves_of_the_same_blocks() -> None:
    """A step without rows may load into blocks that it evicts."""

    calls: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: calls.append(name)

    start_copies(Recorder(), Copies([3], [0], [1], [3]), [])  # type: ignore[arg-type]
    assert calls == ["join", "save", "join", "load"]
