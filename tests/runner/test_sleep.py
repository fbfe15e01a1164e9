"""Sleep mode on real models: memory is freed, and the text after waking up is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoints import write_checkpoint
from drafting import let_drafts_pay
from native import needs_native_cpu
from peft_files import random_factors, write_peft

from vllmlite import LLM, SamplingParams
from vllmlite.errors import ModelError, ParameterError
from vllmlite.lora.request import LoRARequest

DRAW = Random(0)
PROMPTS = [[DRAW.randrange(1, 300) for _ in range(length)] for length in (40, 33, 21)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "max_model_len": 96,
    "block_size": 8,
    "max_num_seqs": 4,
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "device": "cpu",
    "enable_sleep_mode": True,
}
BACKENDS = [pytest.param("cpu", marks=needs_native_cpu), "torch"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path)
    return path


def make(model: Path, backend: str, **options: Any) -> LLM:
    return LLM(str(model), backend=backend, **{"num_gpu_blocks_override": 40, **OPTIONS, **options})


def texts(llm: LLM, **options: Any) -> list[Any]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, **options)]


def sleeps(llm: LLM, level: int) -> None:
    llm.sleep(level)
    assert llm.is_sleeping()
    llm.wake_up()
    assert not llm.is_sleeping()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_text_is_the_same_after_waking_up(model: Path, backend: str) -> None:
    llm = make(model, backend)
    before = texts(llm)
    for level in (1, 2, 1):
        sleeps(llm, level)
        assert texts(llm) == before


@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_native_cpu), pytest.param("torch", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("level", [1, 2])
def test_the_cache_s_memory_is_free_while_the_engine_sleeps(model: Path, backend: str, level: int) -> None:
    llm = make(model, backend, num_gpu_blocks_override=8192, max_num_seqs=64)
    pool = 2 * 3 * 2 * 16 * 4 * 8 * 8192
    prompts = [[DRAW.randrange(1, 300) for _ in range(80)] for _ in range(512)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1))
    before = resident()
    llm.sleep(level)
    assert before - resident() > 512 * 80 / 8 / 8192 * pool * 0.9
    llm.wake_up()


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_that_were_kept_go_on(model: Path, backend: str) -> None:
    llm = make(model, backend)
    expected = texts(llm)
    engine = llm.llm_engine
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, GREEDY)
    engine.step()
    engine.step()
    with pytest.raises(ParameterError, match="mode"):
        engine.sleep(mode="wait")
    engine.sleep(mode="keep")
    engine.wake_up()
    found: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        found |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert [found[str(number)] for number in range(3)] == expected
    engine.add_request("gone", PROMPTS[0], GREEDY)
    engine.sleep()
    assert not engine.has_unfinished_requests()


def with_draft_model(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "speculative_config": {
            "method": "draft_model", "model": str(model), "num_speculative_tokens": 3,
        }
    }  # fmt: skip


def with_tiers(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {"swap_space": 0.01, "kv_disk_path": str(tmp_path / "tier"), "kv_disk_size": 1 << 24}


def with_int8_weights(model: Path, tmp_path: Path) -> dict[str, Any]:
    return {"quantization": "int8", "kv_cache_dtype": "int8"}


@needs_native_cpu
@pytest.mark.parametrize("options", [with_draft_model, with_tiers, with_int8_weights])
def test_the_text_is_the_same_with(
    model: Path, tmp_path: Path, options: Callable[[Path, Path], dict[str, Any]]
) -> None:
    llm = make(model, "cpu", **options(model, tmp_path))
    if options is with_draft_model:
        let_drafts_pay(llm)
    before = texts(llm)
    for level in (1, 2):
        sleeps(llm, level)
        assert texts(llm) == before
    llm.llm_engine.engine.scheduler.check_integrity()
    if options is with_draft_model:
        stats = llm.llm_engine.stats()
        assert stats.num_accepted_tokens == stats.num_draft_tokens > 0


@needs_native_cpu
def test_an_adapter_is_loaded_again_at_level_2(model: Path, tmp_path: Path) -> None:
    factors = random_factors({f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in range(3)}, 4)
    adapter = LoRARequest("own", 1, str(write_peft(tmp_path / "own", factors)))
    llm = make(model, "cpu", enable_lora=True)
    before = texts(llm, lora_request=adapter)
    assert before != texts(llm)
    for level in (1, 2):
        sleeps(llm, level)
        assert texts(llm, lora_request=adapter) == before


@needs_native_cpu
def test_another_checkpoint_is_not_mixed_with_saved_blocks(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    llm = make(copy, "cpu", kv_disk_path=str(tmp_path / "tier"), kv_disk_size=1 << 24)
    plain = make(copy, "cpu")
    before = texts(llm)
    for each in (llm, plain):
        each.sleep(2)
    write_checkpoint(copy, seed=1)
    with pytest.raises(ModelError, match="restart"):
        llm.wake_up()
    assert llm.is_sleeping()
    plain.wake_up()
    assert texts(plain) != before
    shutil.copytree(model, copy, dirs_exist_ok=True)


def test_ranks_are_refused() -> None:
    with pytest.raises(ParameterError, match="enable_sleep_mode"):
        LLM(enable_sleep_mode=True, tensor_parallel_size=2)
