"""An engine whose model is computed by several processes gives the tokens of an engine with one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY, write_checkpoint
from drafting import let_drafts_pay
from eagle_heads import Shape, write_head
from native import needs_native_cpu
from peft_files import random_factors, write_peft
from rank_processes import processes_of

from vllmlite import LLM, RequestOutput, SamplingParams
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ModelError, ParameterError, VllmliteError
from vllmlite.lora.modules import peft_modules
from vllmlite.lora.request import LoRARequest
from vllmlite.models import read_spec

pytestmark = needs_native_cpu
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "backend": "cpu", "threads": 1, "skip_tokenizer_init": True, "max_model_len": 128, "seed": 1,
    "max_num_seqs": 4, "max_num_batched_tokens": 24, "num_gpu_blocks_override": 9,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1},
    "enable_lora": True, "max_loras": 2,
}  # fmt: skip
"""Few blocks and short steps: prompts are chunked, requests preempted."""
PROMPTS = [[5, 6, 7, 8] * 8, [9, 10, 11] * 5, list(range(20, 60)), [5, 6, 7, 8] * 9]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(temperature=1, seed=5, top_k=40, max_tokens=24, ignore_eos=True),
]


def generate(llm: LLM) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return llm.generate(prompts, PARAMS, use_tqdm=False)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, num_hidden_layers=3, tie_word_embeddings=True)
    return path


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        pytest.param({"pipeline_parallel_size": 2}, id="pipeline"),
        pytest.param({"pipeline_parallel_size": 3}, id="three stages", marks=pytest.mark.slow),
        pytest.param(
            {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, id="both", marks=pytest.mark.slow
        ),
    ],
)
def parallel(
    checkpoint: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """An engine of several ranks with cache tiers in host memory and on disk."""
    disk = str(tmp_path_factory.mktemp("disk"))
    llm = LLM(str(checkpoint), **request.param, **OPTIONS, kv_disk_path=disk, kv_disk_size=1 << 20)
    yield llm
    llm.llm_engine.close()


@pytest.fixture(scope="module")
def single(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), **OPTIONS)


@pytest.fixture(scope="module")
def expected(single: LLM) -> list[RequestOutput]:
    return generate(single)


def test_several_processes_give_the_tokens_of_one(parallel: LLM, expected: list[RequestOutput]) -> None:
    found = generate(parallel)
    assert token_ids(found) == token_ids(expected)
    logprobs = found[0].outputs[0].logprobs, expected[0].outputs[0].logprobs
    assert logprobs[0] is not None and logprobs[1] is not None
    for ours, theirs in zip(logprobs[0], logprobs[1], strict=True):
        for token, entry in theirs.items():
            assert ours[token].logprob == pytest.approx(entry.logprob, abs=1e-3)
    stats = parallel.llm_engine.engine.current_stats()
    assert stats.num_accepted_tokens
    assert stats.num_preemptions or parallel.llm_engine.config.pipeline_parallel_size > 1
    assert stats.backend == "cpu" and stats.device == "cpu"
    assert "processes of 1 thread: tensor parallelism" in parallel.llm_engine.backend_choice


def test_adapters_change_all_ranks(parallel: LLM, single: LLM, checkpoint: Path, tmp_path: Path) -> None:
    """Three adapters take turns in two places, beside a request without any."""
    modules = peft_modules(checkpoint, read_spec(checkpoint)).by_name
    shapes = {name: (module.out, module.inner) for name, module in modules.items()}
    adapters = []
    for number in (1, 2, 3):
        path = write_peft(tmp_path / str(number), random_factors(shapes, number, seed=number))
        adapters.append(LoRARequest(f"adapter {number}", number, str(path)))
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    texts = []
    for llm in (single, parallel):
        outputs = llm.generate(prompts, PARAMS, lora_request=[*adapters, None], use_tqdm=False)
        texts.append(token_ids(outputs))
    assert texts[0] == texts[1]
    assert len({str(text) for text in texts[0]}) == 4


def test_evicted_blocks_come_back_from_host_memory(parallel: LLM, expected: list[RequestOutput]) -> None:
    scheduler = parallel.llm_engine.engine.scheduler
    assert scheduler.tiers is not None
    scheduler.tiers.cost.host_seconds = 0.0  # copying always pays
    for _ in range(2):
        assert token_ids(generate(parallel)) == token_ids(expected)
    counts = scheduler.tiers.counts
    assert counts.saved and counts.loaded
    scheduler.check_integrity()


def test_an_interrupt_loses_nothing(parallel: LLM, expected: list[RequestOutput]) -> None:
    for delay in (0.01, 0.03):
        timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
        with suppress(KeyboardInterrupt):
            timer.start()
            while True:
                generate(parallel)
        timer.join()
        assert token_ids(generate(parallel)) == token_ids(expected)


def test_a_step_that_fails_on_all_ranks_fails_alone(parallel: LLM, expected: list[RequestOutput]) -> None:
    engine = parallel.llm_engine.engine
    launch = engine.runner.launch

    def broken(schedule: Any) -> Any:
        schedule.slots = [99] * len(schedule.slots)
        return launch(schedule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "launch", broken)
        with pytest.raises(VllmliteError, match="IndexError: index 99 is out of bounds"):
            generate(parallel)
    assert token_ids(generate(parallel)) == token_ids(expected)


def test_the_ranks_sleep_while_there_is_nothing_to_do(parallel: LLM) -> None:
    generate(parallel)
    pids = [process.pid for process in processes_of(parallel)]

    def seconds() -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(field) for row in fields for field in row[11:13]) / 100

    time.sleep(0.1)
    begin = seconds()
    time.sleep(0.5)
    assert seconds() - begin <= 0.02


@pytest.mark.slow
def test_ranks_agree_on_the_drafts_of_models(
    checkpoint: Path, expected: list[RequestOutput], tmp_path: Path
) -> None:
    write_head(tmp_path, "eagle3", Shape(TINY["vocab_size"], TINY["hidden_size"], 2), layers=[0, 1, 1])
    for draft in (
        {"method": "draft_model", "model": str(checkpoint), "draft_tensor_parallel_size": 2},
        {"method": "eagle3", "model": str(tmp_path)},
    ):
        options = OPTIONS | {"speculative_config": draft | {"num_speculative_tokens": 3}}
        llm = LLM(str(checkpoint), tensor_parallel_size=2, **options)
        try:
            let_drafts_pay(llm)
            assert token_ids(generate(llm)) == token_ids(expected)
            assert llm.llm_engine.engine.current_stats().num_draft_tokens
        finally:
            llm.llm_engine.close()


def test_sizes_that_cannot_be_split_are_refused_before_a_process_starts(checkpoint: Path) -> None:
    with pytest.raises(ParameterError, match=r"tensor_parallel_size=3: .* can be split over 1, 2, 4"):
        LLM(str(checkpoint), tensor_parallel_size=3, **OPTIONS)
    with pytest.raises(ParameterError, match=r"pipeline_parallel_size=4: must be at most 3, the layers"):
        LLM(str(checkpoint), pipeline_parallel_size=4, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distributed_executor_backend": "uni"}, "distributed_executor_backend='uni': runs one rank"),
    ],
)
def test_what_needs_one_rank_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        EngineConfig.from_kwargs(tensor_parallel_size=2, **options)


def test_a_model_that_a_rank_cannot_load_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=1)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        LLM(str(tmp_path), tensor_parallel_size=2, **OPTIONS)
