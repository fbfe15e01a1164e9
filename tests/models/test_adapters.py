"""LoRA adapters on whole models: batches of rows with different adapters, against merged weights and each adapter
alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import delta, merge, random_adapter
from checkpoints import write_checkpoint
from model_runs import LENGTHS, chunked, paged_model, prompts
from paged import PagedModel

from vllmlite.models import read_spec
from vllmlite.models.adapters import most_bytes, place_parts, places
from vllmlite.models.shard import part_of
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import ABILITIES, EMBEDDING, HEAD, AdapterLimits, LowRank
from vllmlite.weights.host import HostTensor, float_values

ROWS = len(LENGTHS)
ADAPTERS = [0, 1, 2, 3, 0, 2, 1, 3]
"""The adapter of each row."""
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Phi3": {},
    "GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256, "n_inner": 96},
    "Qwen2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48
    },
}  # fmt: skip
PARTS = {1: None, 2: ("q", "v"), 3: ("down", "o", "gate", "up")}
"""The weights that each adapter changes; None: all."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Path of a family's checkpoint, and of the same with adapter ``index`` merged."""

    @cache
    def path(family: str, index: int = 0, abilities: frozenset[str] = ABILITIES) -> Path:
        to = tmp_path_factory.mktemp(family) / "model"
        if index == 0:
            write_checkpoint(to, family, **FAMILIES[family])
        else:
            base = path(family)
            merge(base, to, random_adapter(read_spec(base), index, parts=PARTS[index], abilities=abilities))
        return to

    return path


def with_adapters(path: Path, device: str) -> PagedModel:
    paged = paged_model(path, device)
    paged.model.enable_adapters(AdapterLimits(3, 16))
    for index, parts in PARTS.items():
        abilities = paged.backend.adapter_abilities
        paged.model.set_adapter(
            index, random_adapter(read_spec(path), index, parts=parts, abilities=abilities)
        )
    return paged


def test_bytes_of_the_largest_adapters(checkpoints: Any) -> None:
    spec = read_spec(checkpoints("Phi3"))
    largest = random_adapter(spec, 0, rank=16, abilities=(EMBEDDING, HEAD))
    assert most_bytes(spec, AdapterLimits(3, 16), "bfloat16", ABILITIES) == 3 * largest.num_bytes // 2


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name == "GPT2")) for name in FAMILIES]
)
def test_a_mixed_batch_equals_merged_weights(checkpoints: Any, family: str, device: str) -> None:
    paged = with_adapters(checkpoints(family), device)
    paged.adapters[:ROWS] = ADAPTERS
    found = chunked(paged, prompts(), "ragged")
    for index in range(4):
        merged = checkpoints(family, index, paged.backend.adapter_abilities)
        expected = chunked(paged_model(merged, device), prompts(), "whole")
        rows = [row for row in range(ROWS) if ADAPTERS[row] == index]
        for row in rows:
            scale = np.abs(expected[row]).max()
            np.testing.assert_allclose(found[row] / scale, expected[row] / scale, atol=1e-4)


SPLIT: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, changes) for family, changes in FAMILIES.items()},
    "fewer kv heads than ranks": ("Llama", {"num_key_value_heads": 1}),
    "interleaved experts": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16}),
    "interleaved by group": ("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": True}),
}


@pytest.mark.parametrize("case", SPLIT)
def test_ranks_take_their_part_of_a_change(case: str, tmp_path: Path) -> None:
    """The change ``W = W @ 1`` of a whole weight becomes the part of ``W`` that the rank loads from a checkpoint."""
    family, changes = SPLIT[case]
    write_checkpoint(tmp_path, family, **changes)
    spec = read_spec(tmp_path)
    rng = np.random.default_rng(0)
    stored = {source.key: host(rng.standard_normal(source.stored)) for source in sources(spec).values()}
    taken = set()
    tables = {EMBEDDING, HEAD}
    for rank in range(4):
        part = part_of(spec, rank, 4, 2)
        own = sources(part)
        for name, place in place_parts(part).items():
            taken.add(name)
            if name in tables:
                assert place.rows == (own[f"{name}.weight"].rows if name == HEAD else None)
                continue
            source = sources(spec)[f"{name}.weight"]
            whole = source.take(stored[source.key])
            assert isinstance(whole, HostTensor)
            change = place.of(LowRank(host(np.eye(whole.shape[1])), whole, 1.0))
            expected = own[f"{place.name}.weight"].take(stored[source.key])
            assert isinstance(expected, HostTensor)
            np.testing.assert_array_equal(delta(change), float_values(expected))
    assert taken == places(spec).keys()


def host(values: Any) -> HostTensor:
    return HostTensor("float32", values.shape, values.astype(np.float32).reshape(-1).view(np.uint8))
