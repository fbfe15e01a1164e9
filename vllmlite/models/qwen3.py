"""Qwen3 (Yang et al. 2025): q and k are normalised per head before the rotary embedding; optional biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec, layer_windows, used_window
from vllmlite.models.qwen_moe import with_experts
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Qwen3's decoder spec; ``head_dim`` is independent of the hidden size."""
    return _spec(config, architecture, layer_windows(config), head_dim=128)


def moe(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return Qwen3-MoE's decoder spec: routed experts only; a window, if set, is in all layers."""
    windows = (used_window(config),) * config.integer("num_hidden_layers")
    return with_experts(_spec(config, architecture, windows, None), config, 0, 128, 8)


def _spec(
    config: HfConfig, architecture: str, windows: Sequence[int | None], head_dim: int | None
) -> DecoderSpec:
    bias = config.boolean("attention_bias", False)
    return replace(
        decoder_spec(config, architecture, windows=windows, head_dim=head_dim),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )
