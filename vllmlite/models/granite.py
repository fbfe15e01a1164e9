"""Granite 3 (IBM 2024): Llama with multipliers for embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models import llama
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec. Logits are divided by ``logits_scaling``; the other multipliers multiply."""
    return replace(
        llama.spec(config, architecture),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
    )
