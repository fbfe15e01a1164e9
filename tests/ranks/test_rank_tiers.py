"""Blocks that several ranks have saved to disk give the same text after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.disk_tier.disk import DiskTier
from vllmlite.engine.tiers import Tiers

pytestmark = [needs_native_cpu, pytest.mark.slow]
PROMPTS: list[Any] = [{"prompt_token_ids": list(range(first, first + 40))} for first in (5, 60, 111)]
PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


def answers(path: Path, **options: Any) -> tuple[list[list[int]], Tiers | None]:
    llm = LLM(
        str(path), backend="cpu", dtype="float32", threads=1, skip_tokenizer_init=True, block_size=8,
        max_model_len=64, num_gpu_blocks_override=24, **options,
    )  # fmt: skip
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    tiers = llm.llm_engine.engine.scheduler.tiers
    llm.llm_engine.close()
    if tiers is not None:
        assert isinstance(tiers.disk, DiskTier)
        tiers.disk.close()
    return [list(output.outputs[0].token_ids) for output in outputs], tiers


def test_blocks_on_disk_survive_a_restart_with_the_same_ranks(tmp_path: Path) -> None:
    """Another division of the model must not read them: its ranks have other parts of a block."""
    write_checkpoint(tmp_path / "model")
    expected, _ = answers(tmp_path / "model")
    disk = {"kv_disk_path": str(tmp_path / "disk"), "kv_disk_size": 1 << 24}
    for ranks, finds in ((TENSOR, False), (TENSOR, True), (PIPELINE, False), (PIPELINE, True), ({}, False)):
        found, tiers = answers(tmp_path / "model", **disk, **ranks)
        assert found == expected
        assert tiers is not None and bool(tiers.counts.read) == finds
