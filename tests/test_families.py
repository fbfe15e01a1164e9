"""Every family but the first four, in each of its layouts, against transformers on tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from test_models import chunked, device, expected_logits, greedy, paged_model, prompts

__all__ = ["device"]

MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
    },
    "max_position_embeddings": 512,
}
TWO_ROPES: dict[str, Any] = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {}),
    "phi3-sliding-partial": (
        "Phi3",
        {"sliding_window": 9, "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope-short": ("Phi3", LONGROPE | {"original_max_position_embeddings": 256}),
    "phi3-longrope-long": ("Phi3", LONGROPE | {"original_max_position_embeddings": 8}),
    "gemma": ("Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 11, "layer_types": None} | TWO_ROPES),
    "gemma3-cap": (
        "Gemma3",
        {"head_dim": 16, "final_logit_softcapping": 3.0, "num_hidden_layers": 7},
    ),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-sliding": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [1, 0, 1]},
    ),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 56}),
    "qwen2-moe-some": (
        "Qwen2Moe",
        MOE
        | {"shared_expert_intermediate_size": 56, "decoder_sparse_step": 2, "norm_topk_prob": True}
        | {"num_hidden_layers": 4, "mlp_only_layers": [3]},
    ),
    "qwen3-moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "gpt2": ("GPT2", {"n_inner": None}),
    "gpt2-untied": ("GPT2", {"n_inner": 80, "tie_word_embeddings": False}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-no-bias": ("OPT", {"ffn_dim": 96, "enable_bias": False, "activation_function": "gelu"}),
    "neox": ("GPTNeoX", {}),
    "neox-sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "falcon-7b": ("Falcon", {}),
    "falcon-40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-11b": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("Bloom", {}),
    "bloom-six-heads": ("Bloom", {"n_head": 6, "hidden_size": 48}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path, device: str) -> None:
    """Logits of prompts whole and in ragged chunks among others, and greedy text of 64 tokens."""
    family, changes = CASES[case]
    reference = write_checkpoint(tmp_path, family, **changes)
    sequences = prompts()
    if case == "phi3-longrope-long":
        sequences = [sequence for sequence in sequences if len(sequence) > 8]
    expected = [expected_logits(reference, sequence, False) for sequence in sequences]
    scale = max(float(np.abs(logits).max()) for logits in expected)
    paged = paged_model(tmp_path, device)
    for how in ("whole", "ragged"):
        for row, (found, wanted) in enumerate(zip(chunked(paged, sequences, how), expected, strict=True)):
            assert float(np.abs(found - wanted).max()) <= 1e-4 * scale, f"{how}, row {row}"
    ours, theirs = greedy(paged, reference, sequences)
    assert ours == theirs
