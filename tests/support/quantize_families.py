"""Tiny checkpoints of the families that ``vllmlite quantize`` handles differently from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Llama", {"num_key_value_heads": 4}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "fused": ("Phi3", {}),
    "mixture": ("Mixtral", {"num_local_experts": 4}),
    "shared expert": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "transposed": ("GPT2", {"n_embd": 64, "n_inner": 128}),
    "norms less one": ("Gemma", {"head_dim": 16}),
    "post norms": ("OPT", {"ffn_dim": 128, "do_layer_norm_before": False, "word_embed_proj_dim": 64}),
    "parallel": ("GPTNeoX", {}),
}


def checkpoint(path: Path, family: str, **changes: Any) -> Path:
    architecture, own = FAMILIES[family]
    write_checkpoint(path, architecture, **{"intermediate_size": 128} | own | changes)
    return path
