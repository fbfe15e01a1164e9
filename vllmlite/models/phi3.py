"""Phi-3, Phi-3.5 and Phi-4 of the same shape (Abdin et al. 2024): Llama with fused projections, a part of each head
rotated, and long contexts by LongRoPE (Ding et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig, decoder_spec, head_size, rope_spec
from vllmlite.models.keys import Fused, Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(qkv=Fused("self_attn.qkv_proj"), gate_up=Fused("mlp.gate_up_proj"))


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """``sliding_window`` may be null: full attention."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    base = decoder_spec(
        config,
        architecture,
        windows=(window,) * config.integer("num_hidden_layers"),
        rope=rope_spec(config, head_size(config), partial=1.0),
    )
    return replace(base, keys=KEYS)
