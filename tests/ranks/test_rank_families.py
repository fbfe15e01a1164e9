"""Models of many families give the tokens of one process on two, by tensor and by pipeline parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.quantize import quantize_checkpoint

pytestmark = [needs_native_cpu, pytest.mark.slow]
WIDE: dict[str, Any] = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128, "intermediate_size": 256,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE),
    "qwen3, tied": ("Qwen3", {**WIDE, "tie_word_embeddings": True}),
    "phi3": ("Phi3", WIDE),
    "gpt2": ("GPT2", {"n_embd": 128, "n_head": 8, "n_inner": 256, "n_layer": 3}),
    "gpt-neox": ("GPTNeoX", {**WIDE, "num_key_value_heads": 8}),
    "falcon": (
        "Falcon", {**WIDE, "num_kv_heads": 4, "new_decoder_architecture": True, "bias": True, "ffn_hidden_size": 256}
    ),
    "bloom": ("Bloom", {"n_head": 8, "hidden_size": 128, "n_layer": 3}),
    "gemma2": ("Gemma2", {**WIDE, "head_dim": 16, "sliding_window": 11}),
    "opt, projected": ("OPT", {**WIDE, "ffn_dim": 256, "word_embed_proj_dim": 64}),
    "mixtral": ("Mixtral", {**WIDE, "num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**WIDE, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    ),
    "olmo2": ("Olmo2", WIDE),
}  # fmt: skip
PROMPTS = [{"prompt_token_ids": list(range(first, first + 37))} for first in (5, 60, 111)]


def token_ids(path: Path, **options: Any) -> list[list[int]]:
    llm = LLM(
        str(path), backend="cpu", threads=1, skip_tokenizer_init=True, max_model_len=64,
        max_num_batched_tokens=24, num_gpu_blocks_override=12, **options,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.llm_engine.close()
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    architecture, changes = FAMILIES[family]
    write_checkpoint(tmp_path, architecture, **changes)
    expected = token_ids(tmp_path, dtype="float32")
    if family != "olmo2":  # it norms all heads as one
        assert token_ids(tmp_path, dtype="float32", tensor_parallel_size=2) == expected
    assert token_ids(tmp_path, dtype="float32", pipeline_parallel_size=2) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3, tied", "mixtral"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_stages_of_quantised_checkpoints_give_the_tokens_of_one(
    family: str, kind: str, tmp_path: Path
) -> None:
    """Stages compute what one process computes, bit for bit; sums over tensor-parallel ranks round otherwise."""
    architecture, changes = FAMILIES[family]
    write_checkpoint(tmp_path / "floats", architecture, **changes)
    quantize_checkpoint(tmp_path / "floats", tmp_path / "packed", kind)
    expected = token_ids(tmp_path / "packed")
    assert token_ids(tmp_path / "packed", pipeline_parallel_size=2) == expected
