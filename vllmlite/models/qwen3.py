"""Qwen3 (Yang et al. 2025): q and k are normed a head before rotation; biases are an option, off in practice."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig, decoder_spec, layer_windows
from vllmlite.models.qwen_moe import with_experts
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str, head_dim: int | None = 128) -> DecoderSpec:
    """The head size is a number of its own, ``head_dim`` unless given."""
    bias = config.boolean("attention_bias", False)
    return replace(
        decoder_spec(config, architecture, windows=layer_windows(config), head_dim=head_dim),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def moe(config: HfConfig, architecture: str) -> DecoderSpec:
    """Experts only, in most layers."""
    return with_experts(spec(config, architecture, None), config, 0, 128, 8)
