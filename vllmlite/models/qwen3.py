"""Qwen3 (Yang et al. 2025): q and k are normed a head before rotation; biases are an option, off in practice."""

from __future__ import annotations

from vllmlite.models.hf_config import HfConfig, decoder_spec, layer_windows
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """The head size is a number of its own, 128 unless given."""
    bias = config.boolean("attention_bias", False)
    return decoder_spec(
        config,
        architecture,
        windows=layer_windows(config),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        head_dim=128,
    )
