"""Llama 1 to 3 (Touvron et al. 2023, Dubey et al. 2024), and the many models of the same shape."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig, decoder_spec
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Biases are options, of all four attention projections or of the MLP."""
    bias = config.boolean("attention_bias", False)
    return replace(
        decoder_spec(config, architecture),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )
