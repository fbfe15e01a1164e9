"""Tiny seeded Hugging Face checkpoints of each family, written by transformers."""

from __future__ import annotations

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
    if family == "Qwen3":
        changes.setdefault("head_dim", 16)
    config = getattr(transformers, f"{family}Config")(**TINY | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(path, **save)
    return model.float().eval()
