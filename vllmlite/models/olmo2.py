"""OLMo 2 (OLMo et al. 2024): norms stand behind attention and MLP, and q and k are normed over all heads at once."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig, decoder_spec
from vllmlite.models.keys import SANDWICH
from vllmlite.models.spec import DecoderSpec


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """A bias on all four projections of attention is an option."""
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
