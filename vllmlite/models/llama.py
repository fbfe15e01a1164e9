"""Llama 1 to 3 (Touvron et al. 2023, Dubey et al. 2024), and the many models of the same shape."""

from __future__ import annotations

from vllmlite.models.hf_config import HfConfig, decoder_spec
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Biases are options, of all four attention projections or of the MLP."""
    bias = config.boolean("attention_bias", False)
    return decoder_spec(
        config,
        architecture,
        windows=(None,) * config.integer("num_hidden_layers"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )
