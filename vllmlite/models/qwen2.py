"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v, and optional windows in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, layer_windows
from vllmlite.models.qwen_moe import with_experts
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Qwen2's decoder spec; q, k and v always have biases."""
    return replace(decoder_spec(config, architecture, windows=layer_windows(config)), qkv_bias=True)


def moe(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Qwen2-MoE's decoder spec: a shared expert beside the routed ones; windows in every other lower layer."""
    windows = layer_windows(config, lambda layer, first: layer % 2 == 0 and layer < first)
    base = decoder_spec(config, architecture, windows=windows)
    base = replace(base, qkv_bias=config.boolean("qkv_bias", True))
    return with_experts(base, config, config.integer("shared_expert_intermediate_size", 5632), 60, 4)


def mimo(config: HfConfig) -> HfConfig:
    """Return the configuration of Xiaomi's MiMo (2025), which is Qwen2 with an MTP layer."""
    config.require("attention_bias", True)
    config.require("use_mrope", False)
    return config
