"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): attention and an ungated MLP in parallel, each with
its own layer norm, and partial rotary embedding (a quarter of each head)."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_fields import ACTIVATIONS, decoder_spec, head_size, layer_norm
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.keys import Fused, Keys
from vllmlite.models.spec import DecoderSpec

KEYS = Keys(
    prefix="gpt_neox.",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    qkv=Fused("attention.query_key_value", by_group=True),
    o="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    unread=r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$",
)


def spec(config: HfConfig, architecture: str) -> DecoderSpec:
    """Return the decoder spec; ``use_parallel_residual`` false makes attention and MLP sequential."""
    config = config.spelling(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    config = config.fixed(num_key_value_heads=config.get("num_attention_heads"))
    base = decoder_spec(
        config,
        architecture,
        norm=layer_norm(config, "layer_norm_eps"),
        activations=ACTIVATIONS,
        activation="gelu",
        rope=rope_spec(config, head_size(config), partial=0.25),
    )
    bias = config.boolean("attention_bias", True)
    return replace(
        base,
        parallel=config.boolean("use_parallel_residual", True),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        keys=KEYS,
    )
