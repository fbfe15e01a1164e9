"""Tiny seeded Hugging Face checkpoints of each family, written by transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

TINY: dict[str, Any] = dict(
    vocab_size=307,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def write_checkpoint(
    path: Path, family: str = "Llama", *, dtype: str = "float32", seed: int = 0, **changes: Any
) -> Any:
    """Write a random checkpoint of ``family`` to ``path`` and return transformers' model of it, in float32.

    Weights are larger than an initialisation's, so that attention is not flat and logits differ clearly. Without
    transformers the test is skipped."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    save = {key: changes.pop(key) for key in ("max_shard_size",) if key in changes}
    if family in ("Qwen3", "Qwen3Moe"):
        changes.setdefault("head_dim", 16)
    named = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = named(**TINY | changes)
    torch.manual_seed(seed)
    # Eager attention adds Falcon's linear biases twice, and alone caps Gemma 2's scores, knows BLOOM's biases, and
    # attends to gpt-oss's sinks.
    attention = "eager" if family in ("Gemma2", "Bloom", "GptOss") else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    one = 0.0 if family.startswith("Gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(one if re.search(r"norm|ln_", name) else 0.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path, **save)
    return model.float().eval()
