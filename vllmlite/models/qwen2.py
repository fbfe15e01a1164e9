"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v, and optional windows in the upper layers."""

from __future__ import annotations

from vllmlite.models.hf_config import HfConfig, decoder_spec, layer_windows
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """The biases are not an option: every checkpoint has them."""
    return decoder_spec(config, architecture, windows=layer_windows(config), qkv_bias=True)
