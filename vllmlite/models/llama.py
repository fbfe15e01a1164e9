"""Llama 1 to 3 (Touvron et al. 2023, Dubey et al. 2024), and the many models with the same architecture."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec; the attention projections and the MLP may have biases."""
    bias = config.boolean("attention_bias", False)
    return replace(
        decoder_spec(config, architecture),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )
