"""A model split over several ranks, which are threads of one process, gives the results of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_families import converted_family
from native import needs_native_cpu
from numpy.typing import NDArray
from paged import PagedModel

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import Tensor
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.engine import Engine
from vllmlite.engine.scheduler import Limits
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import read_spec
from vllmlite.models.shard import sharded
from vllmlite.quantize import quantize_checkpoint
from vllmlite.runner.build import BuiltRunner, build_runner, plan_for
from vllmlite.runner.runner import ModelRunner
from vllmlite.sampling_params import SamplingParams

Result = TypeVar("Result")
TOKENS = np.random.default_rng(0).integers(3, 300, 40).astype(np.int32)
WIDE: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE),
    "tied": ("Llama", {**WIDE, "tie_word_embeddings": True}),
    "fewer kv heads than ranks": ("Llama", {**WIDE, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", WIDE),
    "qwen3": ("Qwen3", {**WIDE, "tie_word_embeddings": True}),
    "fused": ("Phi3", WIDE),
    "transposed": ("GPT2", {"n_embd": 128, "n_head": 8, "n_inner": 256}),
    "interleaved by head": ("GPTNeoX", {**WIDE, "num_key_value_heads": 8}),
    "interleaved by group": (
        "Falcon", {**WIDE, "num_kv_heads": 4, "new_decoder_architecture": True, "bias": True, "ffn_hidden_size": 256}
    ),
    "linear biases": ("Bloom", {"n_head": 8, "hidden_size": 128}),
    "gemma2": ("Gemma2", {**WIDE, "head_dim": 16, "sliding_window": 11}),
    "mixture": ("Mixtral", {**WIDE, "num_local_experts": 4}),
    "shared expert": (
        "Qwen2Moe",
        {**WIDE, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    ),
    "experts in turn": (
        "GptOss", {**WIDE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}
    ),
    "norms of single heads": ("StableLm", {**WIDE, "qk_layernorm": True}),
}  # fmt: skip


class Exchange:
    """The tensors that the ranks of one process exchange."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.values: list[NDArray[Any]] = [np.zeros(0)] * world


class ThreadComm:
    """The collectives of a rank that runs in a thread."""

    sharing = 1

    def __init__(self, backend: Backend, exchange: Exchange, rank: int, world: int) -> None:
        self.backend, self.exchange, self.rank, self.world = backend, exchange, rank, world

    def _shared(self, x: Tensor) -> list[NDArray[Any]]:
        self.exchange.barrier.wait(60)
        self.exchange.values[self.rank] = self.backend.to_host(x)
        self.exchange.barrier.wait(60)
        return list(self.exchange.values)

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._shared(x)
        total = first.copy()
        for other in others:
            total += other
        return self.backend.tensor(total)

    def least(self, value: int) -> int:
        return int(min(self._shared(self.backend.tensor(np.array([value]))))[0])

    def send(self, x: Tensor) -> None:
        raise NotImplementedError

    def receive(self, shape: Sequence[int], dtype: str) -> Tensor:
        raise NotImplementedError

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        assert x.shape[1] == widths[self.rank]
        return self.backend.tensor(np.concatenate(self._shared(x), axis=1))


def on_ranks(
    path: Path, world: int, compute: Callable[[BuiltRunner[ModelRunner]], Result], **options: Any
) -> list[Result]:
    """Build the runners of ``world`` ranks, each in a thread, and return what ``compute`` returns for each."""
    settings: dict[str, Any] = {"backend": "torch", "dtype": "float32", **options}
    config = EngineConfig(
        model=str(path), device="cpu", max_model_len=64, block_size=16, num_gpu_blocks_override=8, max_num_seqs=2,
        threads=1, skip_tokenizer_init=True, **settings,
    )  # fmt: skip
    exchange = Exchange(world)

    def run(rank: int) -> Result:
        try:
            return compute(
                build_runner(
                    config, plan_for(config), rank, world,
                    lambda backend: ThreadComm(backend, exchange, rank, world),
                )
            )  # fmt: skip
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(run, rank) for rank in range(world)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


def logits(path: Path, world: int, **options: Any) -> NDArray[Any]:
    """Logits of a prompt in two chunks and one decoding step; fails unless they are equal on all ranks."""

    def compute(built: BuiltRunner[ModelRunner]) -> NDArray[Any]:
        paged = PagedModel(built.runner.model, num_blocks=8, max_slots=2, max_context=64)
        paged.admit(0)
        chunks = TOKENS[:25], TOKENS[25:39], TOKENS[39:]
        return np.concatenate([paged.logits([0], [chunk])[0] for chunk in chunks])

    found = on_ranks(path, world, compute, **options)
    assert all(one.tobytes() == found[0].tobytes() for one in found)
    return found[0]


