"""A model split over several ranks, in one process, computes what it computes on one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu
from numpy.typing import NDArray
from paged import PagedModel

from vllmlite.backends.base import Backend, Tensor
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import load_model, read_spec
from vllmlite.models.shard import sharded
from vllmlite.quantize import quantize_checkpoint
from vllmlite.weights.packing import Packing

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
    "norms of single heads": ("StableLm", {**WIDE, "qk_layernorm": True}),
}  # fmt: skip


class Exchange:
    """What the ranks of one process hand to one another."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.values: list[NDArray[Any]] = [np.zeros(0)] * world


class ThreadComm:
    """The collectives of a rank that is a thread."""

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

    def all_gather(self, x: Tensor) -> Tensor:
        return self.backend.tensor(np.concatenate(self._shared(x), axis=1))


def logits(path: Path, world: int, *, native: bool = False, quantization: str | None = None) -> NDArray[Any]:
    """Logits of a prompt in two chunks and a step of decoding, which must be the same on all ranks."""
    exchange = Exchange(world)

    def run(rank: int) -> NDArray[Any]:
        backend = CpuBackend(threads=1, packed=quantization is not None) if native else TorchBackend()
        if world > 1:
            backend.comm = ThreadComm(backend, exchange, rank, world)
        try:
            model = load_model(
                backend, path, max_model_len=64, block_size=16, packing=Packing(backend, quantization),
                spec=sharded(read_spec(path), rank, world),
            )  # fmt: skip
            paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
            paged.admit(0)
            chunks = TOKENS[:25], TOKENS[25:39], TOKENS[39:]
            return np.concatenate([paged.logits([0], [chunk])[0] for chunk in chunks])
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(run, rank) for rank in range(world)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    found = [future.result() for future in futures]
    assert all(one.tobytes() == found[0].tobytes() for one in found)
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    expected = logits(tmp_path, 1)
    np.testing.assert_allclose(logits(tmp_path, 2), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["fewer kv heads than ranks", "interleaved by group", "mixture", "tied"])
def test_four_ranks_compute_what_one_does(case: str, tmp_path: Path) -> None:
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
    expected = logits(tmp_path / "packed", 1, native=True, quantization=kind)
    found = logits(tmp_path / "packed", 2, native=True, quantization=kind)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@needs_native_cpu
def test_native_ranks_compute_what_one_does(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", **WIDE)
    expected = logits(tmp_path, 1, native=True)
    found = logits(tmp_path, 2, native=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_numbers_of_ranks_that_do_not_divide_the_model_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", **WIDE)
    with pytest.raises(ParameterError, match=r"tensor_parallel_size=3: .* can be split over 1, 2, 4, 8"):
        sharded(read_spec(tmp_path), 0, 3)
    write_checkpoint(tmp_path / "olmo", "Olmo2", **WIDE)
    with pytest.raises(ParameterError, match=r"tensor_parallel_size=2: .* norms all heads as one"):
        sharded(read_spec(tmp_path / "olmo"), 0, 2)


@needs_native_cpu
def test_groups_are_not_split(tmp_path: Path) -> None:
    """A scheme names the slices that it can be cut into."""
    write_checkpoint(tmp_path / "floats", "Llama", **{**WIDE, "intermediate_size": 96})
    quantize_checkpoint(tmp_path / "floats", tmp_path / "packed", "int8")
    with pytest.raises(
        ModelError, match=r"columns 0 to 48 of 96 .* int8, which is sliced at multiples of 32"
    ):
        logits(tmp_path / "packed", 2, native=True, quantization="int8")
