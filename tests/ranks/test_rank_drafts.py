"""The last stage of a pipeline proposes the drafts that a model on one rank proposes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import medusa_heads
import pytest
from checkpoints import TINY, write_checkpoint
from drafting import let_drafts_pay
from eagle_heads import Shape, write_head
from mtp_layers import write_with_mtp
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams

pytestmark = [needs_native_cpu, pytest.mark.slow]
PROMPTS = [[5, 6, 7, 8] * 5, list(range(20, 35)), [9, 10, 11] * 4]
PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def engine(path: Path, drafts: dict[str, Any], **ranks: int) -> LLM:
    llm = LLM(
        str(path), backend="cpu", dtype="float32", threads=1, skip_tokenizer_init=True, max_model_len=64,
        max_num_seqs=4, num_gpu_blocks_override=24, speculative_config=drafts | {"num_speculative_tokens": 3},
        enforce_eager=True, **ranks,
    )  # fmt: skip
    let_drafts_pay(llm)
    return llm


def results(path: Path, drafts: dict[str, Any], **ranks: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the text of each prompt, run alone and beside the others, and all drafts of the lone runs."""
    llm = engine(path, drafts, **ranks)
    runner = llm.llm_engine.engine.runner
    collect, texts = runner.collect, []
    proposed: list[list[int]] = []

    def recorded(handle: Any) -> Any:
        result = collect(handle)
        proposed.extend(result.drafts.values())
        return result

    runner.collect = recorded  # type: ignore[method-assign]
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    try:
        for some in ([prompts[0]], [prompts[1]], prompts):
            texts += llm.generate(some, PARAMS, use_tqdm=False)
            if len(some) == 1:
                alone = list(proposed)
    finally:
        llm.llm_engine.close()
    return [list(output.outputs[0].token_ids) for output in texts], alone


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ("eagle3", {"pipeline_parallel_size": 2}),
        ("eagle3", {"pipeline_parallel_size": 3}),
        ("eagle3", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
        ("eagle", {"pipeline_parallel_size": 2}),
        ("medusa", {"pipeline_parallel_size": 2}),
        ("mtp", {"pipeline_parallel_size": 2}),
        ("draft_model", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
    ],
    ids=["eagle3", "eagle3, three stages", "eagle3, both", "eagle", "medusa", "mtp", "draft model, both"],
)
def test_the_last_stage_proposes_the_drafts_of_one_rank(
    method: str, ranks: dict[str, int], tmp_path: Path
) -> None:
    """The EAGLE-3 head reads the inputs of three layers, which are on up to three stages."""
    path, head = tmp_path / "model", tmp_path / "head"
    drafts = {"method": method, "model": str(head)}
    if method == "mtp":
        write_with_mtp(path, "qwen", "Qwen3", tie_word_embeddings=True)
        del drafts["model"]
    else:
        write_checkpoint(path, tie_word_embeddings=method == "eagle")
    shape = Shape(TINY["vocab_size"], TINY["hidden_size"], 3)
    if method in ("eagle", "eagle3"):
        write_head(head, method, shape, layers=[2, 0, 1])
    elif method == "medusa":
        medusa_heads.write_medusa(head, shape, "vllm")
    elif method == "draft_model":
        shutil.copytree(path, head)
    expected, found = results(path, drafts), results(path, drafts, **ranks)
    assert found == expected
    assert found[1]