def generated(path: Path, world: int, **options: Any) -> list[int]:
    """The ids that an engine on each rank samples; fails unless they are equal on all ranks."""

    def compute(built: BuiltRunner[ModelRunner]) -> list[int]:
        limits = Limits(
            max_num_seqs=2, max_num_batched_tokens=16, max_mixed_prefill_tokens=16,
            max_model_len=built.max_model_len, block_size=16, num_blocks=built.num_blocks,
        )  # fmt: skip
        engine = Engine(limits, built.runner, vocab_size=built.runner.model.vocab_size)
        params, most = SamplingParams(temperature=1, seed=5, max_tokens=12, ignore_eos=True), 12
        engine.add_request("a", TOKENS.tolist(), params)
        engine.add_request("b", TOKENS[:7].tolist(), params)
        found = []
        while engine.has_unfinished_requests():
            found += [token for output in engine.step() for token in output.new_token_ids]
        assert len(found) == 2 * most
        return found

    # The exchange of threads reads results, which a step that is recorded cannot do.
    found = on_ranks(path, world, compute, enforce_eager=True, **options)
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_results_of_one(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    expected = logits(tmp_path, 1)
    np.testing.assert_allclose(logits(tmp_path, 2), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["fewer kv heads than ranks", "interleaved by group", "mixture", "tied"])
def test_four_ranks_give_the_results_of_one(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    expected = logits(tmp_path, 1)
    np.testing.assert_allclose(logits(tmp_path, 4), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@needs_native_cpu
@pytest.mark.parametrize("case", ["llama", "fused", "mixture"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_checkpoints_are_sliced(case: str, kind: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path / "floats", family, **changes)
    quantize_checkpoint(tmp_path / "floats", tmp_path / "packed", kind)
    expected = logits(tmp_path / "packed", 1, backend="cpu")
    found = logits(tmp_path / "packed", 2, backend="cpu")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@needs_native_cpu
def test_native_ranks_give_the_results_of_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", **WIDE)
    expected = logits(tmp_path, 1, backend="cpu")
    found = logits(tmp_path, 2, backend="cpu")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_native_cpu)])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_ggufs_whose_heads_are_reordered_are_sliced(backend: str, kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "floats", "Llama", **WIDE)
    path = converted_family(tmp_path / "floats", tmp_path / "model.gguf", "llama", kind)
    dtype = "auto" if backend == "cpu" else "float32"
    expected = logits(path, 1, backend=backend, dtype=dtype)
    found = logits(path, 2, backend=backend, dtype=dtype)
    bound = 1e-4 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


@needs_native_cpu
@pytest.mark.parametrize("case", ["llama", "mixture"])
def test_engines_on_two_ranks_sample_the_same_ids(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    assert generated(tmp_path, 2, backend="cpu") == generated(tmp_path, 1, backend="cpu")


def test_ranks_agree_on_the_smallest_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", **WIDE)
    numbers = iter((7, 5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllmlite.runner.build.num_cache_blocks", lambda *_: next(numbers))
        assert on_ranks(tmp_path, 2, lambda built: built.num_blocks) == [5, 5]


def test_models_of_transformers_run_on_one_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", **WIDE)
    with pytest.raises(ParameterError, match=r"tensor_parallel_size=2: .* on 1 rank"):
        logits(tmp_path, 2, model_impl="transformers")


def test_numbers_of_ranks_that_do_not_divide_the_model_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", **WIDE)
    with pytest.raises(ParameterError, match=r"tensor_parallel_size=3: .* can be split over 1, 2, 4, 8"):
        sharded(read_spec(tmp_path), 0, 3)
    write_checkpoint(tmp_path / "olmo", "Olmo2", **WIDE)
    with pytest.raises(ParameterError, match=r"tensor_parallel_size=2: .* normalises all heads together"):
        sharded(read_spec(tmp_path / "olmo"), 0, 2)


@needs_native_cpu
def test_groups_are_not_split(tmp_path: Path) -> None:
    """A quantisation scheme says where its weights can be split."""
    write_checkpoint(tmp_path / "floats", "Llama", **{**WIDE, "intermediate_size": 96})
    quantize_checkpoint(tmp_path / "floats", tmp_path / "packed", "int8")
    with pytest.raises(
        ModelError, match=r"columns (0 to 48|48 to 96) of 96 .* int8, which is sliced at multiples of 32"
    ):
        logits(tmp_path / "packed", 2, backend="cpu")
