"""OLMo 2 (OLMo et al. 2024): norms after attention and MLP instead of before; q and k normalised over all heads."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import decoder_spec
from vllmlite.models.keys import SANDWICH
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec; the four attention projections may have biases."""
    bias = config.boolean("attention_bias", False)
    return replace(
        decoder_spec(config, architecture),
        attn_norm=False,
        attn_out_norm=True,
        mlp_norm=False,
        mlp_out_norm=True,
        qk_norm="whole",
        qkv_bias=bias,
        o_bias=bias,
        keys=SANDWICH,
    )
